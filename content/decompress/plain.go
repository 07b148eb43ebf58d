package decompress

import (
	"bufio"
	"errors"
	"io"
)

// plainPlanner cuts a stream that is not compressed into blocks.
type plainPlanner struct {
	br  *bufio.Reader
	mem *memory
	err error
}

func (p *plainPlanner) close() {}

func (p *plainPlanner) plan(bool) (*job, error) {
	if p.err != nil {
		return nil, p.err
	}
	out, err := p.mem.take(blockSize)
	if err != nil {
		return nil, err
	}
	n := 0
	for empty := 0; n < len(out.b) && p.err == nil; {
		var got int
		got, p.err = p.br.Read(out.b[n:])
		if n += got; pause(p.br, n) {
			break
		}
		if empty++; got > 0 {
			empty = 0
		} else if empty == 100 {
			p.err = io.ErrNoProgress
		}
	}
	j := finished(out, out.b[:n], nil)
	if !errors.Is(p.err, io.EOF) {
		j.err = p.err
	}
	return j, nil
}
