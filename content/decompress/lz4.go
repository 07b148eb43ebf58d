package decompress

import (
	"bufio"
	"fmt"
	"io"

	"github.com/pierrec/lz4/v4"
)

// lz4Planner reads frames one after the other. Independent blocks are decoded on
// workers, linked ones in order. The library's own parallel reader is not used:
// it leaves goroutines behind when a stream is given up halfway.
type lz4Planner struct {
	br     *bufio.Reader
	mem    *memory
	frame  *lz4Frame // nil between frames
	linked linked
	err    error // met behind blocks that are a job already
}

func newLZ4Planner(br *bufio.Reader, mem *memory) *lz4Planner {
	return &lz4Planner{br: br, mem: mem, linked: linked{mem: mem}}
}

func (l *lz4Planner) close() { l.linked.forget() }

func (l *lz4Planner) plan(must bool) (*job, error) {
	if l.err != nil {
		return nil, l.err
	}
	for l.frame == nil {
		if err := l.open(must); err != nil {
			return nil, err
		}
	}
	if h, err := l.frame.peekBlock(l.br); err != nil {
		return nil, err
	} else if h.end {
		check, err := l.frame.end(l.br, h)
		l.frame = nil
		return finished(nil, nil, check), err
	}
	if l.frame.linked {
		if !must {
			return nil, errBusy
		}
		return l.serial()
	}
	return l.batch(must)
}

// open reads a frame's header, or skips a skippable frame. io.EOF says that
// there is no more.
func (l *lz4Planner) open(must bool) error {
	head, err := peek(l.br, 8)
	if len(head) == 0 {
		return err
	}
	if len(head) < 4 {
		return early(err)
	}
	switch format, skip := identify(head); {
	case skip && len(head) < 8:
		return early(err)
	case skip:
		return skipFrame(l.br, head)
	case format != LZ4:
		return fmt.Errorf("%w: % x where a frame should begin", errLZ4Header, head[:4])
	}
	frame, length, err := peekLZ4Frame(l.br)
	if err != nil {
		return err
	}
	if need := frame.need(); need > baseBlocks {
		if !must {
			return errBusy
		}
		l.linked.forget() // widen waits for all buffers
		if err := l.mem.widen(need); err != nil {
			return err
		}
	}
	l.linked.forget()
	l.frame = frame
	_, err = l.br.Discard(length)
	return err
}

// need is how much memory the frame's blocks take: one as it is read and two of output.
func (f *lz4Frame) need() int64 {
	if f.linked {
		return 4 * int64(f.blockMax) // the block's buffer grows, the output's has history
	}
	_, in := classOf(max(blockSize, f.longest()))
	_, out := classOf(max(blockSize, f.blockMax))
	return int64(in + 2*out)
}

// lz4Batch is some independent blocks.
type lz4Batch struct {
	frame  *lz4Frame
	blocks []lz4Part
	end    int // of the last block in the input buffer
	bound  int // how much the blocks hold at most
}

type lz4Part struct {
	start, end int
	most       int // it holds, in bytes
	stored     bool
	sum        uint32
}

// lz4Blocks bounds how many blocks a job has: empty ones fill no buffer.
const lz4Blocks = 4096

// most is how much a block of the frame holds at most: a byte of an LZ4 block
// stands for 255 bytes at the best.
func (f *lz4Frame) most(h lz4Head) int {
	if h.stored {
		return h.size
	}
	return min(f.blockMax, 255*h.size)
}

func (l *lz4Planner) batch(must bool) (*job, error) {
	in, err := l.mem.get(max(blockSize, l.frame.longest()), must)
	if err != nil {
		return nil, err
	}
	out, err := l.mem.get(max(blockSize, l.frame.blockMax), must)
	if err != nil {
		in.free()
		return nil, err
	}
	b := &lz4Batch{frame: l.frame}
	j := &job{in: in, out: out, run: b.run, settle: l.frame.settle}
	for len(b.blocks) < lz4Blocks && !pause(l.br, b.bound) {
		more := false
		if more, err = b.read(l.br, in.b, len(out.b)); !more || err != nil {
			break
		}
	}
	if len(b.blocks) == 0 {
		j.free()
		return nil, err
	}
	l.err = err
	return j, nil
}

// read adds the next block, if there is one and a place for it and for its output.
func (b *lz4Batch) read(br *bufio.Reader, in []byte, out int) (bool, error) {
	h, err := b.frame.peekBlock(br)
	if err != nil || h.end || b.end+h.size > len(in) || b.bound+b.frame.most(h) > out {
		return false, err
	}
	if _, err := br.Discard(4); err != nil {
		return false, err
	}
	p := lz4Part{start: b.end, end: b.end + h.size, most: b.frame.most(h), stored: h.stored}
	if _, err := io.ReadFull(br, in[p.start:p.end]); err != nil {
		return false, early(err)
	}
	if b.frame.blockSums {
		if p.sum, err = readSum(br); err != nil {
			return false, err
		}
	}
	b.blocks, b.end, b.bound = append(b.blocks, p), p.end, b.bound+p.most
	return true, nil
}

// run decodes the blocks into one another's wake: any may be shorter than it could.
func (b *lz4Batch) run(j *job) (n int, err error) {
	for _, p := range b.blocks {
		block := j.in.b[p.start:p.end]
		if b.frame.blockSums {
			if err := checkBlock(block, p.sum); err != nil {
				return n, err
			}
		}
		if p.stored {
			n += copy(j.out.b[n:], block)
			continue
		}
		got, err := lz4.UncompressBlock(block, j.out.b[n:n+p.most])
		if err != nil {
			return n, fmt.Errorf("%w: %w", errLZ4Block, err)
		}
		n += got
	}
	return n, nil
}

func checkBlock(block []byte, want uint32) error {
	if got := xxh32Of(block); got != want {
		return fmt.Errorf("%w: block has %08x, announced was %08x", errLZ4Checksum, got, want)
	}
	return nil
}

// serial decodes linked blocks, as many as fill a buffer.
func (l *lz4Planner) serial() (*job, error) {
	most := l.frame.blockMax
	f, err := l.linked.begin(max(blockSize, most))
	if err != nil {
		return nil, err
	}
	for err == nil && f.room() >= most && !pause(l.br, f.output()) {
		var h lz4Head
		if h, err = l.frame.peekBlock(l.br); err != nil || h.end {
			break
		}
		if _, err = l.br.Discard(4); err == nil {
			err = l.block(&f, h)
		}
	}
	return l.linked.finish(f, l.frame.settle, err)
}

func (l *lz4Planner) block(f *filling, h lz4Head) error {
	block, err := l.linked.read(l.br, h.size)
	if err != nil {
		return err
	}
	if l.frame.blockSums {
		if err := blockSum(l.br, block); err != nil {
			return err
		}
	}
	if h.stored {
		f.end += copy(f.buf.b[f.end:], block)
		return nil
	}
	_, err = l.linked.decode(f, block, l.frame.blockMax)
	return err
}
