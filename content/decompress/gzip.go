package decompress

import (
	"bufio"
	"errors"
	"io"

	"github.com/klauspost/compress/gzip"
)

// gzipReader decodes members one after the other. It drives the library
// member by member, because the library takes whatever follows a member for a
// damaged one, while gzip(1) stops there: zero padding and other bytes that do
// not start with the magic are not part of the stream.
type gzipReader struct {
	br *bufio.Reader
	zr *gzip.Reader // nil until the first read
}

func newGzipReader(br *bufio.Reader) *gzipReader { return &gzipReader{br: br} }

// member opens the next member. io.EOF says that there is none.
func (g *gzipReader) member() error {
	if g.zr == nil {
		g.zr = new(gzip.Reader)
	} else if err := g.more(); err != nil {
		return err
	}
	if err := g.zr.Reset(g.br); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // the magic was there: the header is cut short
		}
		return err
	}
	g.zr.Multistream(false)
	return nil
}

// more returns nil if another member follows. Otherwise it reads what is left
// to the source's end and returns io.EOF.
func (g *gzipReader) more() error {
	head, err := g.br.Peek(2)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if isGzip(head) {
		return nil
	}
	if _, err := io.Copy(io.Discard, g.br); err != nil {
		return err
	}
	return io.EOF
}

func (g *gzipReader) Read(p []byte) (int, error) {
	if g.zr == nil {
		if err := g.member(); err != nil {
			return 0, err
		}
	}
	for {
		n, err := g.zr.Read(p)
		if err == nil || !errors.Is(err, io.EOF) {
			return n, err
		}
		// Also taken with n > 0: the next member is opened now or never.
		if err := g.member(); err != nil || n > 0 {
			return n, err
		}
	}
}
