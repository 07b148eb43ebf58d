package pull

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

// lease is an unpack's hold of a worker. A worker is for decompressing: while the
// unpack waits for what others must do first, others have it. Its methods may be
// called from several goroutines, for a decompressor may read ahead.
type lease struct {
	workers *semaphore.Weighted

	mu     sync.Mutex
	wanted bool // between work and rest
	held   bool
	coming bool // somebody waits for a worker for this lease
	idlers int
}

// work waits for a worker, rest gives it back.
func (l *lease) work(ctx context.Context) error {
	l.mu.Lock()
	l.wanted = true
	l.mu.Unlock()
	return l.resume(ctx)
}

func (l *lease) rest() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wanted = false
	l.give()
}

// give is called with mu held.
func (l *lease) give() {
	if l.held {
		l.held = false
		l.workers.Release(1)
	}
}

// idle gives the worker back, if there is one, while wait runs. When there cannot
// be one again because ctx ended, that is the error.
func (l *lease) idle(ctx context.Context, wait func() error) error {
	l.mu.Lock()
	l.idlers++
	l.give()
	l.mu.Unlock()
	err := wait()
	l.mu.Lock()
	l.idlers--
	l.mu.Unlock()
	if rerr := l.resume(ctx); rerr != nil {
		return rerr
	}
	return err
}

// resume waits for a worker where there should be one: of several goroutines that
// idled, the last does.
func (l *lease) resume(ctx context.Context) error {
	l.mu.Lock()
	if !l.wanted || l.held || l.coming || l.idlers > 0 {
		l.mu.Unlock()
		return nil
	}
	l.coming = true
	l.mu.Unlock()
	err := l.workers.Acquire(ctx, 1)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.coming = false
	if err != nil {
		return context.Cause(ctx)
	}
	l.held = true
	if !l.wanted || l.idlers > 0 { // meanwhile
		l.give()
	}
	return nil
}
