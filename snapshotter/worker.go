package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// worker runs what must go on when the request that caused it has ended. Jobs
// about the same snapshot are one job.
type worker struct {
	submitted chan func(context.Context)
	slots     chan struct{} // bounds the jobs that hold a table of entries
	cancel    context.CancelFunc
	closing   <-chan struct{} // no job is taken any more
	stopped   chan struct{}   // and none runs

	mu      sync.Mutex
	running map[string]*job
}

// job is one run for one snapshot. err is set before done is closed.
type job struct {
	done chan struct{}
	err  error
}

func newWorker(ctx context.Context) *worker {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	w := &worker{
		submitted: make(chan func(context.Context)),
		slots:     make(chan struct{}, 2*runtime.GOMAXPROCS(0)),
		cancel:    cancel,
		closing:   ctx.Done(),
		stopped:   make(chan struct{}),
		running:   map[string]*job{},
	}
	go w.dispatch(ctx)
	return w
}

// dispatch never waits for a job, so neither does submit.
func (w *worker) dispatch(ctx context.Context) {
	var running sync.WaitGroup
	defer close(w.stopped)
	defer running.Wait()
	for {
		select {
		case <-ctx.Done():
			return
		case f := <-w.submitted:
			running.Go(func() { f(ctx) })
		}
	}
}

// stop cancels all jobs and waits for them.
func (w *worker) stop() {
	w.cancel()
	<-w.stopped
}

func (w *worker) submit(f func(context.Context)) error {
	select {
	case w.submitted <- f:
		return nil
	case <-w.closing:
		return fmt.Errorf("the snapshotter is closed: %w", errdefs.ErrUnavailable)
	}
}

// once starts f for id, or joins the run under way.
func (w *worker) once(id string, f func(context.Context) error) *job {
	w.mu.Lock()
	defer w.mu.Unlock()
	if j := w.running[id]; j != nil {
		return j
	}
	j := &job{done: make(chan struct{})}
	finish := func(err error) {
		j.err = err
		close(j.done)
	}
	err := w.submit(func(ctx context.Context) {
		err := f(ctx)
		if err != nil && ctx.Err() == nil {
			log.G(ctx).WithError(err).WithField("snapshot", id).Error("snapshotter: cannot make the layer visible")
		}
		w.mu.Lock()
		delete(w.running, id)
		w.mu.Unlock()
		finish(err)
	})
	if err != nil {
		finish(err)
		return j
	}
	w.running[id] = j
	return j
}

// slot waits for one of the places that bound memory.
func (w *worker) slot(ctx context.Context) (release func(), err error) {
	select {
	case w.slots <- struct{}{}:
		return func() { <-w.slots }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (w *worker) busy() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.running)
}

func waitAll(ctx context.Context, jobs []*job) error {
	var errs []error
	for _, j := range jobs {
		select {
		case <-j.done:
			errs = append(errs, j.err)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return errors.Join(errs...)
}

// keyLocks holds one lock for each snapshot that is being changed on disk.
type keyLocks struct {
	mu   sync.Mutex
	held map[string]*keyLock
}

type keyLock struct {
	token chan struct{} // full while locked
	users int           // holder and waiters
}

func (k *keyLocks) enter(id string) *keyLock {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.held == nil {
		k.held = map[string]*keyLock{}
	}
	l := k.held[id]
	if l == nil {
		l = &keyLock{token: make(chan struct{}, 1)}
		k.held[id] = l
	}
	l.users++
	return l
}

func (k *keyLocks) leave(id string, l *keyLock) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if l.users--; l.users == 0 {
		delete(k.held, id)
	}
}

// lock waits for the lock of id.
func (k *keyLocks) lock(ctx context.Context, id string) (unlock func(), err error) {
	l := k.enter(id)
	select {
	case l.token <- struct{}{}:
		return func() { <-l.token; k.leave(id, l) }, nil
	case <-ctx.Done():
		k.leave(id, l)
		return nil, context.Cause(ctx)
	}
}

// tryLock never waits.
func (k *keyLocks) tryLock(id string) (unlock func(), ok bool) {
	l := k.enter(id)
	select {
	case l.token <- struct{}{}:
		return func() { <-l.token; k.leave(id, l) }, true
	default:
		k.leave(id, l)
		return nil, false
	}
}
