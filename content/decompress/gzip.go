package decompress

import (
	"bufio"
	"io"

	"github.com/gantryd/gantry/content/decompress/deflate"
)

// gzipDecoder has package deflate decode, on as many workers as there is memory
// for. Unlike the other formats it reads the source from goroutines of its own.
type gzipDecoder struct {
	r   *deflate.Reader
	mem *memory
}

func newGzipDecoder(in io.Reader, mem *memory, workers int) (*gzipDecoder, error) {
	// With a second worker deflate takes this much without asking; alone it needs
	// less than a reader's minimum. Memory that is not there now is not waited for.
	if workers > 1 && !mem.more(deflate.Memory(2)/2-baseBlocks) {
		workers = 1
	}
	r, err := deflate.NewReader(in, deflate.WithWorkers(workers), deflate.WithMemory(mem.lend, mem.restore), deflate.WithSpare(spare))
	if err != nil {
		return nil, err
	}
	return &gzipDecoder{r: r, mem: mem}, nil
}

func (g *gzipDecoder) next() (block, error) {
	data, release, err := g.r.Next()
	if err != nil {
		return block{}, err
	}
	g.mem.count(len(data)) // so that what is about after Close is paid for
	return block{data: data, release: func() {
		n := len(data)
		release()
		g.mem.count(-n)
	}}, nil
}

func (g *gzipDecoder) close() { _ = g.r.Close() }

// unbuffered reads what br holds of src, and then src itself: deflate asks for as
// much as it has room for, which need not be copied.
type unbuffered struct {
	br  *bufio.Reader
	src io.Reader
}

func (u *unbuffered) Read(p []byte) (int, error) {
	if u.br.Buffered() > 0 {
		return u.br.Read(p)
	}
	return u.src.Read(p)
}
