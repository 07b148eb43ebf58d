package decompress

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

var errApple = errors.New("lz4 stream in Apple's framing")

// appleMost is how large a block may be that Apple's framing announces. Its own
// encoder writes blocks of 64 KiB.
const appleMost = 8 << 20

// appleReserve is for the largest block: two buffers of output, the block, and
// half of it while its buffer grows.
const appleReserve = 40 << 20

// applePlanner reads the framing of Apple's Compression framework: "bv41", the
// lengths of a block uncompressed and compressed, and the block; "bv4-", a length
// and so many bytes as they are; "bv4$" at the end. Lengths are 32 bits, little
// endian (developer.apple.com/documentation/compression/compression_lz4). What
// follows the end is not part of the stream.
type applePlanner struct {
	br     *bufio.Reader
	linked linked
	stored int64 // bytes left of the block that is being copied
	ended  bool
}

func newApplePlanner(br *bufio.Reader, mem *memory) *applePlanner {
	return &applePlanner{br: br, linked: linked{mem: mem}}
}

func (a *applePlanner) close() { a.linked.forget() }

func (a *applePlanner) plan(bool) (*job, error) {
	if a.ended {
		if _, err := io.Copy(io.Discard, a.br); err != nil {
			return nil, err
		}
		return nil, io.EOF
	}
	size, err := a.prepare()
	if err != nil {
		return nil, err
	}
	f, err := a.linked.begin(size)
	if err != nil {
		return nil, err
	}
	for err == nil && !a.ended && !pause(a.br, f.output()) && f.room() > 0 {
		var full bool
		if full, err = a.block(&f); full {
			break
		}
	}
	return a.linked.finish(f, nil, err)
}

// prepare returns how large a buffer must be, and sees to it that the reader may have it.
func (a *applePlanner) prepare() (int, error) {
	if a.stored > 0 {
		return blockSize, nil
	}
	h, err := a.peek()
	if err != nil || h.raw <= blockSize {
		return blockSize, err
	}
	if h.raw > appleMost {
		return 0, fmt.Errorf("%w: block of %d bytes, at most %d are supported", errApple, h.raw, appleMost)
	}
	a.linked.in.free()
	return h.raw, a.linked.mem.widen(appleReserve)
}

// appleHead is a block's header; raw and size are zero at the end.
type appleHead struct {
	stored, end bool
	raw, size   int
	length      int // of the header
}

// peek parses a header without reading it away.
func (a *applePlanner) peek() (appleHead, error) {
	head, err := peek(a.br, 4)
	if err != nil {
		return appleHead{}, early(err)
	}
	h := appleHead{length: 4}
	switch string(head) {
	case appleEnd:
		h.end = true
		return h, nil
	case appleStored:
		h.stored, h.length = true, 8
	case appleBlock:
		h.length = 12
	default:
		return h, fmt.Errorf("%w: %q where a block should be", errApple, head)
	}
	if head, err = peek(a.br, h.length); err != nil {
		return h, early(err)
	}
	if h.stored {
		h.size = int(binary.LittleEndian.Uint32(head[4:]))
		return h, nil
	}
	h.raw, h.size = int(binary.LittleEndian.Uint32(head[4:])), int(binary.LittleEndian.Uint32(head[8:]))
	return h, nil
}

// block decodes the next block, or a part of one that is stored. full says that
// the next one needs another buffer.
func (a *applePlanner) block(f *filling) (full bool, err error) {
	if a.stored > 0 {
		n := int(min(a.stored, int64(f.room()), blockSize))
		a.stored -= int64(n)
		return false, a.linked.stored(a.br, f, n)
	}
	h, err := a.peek()
	switch {
	case err != nil:
		return false, err
	case h.end:
		a.ended = true
	case h.stored:
		a.stored = int64(h.size)
	case h.raw > f.room():
		return true, nil
	}
	if _, err := a.br.Discard(h.length); err != nil || h.end || h.stored {
		return false, err
	}
	return false, a.compressed(f, h)
}

func (a *applePlanner) compressed(f *filling, h appleHead) error {
	// Neither can an honest block be longer than what it holds, but for some
	// bytes, nor hold more than 255 times its length.
	if h.size > h.raw+h.raw/255+16 || h.raw > 255*h.size {
		return fmt.Errorf("%w: block of %d bytes for %d", errApple, h.size, h.raw)
	}
	block, err := a.linked.read(a.br, h.size)
	if err != nil {
		return err
	}
	n, err := a.linked.decode(f, block, h.raw)
	if err == nil && n != h.raw {
		err = fmt.Errorf("%w: %d bytes where %d were announced", errApple, n, h.raw)
	}
	return err
}
