package layer

import (
	"io"
	"sync"
)

// Blocks is a stream that hands out its own buffers, which spares a copy. The
// reader that is given to Write may implement it.
type Blocks interface {
	// Next returns the next bytes of the stream, at least one, of any length and
	// alignment; io.EOF ends the stream. They stay valid and unchanged until
	// release is called, which Write does exactly once, from any goroutine, also
	// when it fails. Next may wait until earlier blocks are released: Write does so
	// without another Next.
	Next() (data []byte, release func(), err error)
}

const (
	chunkSize = 1 << 20
	// chunksPerWrite bounds the memory of one Write of a plain io.Reader, in
	// chunks. With one more than the steps may hold, reading never waits for them.
	chunksPerWrite = ahead/chunkSize + 1
	// maxEmptyReads is how often a Read may return nothing before it is given up.
	maxEmptyReads = 100
)

var chunkPool = sync.Pool{New: func() any { return new([chunkSize]byte) }}

// readerBlocks are the blocks of a plain io.Reader.
type readerBlocks struct {
	r     io.Reader
	ended func() error // why there is no point in reading on
	free  chan *[chunkSize]byte
	made  int
	err   error // what the last Read returned beside its bytes
}

func newReaderBlocks(r io.Reader, ended func() error) *readerBlocks {
	return &readerBlocks{r: r, ended: ended, free: make(chan *[chunkSize]byte, chunksPerWrite)}
}

// Next implements Blocks.
func (b *readerBlocks) Next() ([]byte, func(), error) {
	if b.err != nil {
		return nil, nil, b.err
	}
	buf := b.buffer()
	n, err := b.fill(buf[:])
	if b.err = err; n == 0 {
		b.free <- buf
		return nil, nil, err
	}
	return buf[:n], func() { b.free <- buf }, nil // has room for all buffers there are
}

func (b *readerBlocks) buffer() *[chunkSize]byte {
	select {
	case buf := <-b.free:
		return buf
	default:
	}
	if b.made < chunksPerWrite {
		b.made++
		return chunkPool.Get().(*[chunkSize]byte)
	}
	return <-b.free
}

// fill reads until buf is full, so that all blocks but the last have its size.
func (b *readerBlocks) fill(buf []byte) (n int, err error) {
	empty := 0
	for n < len(buf) && err == nil {
		if err := b.ended(); err != nil {
			return n, err
		}
		var m int
		m, err = b.r.Read(buf[n:])
		n += m
		if m > 0 {
			empty = 0
		} else if empty++; empty == maxEmptyReads && err == nil {
			err = io.ErrNoProgress
		}
	}
	return n, err
}

// close gives the buffers back, when all blocks are released.
func (b *readerBlocks) close() {
	for range b.made {
		chunkPool.Put(<-b.free)
	}
}
