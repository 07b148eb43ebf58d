package layer

import (
	"container/list"
	"context"
	"sync"

	"github.com/opencontainers/go-digest"
)

// tableCache keeps the tables used last, up to a number of bytes in all, and
// lets concurrent callers share one scan.
type tableCache struct {
	limit int64

	mu      sync.Mutex
	bytes   int64
	recent  *list.List // of cachedTable, the last used one in front
	byID    map[digest.Digest]*list.Element
	flights map[digest.Digest]*flight
}

type cachedTable struct {
	id    digest.Digest
	table *Table
}

// flight is a scan under way. It ends when the last one who waits for it leaves.
type flight struct {
	waiters int
	cancel  context.CancelFunc
	done    chan struct{}
	table   *Table
	err     error
}

func newTableCache(limit int64) *tableCache {
	return &tableCache{
		limit:   limit,
		recent:  list.New(),
		byID:    make(map[digest.Digest]*list.Element),
		flights: make(map[digest.Digest]*flight),
	}
}

func (c *tableCache) put(id digest.Digest, t *Table) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.putLocked(id, t)
}

func (c *tableCache) putLocked(id digest.Digest, t *Table) {
	c.dropLocked(id)
	if t.cost() > c.limit {
		return
	}
	c.byID[id] = c.recent.PushFront(cachedTable{id, t})
	c.bytes += t.cost()
	for c.bytes > c.limit {
		c.dropLocked(c.recent.Back().Value.(cachedTable).id)
	}
}

// cost counts a table against the limit; an empty one is not free.
func (t *Table) cost() int64 { return t.bytes + 1<<10 }

func (c *tableCache) drop(id digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.dropLocked(id)
}

func (c *tableCache) dropLocked(id digest.Digest) {
	if e := c.byID[id]; e != nil {
		c.bytes -= e.Value.(cachedTable).table.cost()
		c.recent.Remove(e)
		delete(c.byID, id)
	}
}

// get returns the table from memory, or what build returns.
func (c *tableCache) get(ctx context.Context, id digest.Digest, build func(context.Context) (*Table, error)) (*Table, error) {
	c.mu.Lock()
	if e := c.byID[id]; e != nil {
		c.recent.MoveToFront(e)
		c.mu.Unlock()
		return e.Value.(cachedTable).table, nil
	}
	f := c.flights[id]
	if f == nil {
		f = c.start(ctx, id, build)
	}
	f.waiters++
	c.mu.Unlock()

	select {
	case <-f.done:
		return f.table, f.err
	case <-ctx.Done():
		c.leave(id, f)
		return nil, context.Cause(ctx)
	}
}

// start begins a scan that outlives the ctx of the first who asked; mu is held.
func (c *tableCache) start(ctx context.Context, id digest.Digest, build func(context.Context) (*Table, error)) *flight {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	f := &flight{cancel: cancel, done: make(chan struct{})}
	c.flights[id] = f
	go func() {
		defer cancel()
		table, err := build(ctx)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.flights[id] == f {
			delete(c.flights, id)
		}
		if f.table, f.err = table, err; err == nil {
			c.putLocked(id, table)
		}
		close(f.done)
	}()
	return f
}

func (c *tableCache) leave(id digest.Digest, f *flight) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.waiters--; f.waiters > 0 {
		return
	}
	f.cancel()
	if c.flights[id] == f {
		delete(c.flights, id) // who comes now starts afresh
	}
}
