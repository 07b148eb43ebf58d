package decompress

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// lz4Window is how far back an LZ4 match reaches at most, in bytes.
const lz4Window = 64 << 10

// linked decodes LZ4 blocks one after the other, each of which may refer to the
// output before it.
type linked struct {
	mem     *memory
	history []byte // the last output, up to lz4Window bytes of it
	in      gather
}

// filling is a buffer on its way: history first, then output.
type filling struct {
	buf        *buffer
	start, end int
}

// begin takes a buffer for at least size bytes of output.
func (l *linked) begin(size int) (filling, error) {
	buf, err := l.mem.take(lz4Window + size)
	if err != nil {
		return filling{}, err
	}
	n := copy(buf.b, l.history)
	return filling{buf: buf, start: n, end: n}, nil
}

func (f *filling) room() int   { return len(f.buf.b) - f.end }
func (f *filling) output() int { return f.end - f.start }

// finish keeps the history and makes a job of the output. An error that came
// behind some output is the job's.
func (l *linked) finish(f filling, settle func([]byte) error, err error) (*job, error) {
	if err != nil && f.output() == 0 {
		f.buf.free()
		return nil, err
	}
	l.history = append(l.history[:0], f.buf.b[max(0, f.end-lz4Window):f.end]...)
	j := finished(f.buf, f.buf.b[f.start:f.end], settle)
	j.err = err
	return j, nil
}

// stored reads n bytes of output.
func (l *linked) stored(br *bufio.Reader, f *filling, n int) error {
	got, err := io.ReadFull(br, f.buf.b[f.end:f.end+n])
	if err != nil {
		return early(err)
	}
	f.end += got
	return nil
}

// read reads a compressed block of n bytes. They stay valid until the next call.
func (l *linked) read(br *bufio.Reader, n int) ([]byte, error) {
	l.in.n, l.in.limit = 0, n
	if err := l.in.read(br, n, l.mem, true); err != nil {
		return nil, err
	}
	return l.in.bytes(), nil
}

// decode appends a block's output, at most so many bytes.
func (l *linked) decode(f *filling, block []byte, most int) (int, error) {
	before := f.buf.b[max(0, f.end-lz4Window):f.end]
	n, err := lz4.UncompressBlockWithDict(block, f.buf.b[f.end:f.end+most], before)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", errLZ4Block, err)
	}
	f.end += n
	return n, nil
}

// forget begins a new frame, which refers to nothing before it.
func (l *linked) forget() {
	l.history = l.history[:0]
	l.in.free()
}

// blockSum checks the checksum that follows a block.
func blockSum(br *bufio.Reader, block []byte) error {
	want, err := readSum(br)
	if err != nil {
		return err
	}
	return checkBlock(block, want)
}

func readSum(br *bufio.Reader) (uint32, error) {
	var sum [4]byte
	if _, err := io.ReadFull(br, sum[:]); err != nil {
		return 0, early(err)
	}
	return binary.LittleEndian.Uint32(sum[:]), nil
}

// pause says whether to hand out so much output instead of waiting for more input.
func pause(br *bufio.Reader, output int) bool {
	return output >= blockSize || output >= blockSize/4 && br.Buffered() == 0
}
