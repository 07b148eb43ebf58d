package erofs

import (
	"fmt"
	"hash/crc32"
	"io"
)

const sinkSize = 256 << 10

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sink is the one buffer between the writer and w. It counts and checksums
// what passes, and remembers the first error, after which it writes nothing.
type sink struct {
	w   io.Writer
	buf []byte
	off int64 // of the end of buf in the image
	crc uint32
	err error
}

func newSink(w io.Writer) *sink {
	return &sink{w: w, buf: make([]byte, 0, sinkSize)}
}

// next returns the next n bytes of the image, zeroed, to be filled in before
// the next call. n is at most sinkSize.
func (s *sink) next(n int) []byte {
	if cap(s.buf)-len(s.buf) < n {
		s.flush()
	}
	at := len(s.buf)
	s.buf = s.buf[:at+n]
	s.off += int64(n)
	b := s.buf[at:]
	clear(b)
	return b
}

func (s *sink) writeString(p string) {
	for len(p) > 0 {
		n := min(len(p), sinkSize)
		copy(s.next(n), p[:n])
		p = p[n:]
	}
}

func (s *sink) zeros(n int64) {
	for n > 0 && s.err == nil {
		step := min(n, sinkSize)
		s.next(int(step))
		n -= step
	}
}

// align writes zeros up to the next multiple of n.
func (s *sink) align(n int64) {
	s.zeros(align(s.off, n) - s.off)
}

// copyAt appends n bytes of r from off.
func (s *sink) copyAt(r io.ReaderAt, off, n int64) {
	for n > 0 && s.err == nil {
		step := min(n, sinkSize/4)
		got, err := r.ReadAt(s.next(int(step)), off)
		if int64(got) < step {
			s.fail(fmt.Errorf("read layer at %d: %w", off+int64(got), noEOF(err)))
		}
		off += step
		n -= step
	}
}

func noEOF(err error) error {
	if err == nil || err == io.EOF { //nolint:errorlint // an io.ReaderAt's own, unwrapped
		return io.ErrUnexpectedEOF
	}
	return err
}

// fail remembers an error of the image's sources.
func (s *sink) fail(err error) {
	if err != nil && s.err == nil {
		s.err = fmt.Errorf("erofs: %w", err)
	}
}

func (s *sink) flush() {
	if s.err == nil && len(s.buf) > 0 {
		s.crc = crc32.Update(s.crc, castagnoli, s.buf)
		if _, err := s.w.Write(s.buf); err != nil {
			s.err = fmt.Errorf("erofs: write image: %w", err)
		}
	}
	s.buf = s.buf[:0]
}

// align rounds n up to a multiple of to, a power of two.
func align[T int | int64 | uint64](n, to T) T {
	return (n + to - 1) &^ (to - 1)
}
