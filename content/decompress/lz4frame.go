package decompress

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

const (
	legacyBlock = 8 << 20 // what a block of the legacy format holds at most
	// legacyBound is how long such a block can be when nothing in it compresses.
	legacyBound = legacyBlock + legacyBlock/255 + 16
)

// Faults of LZ4 data. They reach the caller within ErrCorrupt.
var (
	errLZ4Header   = errors.New("lz4 frame header")
	errLZ4Block    = errors.New("lz4 block")
	errLZ4Checksum = errors.New("lz4 checksum mismatch")
	errLZ4Size     = errors.New("lz4 size mismatch")
)

// lz4Frame is a frame of the LZ4 frame format 1.6.x (doc/lz4_Frame_format.md of
// the lz4 project), or of its legacy format.
type lz4Frame struct {
	legacy     bool
	linked     bool // blocks refer to the output before them
	blockSums  bool
	contentSum bool
	sized      bool
	size       uint64 // of the content, if sized
	blockMax   int    // bytes a block holds at most

	sum   xxh32
	total uint64
}

// lz4BlockSizes are the block sizes by the three bits that name them.
var lz4BlockSizes = [8]int{4: 64 << 10, 5: 256 << 10, 6: 1 << 20, 7: 4 << 20}

// peekLZ4Frame parses the frame header at the front of br, and returns its
// length. It reads nothing away.
func peekLZ4Frame(br *bufio.Reader) (*lz4Frame, int, error) {
	head, err := peek(br, 4)
	if err != nil {
		return nil, 0, err
	}
	if binary.LittleEndian.Uint32(head) == magicLZ4Legacy {
		return &lz4Frame{legacy: true, blockMax: legacyBlock, sum: newXXH32()}, 4, nil
	}
	if head, err = peek(br, 6); err != nil {
		return nil, 0, early(err)
	}
	flags, sizes := head[4], head[5]
	length := 7
	if flags&(1<<3) != 0 {
		length += 8
	}
	if flags&1 != 0 {
		length += 4
	}
	if head, err = peek(br, length); err != nil {
		return nil, 0, early(err)
	}
	if byte(xxh32Of(head[4:length-1])>>8) != head[length-1] {
		return nil, 0, fmt.Errorf("%w: %w", errLZ4Header, errLZ4Checksum)
	}
	f := &lz4Frame{
		linked: flags&(1<<5) == 0, blockSums: flags&(1<<4) != 0, contentSum: flags&(1<<2) != 0,
		sized: flags&(1<<3) != 0, blockMax: lz4BlockSizes[sizes>>4&7], sum: newXXH32(),
	}
	if f.sized {
		f.size = binary.LittleEndian.Uint64(head[6:])
	}
	return f, length, f.check(flags, sizes, head[:length-1])
}

func (f *lz4Frame) check(flags, sizes byte, head []byte) error {
	switch {
	case flags>>6 != 1:
		return fmt.Errorf("%w: version %d, known is 1", errLZ4Header, flags>>6)
	case flags&2 != 0 || sizes&0x8f != 0:
		return fmt.Errorf("%w: reserved bits are set", errLZ4Header)
	case f.blockMax == 0:
		return fmt.Errorf("%w: block size %d is none of 4 to 7", errLZ4Header, sizes>>4&7)
	case flags&1 != 0:
		id := binary.LittleEndian.Uint32(head[len(head)-4:])
		return fmt.Errorf("%w: dictionary %#x is needed, dictionaries are not supported: %w", errLZ4Header, id, errdefs.ErrNotImplemented)
	}
	return nil
}

// longest is how many bytes a block takes at most in the stream.
func (f *lz4Frame) longest() int {
	if f.legacy {
		return legacyBound
	}
	return f.blockMax
}

// settle takes in the output, in order.
func (f *lz4Frame) settle(data []byte) error {
	f.total += uint64(len(data))
	if f.contentSum {
		f.sum.write(data)
	}
	if f.sized && f.total > f.size {
		return fmt.Errorf("%w: more than the announced %d bytes", errLZ4Size, f.size)
	}
	return nil
}

// lz4Head is what stands in front of a block.
type lz4Head struct {
	size   int // bytes of the block in the stream
	stored bool
	end    bool // no more blocks in this frame
	last   []byte
}

// peekBlock looks at the next block's header, 4 bytes, without reading it away.
func (f *lz4Frame) peekBlock(br *bufio.Reader) (lz4Head, error) {
	head, err := peek(br, 4)
	if err != nil {
		if f.legacy && errors.Is(err, io.EOF) {
			return lz4Head{end: true}, nil // it has no end mark
		}
		return lz4Head{}, early(err)
	}
	word := binary.LittleEndian.Uint32(head)
	if f.legacy {
		return f.legacyBlock(br, word)
	}
	if word == 0 {
		return lz4Head{end: true}, nil
	}
	h := lz4Head{size: int(word &^ (1 << 31)), stored: word>>31 != 0}
	if h.size > f.blockMax {
		return h, fmt.Errorf("%w of %d bytes in a frame of blocks up to %d", errLZ4Block, h.size, f.blockMax)
	}
	return h, nil
}

// legacyBlock tells a block from another frame and from the size of the whole
// content, with which the Linux kernel's build ends such files.
func (f *lz4Frame) legacyBlock(br *bufio.Reader, word uint32) (lz4Head, error) {
	if word == magicLZ4 || word == magicLZ4Legacy || word&magicSkipMask == magicSkip {
		return lz4Head{end: true}, nil
	}
	if rest, err := br.Peek(5); len(rest) == 4 {
		if !errors.Is(err, io.EOF) {
			return lz4Head{}, err
		}
		return lz4Head{end: true, last: rest}, nil
	}
	if word > legacyBound {
		return lz4Head{}, fmt.Errorf("%w of %d bytes in a legacy frame", errLZ4Block, word)
	}
	return lz4Head{size: int(word)}, nil
}

// end reads what stands behind the last block and returns the check of it, to
// be made when all output was settled.
func (f *lz4Frame) end(br *bufio.Reader, h lz4Head) (check func([]byte) error, err error) {
	if f.legacy {
		word := uint32(0)
		if h.last != nil {
			word = binary.LittleEndian.Uint32(h.last)
			_, err = br.Discard(4)
		}
		return func([]byte) error {
			if h.last != nil && word != uint32(f.total) {
				return io.ErrUnexpectedEOF
			}
			return nil
		}, err
	}
	var tail [8]byte // the end mark, and the checksum
	n := 4
	if f.contentSum {
		n = 8
	}
	if _, err := io.ReadFull(br, tail[:n]); err != nil {
		return nil, early(err)
	}
	want := binary.LittleEndian.Uint32(tail[4:])
	return func([]byte) error {
		if f.sized && f.total != f.size {
			return fmt.Errorf("%w: %d bytes, announced were %d", errLZ4Size, f.total, f.size)
		}
		if got := f.sum.sum(); f.contentSum && got != want {
			return fmt.Errorf("%w: content has %08x, announced was %08x", errLZ4Checksum, got, want)
		}
		return nil
	}, nil
}
