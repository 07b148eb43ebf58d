package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
)

const blockSize = 512

// mapLimit bounds how much of a member's data is kept for its sparse map.
// archive/tar reads no map above 1 MiB.
const mapLimit = 1<<20 + blockSize

// source is where the bytes of a tar come from.
type source interface {
	io.Reader
	// Skip drops the next n bytes; that the source ends before may stay
	// unnoticed until the next Read.
	Skip(n int64) error
}

// tape is what archive/tar reads from: it counts, so that a member's place in
// the tar is known; it skips the data (archive/tar seeks where it can); and it
// keeps the raw header of the current member and what was read after it, where
// GNU's sparse map 1.0 lies.
type tape struct {
	src source
	pos int64
	err error // what src failed with, io.EOF aside

	pushed []byte // was read and is to be read again

	headerAt int64 // where the next header block begins
	header   [blockSize]byte
	have     int
	found    bool // header is the member's own, not that of a PAX or GNU extra
	after    []byte
}

// Read implements io.Reader.
func (t *tape) Read(p []byte) (int, error) {
	at := t.pos
	n, err := t.take(p)
	t.observe(at, p[:n])
	return n, err
}

// take reads without looking at the bytes.
func (t *tape) take(p []byte) (int, error) {
	if len(t.pushed) > 0 {
		n := copy(p, t.pushed)
		t.pushed = t.pushed[n:]
		t.pos += int64(n)
		return n, nil
	}
	n, err := t.src.Read(p)
	t.pos += int64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		t.err = err
	}
	return n, err
}

// full takes all of p, or what there is before the source ends.
func (t *tape) full(p []byte) (n int, err error) {
	for empty := 0; n < len(p); {
		m, err := t.take(p[n:])
		n += m
		if errors.Is(err, io.EOF) {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		if empty++; m > 0 {
			empty = 0
		} else if empty == 100 {
			t.err = io.ErrNoProgress
			return n, t.err
		}
	}
	return n, nil
}

// back makes p, the bytes read last, what is read next. They stay the caller's
// to keep until then.
func (t *tape) back(p []byte) {
	t.pushed = p
	t.pos -= int64(len(p))
}

// Seek implements io.Seeker as far as archive/tar uses it: forward from where
// the tape stands.
func (t *tape) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, fmt.Errorf("seek %d from %d on a stream", offset, whence)
	}
	err := t.skip(offset)
	return t.pos, err
}

// skip drops the next n bytes.
func (t *tape) skip(n int64) error {
	again := min(n, int64(len(t.pushed)))
	t.pushed = t.pushed[again:]
	if n > again {
		if err := t.src.Skip(n - again); err != nil {
			t.err = err
			return err
		}
	}
	t.pos += n
	return nil
}

// expect says that the current member's data ends at end and the next header
// follows it.
func (t *tape) expect(end int64) {
	t.headerAt = (end + blockSize - 1) &^ (blockSize - 1)
	t.have, t.found, t.after = 0, false, t.after[:0]
}

// observe is told of bytes that archive/tar has read, and where they lie.
func (t *tape) observe(pos int64, p []byte) {
	for len(p) > 0 {
		if t.found {
			room := min(len(p), mapLimit-len(t.after))
			t.after = append(t.after, p[:room]...)
			return
		}
		if pos < t.headerAt {
			n := min(int64(len(p)), t.headerAt-pos)
			p, pos = p[n:], pos+n
			continue
		}
		n := copy(t.header[t.have:], p)
		p, pos = p[n:], pos+int64(n)
		if t.have += n; t.have == blockSize {
			t.headerDone(pos)
		}
	}
}

func (t *tape) headerDone(end int64) {
	switch t.header[156] {
	case 'x', 'L', 'K': // they describe the member whose header follows
		size := min(max(t.rawSize(), 0), mapLimit)
		t.headerAt, t.have = end+(size+blockSize-1)&^(blockSize-1), 0
	default:
		t.found = true
	}
}

// rawSize is the size field of the header block.
func (t *tape) rawSize() int64 { return parseNumber(t.header[124:136]) }

// parseNumber reads a numeric header field, octal or GNU's base 256. Headers
// that archive/tar refuses never get here, so nonsense is 0.
func parseNumber(field []byte) int64 {
	if field[0]&0x80 != 0 {
		var v uint64
		for i, c := range field {
			if i == 0 {
				c &= 0x7f
			}
			v = v<<8 | uint64(c)
		}
		return int64(v & (1<<63 - 1))
	}
	field = bytes.Trim(field, " \x00")
	if i := bytes.IndexByte(field, 0); i >= 0 {
		field = field[:i]
	}
	v, err := strconv.ParseInt(string(field), 8, 64)
	if err != nil {
		return 0
	}
	return v
}

// readerSource is a source that can only be read.
type readerSource struct{ io.Reader }

func (r readerSource) Skip(n int64) error {
	_, err := io.CopyN(io.Discard, r.Reader, n)
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// fileSource reads headers by pread and steps over data without touching it.
type fileSource struct {
	f     io.ReaderAt
	off   int64
	buf   []byte
	start int64 // offset of buf[0]
}

func newFileSource(f io.ReaderAt) *fileSource {
	return &fileSource{f: f, buf: make([]byte, 0, 32<<10)}
}

func (s *fileSource) Read(p []byte) (int, error) {
	if s.off < s.start || s.off >= s.start+int64(len(s.buf)) {
		n, err := s.f.ReadAt(s.buf[:cap(s.buf)], s.off)
		s.start, s.buf = s.off, s.buf[:n]
		if n == 0 {
			return 0, err
		}
	}
	n := copy(p, s.buf[s.off-s.start:])
	s.off += int64(n)
	return n, nil
}

func (s *fileSource) Skip(n int64) error {
	s.off += n
	return nil
}
