package decompress

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/klauspost/compress/zstd"
)

const (
	// maxAhead is how long a frame may be, and how much it may hold, to be decoded
	// as a whole on a worker. pzstd writes 8 MiB at its default level.
	maxAhead = 32 << 20
	// batchFrames bounds how many frames a job has.
	batchFrames = 4096
	// smallWindow is what a decoder may keep between frames: two windows of 8 MiB, the largest that zstd uses
	// without --ultra or --long, and a block. To allocate that again for each frame of 4 MiB took a third of the time.
	smallWindow = 2*(8<<20) + zstdBlock
	// largeWindow is from where on what a decoder kept is collected before others may have as much.
	largeWindow = 64 << 20
)

// zstdPlanner decodes small frames whole, on workers and several at once, and
// large ones as a stream. Whether a frame is small is known from its header, or
// guessed from the one before it: the first of unknown size is a stream, so that
// a layer of a single frame is never held back.
type zstdPlanner struct {
	br      *bufio.Reader
	mem     *memory
	workers int
	whole   *zstd.Decoder // decodes small frames; nil until there is one
	small   bool          // the last frame of unknown size was small

	gathered int // bytes of the last job

	batch  *zstdBatch // gathered, waiting for memory
	stream zstdStream
	err    error // met behind frames that are a job already
}

func newZstdPlanner(br *bufio.Reader, mem *memory, workers int) *zstdPlanner {
	return &zstdPlanner{br: br, mem: mem, workers: workers, stream: zstdStream{mem: mem}}
}

func (z *zstdPlanner) close() {
	if z.batch != nil {
		z.batch.in.free()
	}
	z.stream.close()
	if z.whole != nil {
		z.whole.Close()
	}
}

func (z *zstdPlanner) plan(must bool) (*job, error) {
	if z.batch != nil {
		return z.dispatch(must)
	}
	if z.stream.tail != nil {
		if !must {
			return nil, errBusy
		}
		return z.streamed()
	}
	if z.err != nil {
		return nil, z.err
	}
	if err := z.skip(); err != nil {
		return nil, err
	}
	f, err := peekZstdFrame(z.br)
	if err != nil {
		return nil, err
	}
	if z.ahead(f) {
		return z.gather(f, must)
	}
	if !must {
		return nil, errBusy
	}
	if err := z.stream.open(zstdTail{frame: f, br: z.br}, f.window); err != nil {
		return nil, err
	}
	return z.streamed()
}

// skip reads away skippable frames: tables of contents (zstd:chunked, the
// seekable format) and frame lengths (pzstd). io.EOF is the stream's end.
func (z *zstdPlanner) skip() error {
	for {
		head, err := peek(z.br, 8)
		if len(head) == 0 {
			return err
		}
		if len(head) < 8 {
			if format, skip := identify(head); skip || format != Zstd && len(head) < 4 {
				return early(err)
			}
		}
		format, skip := identify(head)
		switch {
		case skip:
			if err := skipFrame(z.br, head); err != nil {
				return err
			}
		case format != Zstd:
			return zstd.ErrMagicMismatch
		default:
			return nil
		}
	}
}

// ahead says whether to decode the frame as a whole. Without workers only small
// frames are: larger ones are faster as a stream, whose window stays in the cache.
func (z *zstdPlanner) ahead(f *zstdFrame) bool {
	if f.known {
		return f.size <= z.most()
	}
	return z.small
}

// most is how much a frame may hold, and how long it may be, to be decoded as a whole.
func (z *zstdPlanner) most() int64 {
	if z.workers == 1 {
		return blockSize
	}
	return maxAhead
}

// zstdBatch is some frames that are gathered.
type zstdBatch struct {
	in     gather
	ends   []int // of the frames in the gathered bytes
	bound  int64 // what the frames hold at most
	window int64 // the largest
}

// gather reads frames until they are worth a job. A frame that turns out to be
// large, or for which there is no memory, becomes a stream.
func (z *zstdPlanner) gather(f *zstdFrame, must bool) (*job, error) {
	b := &zstdBatch{in: gather{limit: maxAhead}}
	first, err := z.input(must)
	if err != nil {
		return nil, err
	}
	b.in.buf, z.batch = first, b
	for {
		start := b.in.n
		err = f.gather(z.br, &b.in, z.mem, z.most())
		z.small = z.small && err == nil
		if err != nil {
			return z.leave(f, start, err, must)
		}
		b.ends = append(b.ends, b.in.n)
		b.bound += f.bound()
		b.window = max(b.window, f.window)
		if f = z.another(); f == nil {
			return z.dispatch(must)
		}
	}
}

// input returns a buffer to gather in: where there is memory, one that takes as
// much as the last job had, so that it need not be copied as it grows.
func (z *zstdPlanner) input(must bool) (*buffer, error) {
	if z.gathered > 4*firstGather {
		if buf := z.mem.try(z.gathered + z.gathered/8); buf != nil {
			return buf, nil
		}
	}
	return z.mem.get(4*firstGather, must)
}

// another returns the header of a frame that fits into the batch, if that can be
// told without waiting for input.
func (z *zstdPlanner) another() *zstdFrame {
	b := z.batch
	if b.bound >= blockSize || b.in.n >= blockSize || len(b.ends) == batchFrames || z.br.Buffered() < zstd.HeaderMaxSize {
		return nil
	}
	head, _ := z.br.Peek(4) // is buffered
	if format, skip := identify(head); skip || format != Zstd {
		return nil
	}
	f, err := peekZstdFrame(z.br)
	if err != nil || !z.ahead(f) || f.known && b.bound+f.size > 2*blockSize {
		return nil
	}
	return f
}

