package decompress

import (
	"errors"
	"sync"
	"sync/atomic"
)

// errBusy is a planner's answer when it needs everything to be handed out first,
// or more memory than there is.
var errBusy = errors.New("not now")

// planner reads the input of one format and cuts it into jobs. It runs on the
// goroutine that reads the stream.
type planner interface {
	// plan returns the next job, or what ends the stream; io.EOF if all is well.
	// It may return errBusy unless must is set, which says that no job is pending.
	plan(must bool) (*job, error)
	// close frees what the planner holds. No job runs any more.
	close()
}

// job is a piece of the stream, decoded on its own.
type job struct {
	in, out *buffer
	// run decodes in to out on a worker and returns how much that is; nil if it is done already.
	run  func(*job) (int, error)
	data []byte // what of out was decoded
	err  error  // what came behind data
	// settle sees the data in the stream's order, on the reader's goroutine.
	settle func([]byte) error
	done   chan struct{}
}

// finished returns a job that needs no worker. It owns out.
func finished(out *buffer, data []byte, settle func([]byte) error) *job {
	return &job{out: out, data: data, settle: settle}
}

func (j *job) work() {
	defer close(j.done)
	n, err := j.run(j)
	j.data, j.err = j.out.b[:n], err
	j.in.free()
	j.in = nil
}

// wait returns when the job is done.
func (j *job) wait() {
	if j.done != nil {
		<-j.done
	}
}

// ready says whether wait returns at once.
func (j *job) ready() bool {
	if j.done == nil {
		return true
	}
	select {
	case <-j.done:
		return true
	default:
		return false
	}
}

func (j *job) free() {
	j.in.free()
	j.out.free()
	j.in, j.out = nil, nil
}

// ahead has jobs done by workers and returns their output in order. The input
// is read by the caller of next alone, and never while there is output to
// return; the workers only compute. So close does not depend on the source.
type ahead struct {
	planner planner
	workers int
	jobs    []*job // in order, not handed out
	current *job   // being handed out
	err     error  // what comes when the jobs are handed out

	work    chan *job
	started int
	running sync.WaitGroup
	given   atomic.Bool // the stream is given up
}

func newAhead(p planner, workers int) *ahead {
	return &ahead{planner: p, workers: workers, work: make(chan *job, 2*workers)}
}

// next returns the next block, and what ends the stream when there is none.
func (a *ahead) next() (block, error) {
	for {
		if b, ok := a.piece(); ok {
			return b, nil
		}
		if len(a.jobs) > 0 && (a.err != nil || len(a.jobs) >= a.limit() || a.jobs[0].ready()) {
			a.deliver()
			continue
		}
		if a.err != nil {
			return block{}, a.err
		}
		j, err := a.planner.plan(len(a.jobs) == 0)
		switch {
		case err == nil:
			a.start(j)
		case errors.Is(err, errBusy):
			a.deliver()
		default:
			a.err = err
		}
	}
}

// limit is how many jobs may be pending: each worker has one and another waits for it.
func (a *ahead) limit() int {
	if a.workers == 1 {
		return 1
	}
	return 2 * a.workers
}

func (a *ahead) start(j *job) {
	a.jobs = append(a.jobs, j)
	if j.run == nil {
		return
	}
	j.done = make(chan struct{})
	if a.workers == 1 {
		j.work()
		return
	}
	if a.started < a.workers && a.started < len(a.jobs) {
		a.started++
		a.running.Go(func() {
			for j := range a.work {
				if a.given.Load() {
					close(j.done)
					continue
				}
				j.work()
			}
		})
	}
	a.work <- j
}

// deliver waits for the first job and makes it the current one.
func (a *ahead) deliver() {
	j := a.jobs[0]
	a.jobs = a.jobs[1:]
	j.wait()
	a.current = j
	if j.settle != nil {
		if err := j.settle(j.data); err != nil && j.err == nil {
			j.err = err
		}
	}
	if j.err != nil {
		a.err = j.err
		a.drop()
	}
}

// drop ends the pending jobs, whose output nobody will see.
func (a *ahead) drop() {
	a.given.Store(true)
	for _, j := range a.jobs {
		j.wait()
		j.free()
	}
	a.jobs = nil
}

// piece returns the next part of the current job's output.
func (a *ahead) piece() (block, bool) {
	j := a.current
	if j == nil {
		return block{}, false
	}
	if len(j.data) == 0 {
		j.free()
		a.current = nil
		return block{}, false
	}
	n := min(len(j.data), blockSize)
	b := block{data: j.data[:n:n], release: j.out.hold().free}
	j.data = j.data[n:]
	return b, true
}

func (a *ahead) close() {
	a.drop()
	if a.current != nil {
		a.current.free()
		a.current = nil
	}
	close(a.work)
	a.running.Wait()
	a.planner.close()
}
