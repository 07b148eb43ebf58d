package decompress

import (
	"bufio"
	"errors"
	"io"
)

// gather collects compressed bytes in one piece of memory that grows as they
// arrive: what a header announces is not believed before it is there.
type gather struct {
	buf   *buffer
	n     int
	limit int // it grows beyond only for bytes that are known to come
}

// firstGather is how much a gather holds at first.
const firstGather = 64 << 10

// read appends n bytes of br. With must it waits for memory, else it may return
// errBusy; g.n tells what was read until then. An end of br is io.ErrUnexpectedEOF.
func (g *gather) read(br *bufio.Reader, n int, mem *memory, must bool) error {
	for n > 0 {
		step := min(n, max(firstGather, g.n)) // at most doubles what has arrived
		if err := g.room(step, mem, must); err != nil {
			return err
		}
		got, err := io.ReadFull(br, g.buf.b[g.n:g.n+step])
		g.n, n = g.n+got, n-got
		if err != nil {
			return early(err)
		}
	}
	return nil
}

// room makes place for n more bytes.
func (g *gather) room(n int, mem *memory, must bool) error {
	if g.buf != nil && len(g.buf.b)-g.n >= n {
		return nil
	}
	larger, err := mem.get(max(firstGather, g.n+n, min(2*g.n, g.limit)), must)
	if err != nil {
		return err
	}
	if g.buf != nil {
		copy(larger.b, g.buf.b[:g.n])
		g.buf.free()
	}
	g.buf = larger
	return nil
}

func (g *gather) bytes() []byte {
	if g.buf == nil {
		return nil
	}
	return g.buf.b[:g.n]
}

// free may be called again.
func (g *gather) free() {
	g.buf.free()
	g.buf, g.n = nil, 0
}

// early turns the end of the input into an unexpected one.
func early(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// peek returns the next n bytes of br without reading them away. At the end of
// the input it is io.EOF, with some of the bytes left io.ErrUnexpectedEOF.
func peek(br *bufio.Reader, n int) ([]byte, error) {
	b, err := br.Peek(n)
	if err != nil && len(b) > 0 {
		return b, early(err)
	}
	return b, err
}
