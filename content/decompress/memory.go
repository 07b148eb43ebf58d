package decompress

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
)

const (
	// blockSize is how much output is made at once where nothing asks for more.
	blockSize = 1 << 20
	// baseBlocks is what each reader may have in buffers at any time, in bytes.
	baseBlocks = 4 * blockSize
	// overhead is for what a reader has beside buffers: input, tables.
	overhead = 1 << 20
)

// memory is what one reader holds of a budget. Only the reader's goroutine waits.
type memory struct {
	budget *Budget
	with   func(func(context.Context) error) error // lends the reader's context
	idle   idleFunc
	base   grant
	freed  chan struct{} // a token when something came back
	err    error         // what ended a wait; read by the reader's goroutine only

	mu      sync.Mutex
	wide    grant // what widen took
	reserve int64 // bytes of buffers that need no further grant
	used    int64 // of reserve
	closed  bool
}

// newMemory takes a reader's minimum. The context is bound in a closure, as it
// is that of one operation: the reading of this stream.
func newMemory(ctx context.Context, b *Budget, idle idleFunc) (*memory, error) {
	base, err := b.common.take(ctx, overhead+baseBlocks, idle)
	if err != nil {
		return nil, err
	}
	return &memory{
		budget: b, idle: idle, base: base, reserve: baseBlocks, freed: make(chan struct{}, 1),
		with: func(f func(context.Context) error) error { return f(ctx) },
	}, nil
}

// buffer is memory of a reader, given back when its last holder frees it.
type buffer struct {
	b     []byte
	class int
	refs  atomic.Int32
	mem   *memory
	extra grant // zero if the reader's reserve pays
}

// hold counts one more holder in.
func (b *buffer) hold() *buffer {
	b.refs.Add(1)
	return b
}

// free may be called on nil.
func (b *buffer) free() {
	if b != nil && b.refs.Add(-1) == 0 {
		b.mem.give(b)
	}
}

// pools keep buffers by their class. What lies there belongs to no budget, and
// to the garbage collector as soon as it wants it.
var pools [4 * 32]sync.Pool

// classOf rounds a size up to the next of four steps per power of two.
func classOf(size int) (class, rounded int) {
	const smallest = 64 << 10
	n := max(size, smallest) - 1
	shift := bits.Len(uint(n)) - 3
	step := n>>shift + 1 // 5 to 8
	return 4*shift + step - 5, step << shift
}

// try returns a buffer of at least that size, nil if that takes waiting.
func (m *memory) try(size int) *buffer {
	class, rounded := classOf(size)
	n := int64(rounded)
	var extra grant
	m.mu.Lock()
	fits := m.used+n <= m.reserve
	if fits {
		m.used += n
	}
	m.mu.Unlock()
	if !fits {
		var ok bool
		if extra, ok = m.budget.common.try(n); !ok {
			return nil
		}
	}
	b, ok := pools[class].Get().(*buffer)
	if !ok {
		b = &buffer{b: make([]byte, rounded), class: class}
	}
	b.mem, b.extra = m, extra
	b.refs.Store(1)
	return b
}

// take returns a buffer of at least that size, and waits for others to be freed
// if need be. So the caller must not hold more than the rest of the reserve itself.
func (m *memory) take(size int) (*buffer, error) {
	for {
		if b := m.try(size); b != nil {
			return b, nil
		}
		if _, n := classOf(size); int64(n) > m.reserve {
			return nil, m.fail(fmt.Errorf("a buffer of %d bytes where %d are reserved: %w", n, m.reserve, errors.ErrUnsupported))
		}
		if err := m.await(); err != nil {
			return nil, err
		}
	}
}

// get is take for those who must, and try for the others.
func (m *memory) get(size int, must bool) (*buffer, error) {
	if must {
		return m.take(size)
	}
	if b := m.try(size); b != nil {
		return b, nil
	}
	return nil, errBusy
}

// room says whether a buffer of at least that size can be waited for by who keeps held.
func (m *memory) room(size int, held *buffer) bool {
	_, n := classOf(size)
	if held.extra.bytes == 0 {
		n += len(held.b)
	}
	return int64(n) <= m.reserve
}

func (m *memory) await() error {
	return m.fail(m.with(func(ctx context.Context) error {
		select {
		case <-m.freed:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for blocks to be released: %w", context.Cause(ctx))
		}
	}))
}

func (m *memory) fail(err error) error {
	if err != nil {
		m.err = err
	}
	return err
}

func (m *memory) give(b *buffer) {
	extra := b.extra
	_, n := classOf(len(b.b))
	b.mem, b.extra = nil, grant{}
	pools[b.class].Put(b)
	extra.release()
	m.mu.Lock()
	if extra.bytes == 0 {
		m.used -= int64(n)
	}
	m.settle()
	m.mu.Unlock()
	select {
	case m.freed <- struct{}{}:
	default:
	}
}

// window takes bytes for one window. The caller holds no other.
func (m *memory) window(bytes int64) (g grant, err error) {
	err = m.with(func(ctx context.Context) error {
		g, err = m.budget.wide(ctx, bytes, m.idle)
		return err
	})
	return g, m.fail(err)
}

// more adds to what the reader holds until it is closed, if that needs no waiting.
func (m *memory) more(bytes int64) bool {
	g, ok := m.budget.common.try(bytes)
	if !ok {
		g, ok = m.budget.lane.try(bytes)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wide = g
	return ok
}

// lend and restore are for a decoder that keeps its own buffers.
func (m *memory) lend(bytes int64) bool {
	_, ok := m.budget.common.try(bytes)
	return ok
}

func (m *memory) restore(bytes int64) { grant{&m.budget.common, bytes}.release() }

// count takes note of output in such buffers, handed out or, if negative, given back.
func (m *memory) count(n int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used += int64(n)
	m.settle()
}

// widen makes the reserve large enough for blocks of unusual size. The caller
// holds no buffers; it waits for those that others hold.
func (m *memory) widen(bytes int64) error {
	if bytes <= m.reserve {
		return nil
	}
	for m.inUse() > 0 {
		if err := m.await(); err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.wide.release()
	m.wide, m.reserve = grant{}, baseBlocks
	m.mu.Unlock()
	g, err := m.window(bytes - baseBlocks)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.wide, m.reserve = g, bytes
	m.mu.Unlock()
	return nil
}

func (m *memory) inUse() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

// close gives everything back, as soon as the last buffer is freed.
func (m *memory) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	m.settle()
}

// settle is called with mu held.
func (m *memory) settle() {
	if m.closed && m.used == 0 {
		m.wide.release()
		m.base.release()
		m.wide, m.base = grant{}, grant{}
	}
}