// leave ends the batch before a frame that could not be gathered, for err.
func (z *zstdPlanner) leave(f *zstdFrame, start int, err error, must bool) (*job, error) {
	b := z.batch
	if errors.Is(err, errBusy) {
		gathered := b.in.bytes()[start:]
		held := b.in.buf.hold()
		if err = z.stream.open(zstdTail{gathered: gathered, frame: f, br: z.br}, f.window); err != nil {
			held.free()
		} else {
			z.stream.held = held
		}
	}
	z.err = err
	if b.in.n = start; len(b.ends) > 0 {
		return z.dispatch(must)
	}
	b.in.free()
	z.batch = nil
	return z.plan(must)
}

// dispatch makes a job of the batch. Where there is no memory for its output,
// the frames are a stream.
func (z *zstdPlanner) dispatch(must bool) (*job, error) {
	b := z.batch
	size := b.bound + zstdRoom
	// What is gathered is held until then: a wait must be for others' buffers only.
	out, err := z.mem.get(int(size), must && z.mem.room(int(size), b.in.buf))
	if errors.Is(err, errBusy) && must && z.stream.tail == nil {
		z.batch = nil
		if err := z.stream.open(zstdTail{gathered: b.in.bytes(), frame: &zstdFrame{last: true}, br: z.br}, b.window); err != nil {
			b.in.free()
			return nil, err
		}
		z.stream.held = b.in.buf
		return z.streamed()
	}
	if err != nil {
		return nil, err
	}
	z.batch, z.gathered = nil, b.in.n
	if err := z.prepare(); err != nil {
		out.free()
		b.in.free()
		return nil, err
	}
	return &job{in: b.in.buf, out: out, run: b.run(z.whole)}, nil
}

func (z *zstdPlanner) prepare() (err error) {
	if z.whole == nil {
		z.whole, err = zstd.NewReader(nil,
			zstd.WithDecoderConcurrency(z.workers),
			zstd.WithDecoderMaxWindow(MaxWindow),
			zstd.WithDecoderMaxMemory(MaxWindow),
		)
	}
	return err
}

// run decodes frame by frame, in place: a frame holds no more than its block
// headers, or its own, say, and for that there is room. The library's
// WithDecodeAllCapLimit would bound it too, but where a frame does not tell its
// size it has every match copied byte-exactly, which takes a fifth longer.
func (b *zstdBatch) run(dec *zstd.Decoder) func(*job) (int, error) {
	return func(j *job) (n int, err error) {
		start := 0
		for _, end := range b.ends {
			out := j.out.b[n:]
			got, err := dec.DecodeAll(j.in.b[start:end], out[:0])
			if len(got) > len(out) || len(got) > 0 && &got[0] != &out[0] {
				return n, errZstdMoved
			}
			n += len(got)
			if err != nil {
				return n, err
			}
			start = end
		}
		return n, nil
	}
}

// streamed returns the next output of the stream.
func (z *zstdPlanner) streamed() (*job, error) {
	j, frame, err := z.stream.next()
	if frame != nil && !frame.known {
		z.small = frame.most <= z.most()
	}
	if err != nil {
		return nil, err
	}
	return j, nil
}

// zstdStream decodes frames as they come, in the caller's goroutine: measured
// faster as a stream than the library's pipeline. The library's low-memory mode
// moves the whole window for every MiB of output, 1.06 GB/s instead of 1.62 here,
// for 10 MB instead of 17. It stays off, so that a window takes twice its size.
type zstdStream struct {
	mem    *memory
	dec    *zstd.Decoder
	window grant // for what dec keeps
	tail   *zstdTail
	held   *buffer // what tail's gathered bytes lie in
}

// open starts a stream of frames that need no more than the given window.
func (s *zstdStream) open(t zstdTail, window int64) (err error) {
	if need := 2*window + zstdBlock; s.dec == nil || need > s.window.bytes {
		s.shut()
		if s.window, err = s.mem.window(need); err != nil {
			return err
		}
		if s.dec, err = zstd.NewReader(nil,
			zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderLowmem(false),
			zstd.WithDecoderMaxWindow(MaxWindow),
			zstd.WithDecoderMaxMemory(MaxWindow),
			zstd.WithDecodeBuffersBelow(0),
		); err != nil {
			return err
		}
	}
	s.tail = &t
	return s.dec.Reset(s.tail)
}

// next returns the next output, with the frame if it ends there.
func (s *zstdStream) next() (*job, *zstdFrame, error) {
	out, err := s.mem.take(blockSize)
	if err != nil {
		return nil, nil, err
	}
	n, err := s.dec.Read(out.b)
	j := finished(out, out.b[:n], nil)
	if err == nil {
		return j, nil, nil
	}
	frame := s.tail.frame
	if !errors.Is(err, io.EOF) || s.tail.err != nil {
		j.err = err
		if s.tail.err != nil {
			j.err = s.tail.err
		}
		return j, nil, nil
	}
	if len(s.tail.gathered) > 0 || frame.left > 0 || !frame.last {
		j.err = fmt.Errorf("%w: the decoder stopped before the frame's end", errZstdBlock)
	}
	s.end()
	return j, frame, nil
}

// end gives back what the stream does not need between frames.
func (s *zstdStream) end() {
	s.tail = nil
	s.held.free()
	s.held = nil
	if s.window.bytes > smallWindow {
		s.shut()
	}
}

func (s *zstdStream) shut() {
	if s.dec != nil {
		s.dec.Close()
		s.dec = nil
		if s.window.bytes > largeWindow {
			// The next holder allocates as much at once, and the collector lets that happen before it finds that
			// this is garbage: eight layers with windows of 128 MiB took 900 MiB. It would have to run anyway.
			runtime.GC()
		}
	}
	s.window.release()
	s.window = grant{}
}

func (s *zstdStream) close() {
	s.end()
	s.shut()
}
