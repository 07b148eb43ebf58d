package decompress

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"

	"github.com/containerd/errdefs"
)

// zstdBlock is the most a block of a zstd frame holds and takes, in bytes (RFC 8878, 3.1.1.2.3).
const zstdBlock = 128 << 10

// zstdRoom is the room for a block and some that the library wants behind output:
// with less it takes slower ways, and may move what it has decoded.
const zstdRoom = zstdBlock + 64

var (
	errZstdBlock  = errors.New("zstd block")
	errZstdMoved  = errors.New("zstd frame holds more than its block headers say")
	errZstdMemory = fmt.Errorf("zstd window of more than %d MiB is not supported, compress the layer without --long", MaxWindow>>20)
)

// zstdFrame is a frame whose blocks are walked by their headers, which is cheap,
// to find its end and how much it can hold at most.
type zstdFrame struct {
	window int64 // bytes of output a decoder must keep
	known  bool  // size is the content's
	size   int64
	sum    bool // a checksum follows the last block

	left int   // bytes until the next block header
	last bool  // no block follows
	most int64 // what the blocks seen hold at most
}

// peekZstdFrame parses the frame header at the front of br without reading it
// away. What it does not like is left to the decoder to refuse, but for windows
// that would take too much memory and for dictionaries.
func peekZstdFrame(br *bufio.Reader) (*zstdFrame, error) {
	head, err := br.Peek(zstd.HeaderMaxSize)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	var h zstd.Header
	if err := h.Decode(head); err != nil {
		return nil, err
	}
	f := &zstdFrame{
		window: int64(min(h.WindowSize, 1<<62)), known: h.HasFCS, size: int64(min(h.FrameContentSize, 1<<62)),
		sum: h.HasCheckSum, left: h.HeaderSize,
	}
	if h.SingleSegment {
		f.window = max(f.size, zstd.MinWindowSize)
	}
	switch {
	case h.DictionaryID != 0:
		return nil, fmt.Errorf("zstd frame needs dictionary %#x, dictionaries are not supported: %w", h.DictionaryID, errdefs.ErrNotImplemented)
	case f.window > MaxWindow:
		return nil, errZstdMemory
	}
	return f, nil
}

// bound is how much the frame holds at most, as far as it was walked.
func (f *zstdFrame) bound() int64 {
	if f.known {
		return f.size
	}
	return f.most
}

// step returns how many bytes follow before the next block header must be read,
// 0 at the frame's end. The header itself is among them.
func (f *zstdFrame) step(br *bufio.Reader) (int, error) {
	if f.left > 0 {
		return f.left, nil
	}
	if f.last {
		if f.sum {
			f.sum, f.left = false, 4
		}
		return f.left, nil
	}
	head, err := peek(br, 3)
	if err != nil {
		return 0, early(err)
	}
	word := int(head[0]) | int(head[1])<<8 | int(head[2])<<16
	size := word >> 3
	if size > zstdBlock {
		return 0, fmt.Errorf("%w of %d bytes, the most is %d", errZstdBlock, size, zstdBlock)
	}
	f.last = word&1 != 0
	switch word >> 1 & 3 {
	case 0: // as it is
		f.left, f.most = 3+size, f.most+int64(size)
	case 1: // one byte, repeated
		f.left, f.most = 4, f.most+int64(size)
	case 2:
		f.left, f.most = 3+size, f.most+zstdBlock
	default:
		return 0, fmt.Errorf("%w of the reserved type", errZstdBlock)
	}
	return f.left, nil
}

// gather reads the rest of the frame, which is not waited for memory with. On
// errBusy, which a frame that is or holds more than most is too, some of it may
// have been read.
func (f *zstdFrame) gather(br *bufio.Reader, g *gather, mem *memory, most int64) error {
	for {
		n, err := f.step(br)
		if n == 0 || err != nil {
			return err
		}
		before := g.n
		err = g.read(br, n, mem, false)
		f.left -= g.n - before
		if err != nil {
			return err
		}
		if g.n > maxAhead || !f.known && f.most > most {
			return errBusy
		}
	}
}

// zstdTail reads what is left of frames: what was gathered of them, and then the
// rest of the last. It ends with it.
type zstdTail struct {
	gathered []byte
	frame    *zstdFrame
	br       *bufio.Reader
	err      error // of the input, or of the last frame's structure
}

func (t *zstdTail) Read(p []byte) (int, error) {
	if len(t.gathered) > 0 {
		n := copy(p, t.gathered)
		t.gathered = t.gathered[n:]
		return n, nil
	}
	n, err := t.frame.step(t.br)
	switch {
	case err != nil:
		t.err = err
		return 0, err
	case n == 0:
		return 0, io.EOF
	}
	n, err = t.br.Read(p[:min(n, len(p))])
	t.frame.left -= n
	if err != nil {
		t.err = early(err)
	}
	return n, t.err
}
