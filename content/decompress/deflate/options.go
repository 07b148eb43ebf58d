package deflate

import (
	"errors"
	"runtime"
)

// ErrCorrupt says that the input is not a gzip stream, is damaged, or ends too
// early; in the last case the error is io.ErrUnexpectedEOF too.
var ErrCorrupt = errors.New("corrupt gzip stream")

// Sizes. A chunk of half a MiB holds some ten to twenty blocks of common
// writers, so that the search for the first one is a small part of the work.
const (
	firstChunk   = 128 << 10 // compressed bytes: small streams stay with one worker
	chunkSize    = 512 << 10 // compressed bytes
	minChunk     = 128 << 10 // compressed bytes, for streams that expand a lot
	chunkOutput  = 3 << 20   // bytes that a chunk should expand to
	slabSize     = 1 << 20   // bytes
	slabsPerJob  = 8         // a chunk that expands beyond waits for its turn
	chunksPerCPU = 2
	chunkExtra   = 256 << 10 // windows, tables and the joint, rounded up
)

// Sizes with one worker: all of it stays in a core's cache.
const (
	serialChunk = 128 << 10 // compressed bytes
	serialSlab  = 512 << 10 // bytes
	serialCount = 3
)

// Memory is the most that a Reader with that many workers holds, in bytes. Each
// worker has two chunks: the one it decodes and one that waits to be read.
// Each has its compressed bytes and up to 8 MiB of output. Most streams need a
// third of this. One worker decodes in the caller's goroutine, with less.
func Memory(workers int) int64 {
	if workers <= 1 {
		return 3*serialChunk + serialCount*serialSlab + chunkExtra
	}
	return int64(workers)*workerMemory + chunkSize
}

const workerMemory = chunksPerCPU * (chunkSize + slabsPerJob*slabSize + chunkExtra)

type config struct {
	workers int
	first   int
	chunk   int
	least   int
	slab    int
	slabs   int
	direct  int // the shortest stored block that is read without a segment
	grow    func(int64) bool
	shrink  func(int64)
	spare   func() bool // whether a guess is worth its costs
}

func newConfig(opts []Option) config {
	c := config{
		workers: runtime.GOMAXPROCS(0),
		first:   firstChunk, chunk: chunkSize, least: minChunk,
		slab: slabSize, slabs: slabsPerJob, direct: directLeast,
		grow: func(int64) bool { return true }, shrink: func(int64) {},
		spare: func() bool { return true },
	}
	for _, o := range opts {
		o(&c)
	}
	c.workers = max(c.workers, 1)
	if c.workers == 1 {
		c.asSerial()
	}
	return c
}

// asSerial sets what is right for one worker, where a test does not say otherwise.
func (c *config) asSerial() {
	if c.slab == slabSize {
		c.first, c.chunk, c.least, c.slab, c.slabs = serialChunk, serialChunk, serialChunk, serialSlab, serialCount
	}
}

// Option changes how a Reader works, never what it returns.
type Option func(*config)

// WithWorkers sets how many chunks are decoded at the same time; the default is
// GOMAXPROCS. With one, everything happens in the caller's goroutine.
func WithWorkers(n int) Option { return func(c *config) { c.workers = n } }

// WithMemory asks before more memory is used: grow is called with a number of
// bytes before each worker beyond the first starts, and may refuse (it will be
// asked again); shrink is called with the same number when that worker has
// ended. What a Reader uses without asking is Memory(2)/2, or Memory(1) with one
// worker. Both functions must not block, and not call the Reader.
func WithMemory(grow func(bytes int64) bool, shrink func(bytes int64)) Option {
	return func(c *config) { c.grow, c.shrink = grow, shrink }
}

// WithSpare asks before a worker guesses where a block begins further down the stream, which costs half as much again as
// decoding from a known place: worth it on a processor that has nothing else to do. While spare says no, the
// stream is decoded by one worker; it is asked again at each chunk. It must not block, and not call the Reader.
func WithSpare(spare func() bool) Option { return func(c *config) { c.spare = spare } }
