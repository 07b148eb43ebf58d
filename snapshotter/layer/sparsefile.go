package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	pageSize = 4096
	// batchChunks and batchBytes bound what is written at once.
	batchChunks = 32
	batchBytes  = 4 << 20
)

var zeroPage [pageSize]byte

// isZero lets the runtime compare: a page of data, which differs early, takes 11 ns
// here and one of zeros 65 ns. A loop over words takes 10 ns and 300 to 400 ns
// (BenchmarkZero).
func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:len(page)]) }

// sparseFile puts a stream into a file, in writes that begin and end on pages,
// and leaves out the pages that are all zeros. What a block has of a page that
// goes on in the next one is copied; all else is written from where it lies.
type sparseFile struct {
	f        *os.File
	makeRoom func() bool // where the disk is full

	off int64 // where pending begins; a multiple of the page size

	pending [][]byte // goes to off in one write

	// Of the page that is not complete yet, partial bytes are in carry[page]. The
	// others may be pending: a batch completes at most one page for each block.
	carry   [batchChunks + 2][pageSize]byte
	page    int
	partial int
}

// add takes data; it is needed until the next flush.
func (s *sparseFile) add(data []byte) error {
	if s.partial > 0 {
		n := copy(s.carry[s.page][s.partial:], data)
		s.partial += n
		data = data[n:]
		if s.partial < pageSize {
			return nil
		}
		full := s.carry[s.page][:]
		s.page, s.partial = (s.page+1)%len(s.carry), 0
		if err := s.addPages(full); err != nil {
			return err
		}
	}
	whole := len(data) &^ (pageSize - 1)
	s.partial = copy(s.carry[s.page][:], data[whole:])
	return s.addPages(data[:whole])
}

// addPages takes whole pages.
func (s *sparseFile) addPages(data []byte) error {
	for at := 0; at < len(data); {
		end := at
		for end < len(data) && !isZero(data[end:end+pageSize]) {
			end += pageSize
		}
		if end > at {
			s.pending = append(s.pending, data[at:end])
		}
		if at = end; at == len(data) {
			break
		}
		if err := s.flush(); err != nil {
			return err
		}
		for at < len(data) && isZero(data[at:at+pageSize]) {
			at += pageSize
		}
		s.off += int64(at - end)
	}
	return nil
}

// flush writes what is pending.
func (s *sparseFile) flush() error {
	for len(s.pending) > 0 {
		n, err := unix.Pwritev(int(s.f.Fd()), s.pending, s.off)
		if errors.Is(err, unix.EINTR) || (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)) && s.makeRoom() {
			continue
		}
		if err == nil && n == 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return fmt.Errorf("write layer file: %w", err)
		}
		s.written(int64(n))
	}
	return nil
}

// written takes n bytes off the front of what is pending.
func (s *sparseFile) written(n int64) {
	s.off += n
	done := 0
	for done < len(s.pending) && n >= int64(len(s.pending[done])) {
		n -= int64(len(s.pending[done]))
		done++
	}
	rest := copy(s.pending, s.pending[done:])
	clear(s.pending[rest:]) // keeps no block alive
	s.pending = s.pending[:rest]
	if n > 0 {
		s.pending[0] = s.pending[0][n:]
	}
}

// finish writes the last part of a page and gives the file its length. Nothing
// is pending.
func (s *sparseFile) finish() error {
	last := s.carry[s.page][:s.partial]
	end := s.off + int64(len(last))
	if !isZero(last) {
		s.pending = append(s.pending, last)
	}
	if err := s.flush(); err != nil {
		return err
	}
	if err := s.f.Truncate(end); err != nil {
		return fmt.Errorf("size of layer file: %w", err)
	}
	return nil
}
