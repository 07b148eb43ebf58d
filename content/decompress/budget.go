package decompress

import (
	"context"
	"fmt"
	"sync/atomic"

	"golang.org/x/sync/semaphore"
)

// DefaultBudget is how many bytes a Reader without [WithBudget] may hold, and a
// good size for a Budget that some readers share: half of it takes the largest
// zstd window that is accepted.
const DefaultBudget = 4 * MaxWindow

// Budget bounds the memory of all readers that share it. It is made of two
// parts, so that no reader can wait for another that waits for it:
//
//   - from the first, every reader takes its working minimum in one step,
//     before it starts, while it holds nothing. What it takes beyond the
//     minimum, for workers and for reading ahead, it takes only if nobody waits.
//   - the second is a lane for large windows and blocks. Its holders wait for
//     nothing more of the budget, and whoever waits for it holds none of it.
//
// So each holder comes to its end by itself, provided that those who read give
// back their blocks (see [Reader.Next]) and sources end. Who waits is served in
// order, and no longer than its context lasts.
type Budget struct {
	common, lane part
}

// part is one of the two parts.
type part struct {
	sem  *semaphore.Weighted
	size int64
	held atomic.Int64
}

// NewBudget returns a Budget of that many bytes. A demand that is larger than
// its part of the budget is met when it can have the whole part.
func NewBudget(bytes int64) *Budget {
	b := &Budget{}
	lane := max(1, min(bytes/2, 2*MaxWindow))
	b.lane.init(lane)
	b.common.init(max(1, bytes-lane))
	return b
}

// Held returns how many bytes are taken now.
func (b *Budget) Held() int64 { return b.common.held.Load() + b.lane.held.Load() }

func (p *part) init(size int64) { p.sem, p.size = semaphore.NewWeighted(size), size }

// grant is what was taken of a part.
type grant struct {
	part  *part
	bytes int64
}

func (p *part) wait(ctx context.Context, bytes int64) (grant, error) {
	g := grant{p, min(bytes, p.size)}
	if err := p.sem.Acquire(ctx, g.bytes); err != nil {
		return grant{}, fmt.Errorf("waiting for memory to decompress: %w", context.Cause(ctx))
	}
	p.held.Add(g.bytes)
	return g, nil
}

// take waits, by idle, if it has to.
func (p *part) take(ctx context.Context, bytes int64, idle idleFunc) (g grant, err error) {
	if g, ok := p.try(min(bytes, p.size)); ok {
		return g, nil
	}
	err = idle(ctx, func() (err error) {
		g, err = p.wait(ctx, bytes)
		return err
	})
	if err != nil {
		g.release()
		return grant{}, err
	}
	return g, nil
}

// try never goes in front of those who wait.
func (p *part) try(bytes int64) (grant, bool) {
	if !p.sem.TryAcquire(bytes) {
		return grant{}, false
	}
	p.held.Add(bytes)
	return grant{p, bytes}, true
}

// release may be called on the zero grant.
func (g grant) release() {
	if g.bytes > 0 {
		g.part.held.Add(-g.bytes)
		g.part.sem.Release(g.bytes)
	}
}

// wide takes bytes for a large window or block. The caller holds no such grant.
// A wait is run by idle.
func (b *Budget) wide(ctx context.Context, bytes int64, idle idleFunc) (grant, error) {
	if g, ok := b.common.try(bytes); ok {
		return g, nil
	}
	return b.lane.take(ctx, bytes, idle)
}

// idleFunc runs wait and returns its error, if there is no other.
type idleFunc = func(ctx context.Context, wait func() error) error

func idleHere(_ context.Context, wait func() error) error { return wait() }
