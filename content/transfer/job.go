package transfer

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

var (
	// errAbandoned ends a transfer nobody waits for.
	errAbandoned = fmt.Errorf("nobody waits for the transfer any more: %w", errdefs.ErrUnavailable)
	// errClosed ends the transfers of a manager that closes.
	errClosed = fmt.Errorf("transfers are shutting down: %w", errdefs.ErrUnavailable)
	// errMismatch: all bytes are there and they are not the blob.
	errMismatch = errors.New("digest mismatch")
	// errNeedsLock: a finished blob that another process uses too turned out wrong; only the exclusive lock may replace it.
	errNeedsLock = errors.New("exclusive lock needed")
	// errElsewhere: somebody else finished the blob in another folder.
	errElsewhere = errors.New("finished in another folder")
)

// job is one transfer while it runs and for as long as anybody holds a handle of it.
type job struct {
	blob    Blob
	image   string // what connections are shared out by
	opts    Options
	root    string
	shared  *shared
	started time.Time
	done    chan struct{} // closed when the job ended; err and folder are settled then

	progress atomic.Int64 // when something moved last, Unix ns
	received atomic.Int64 // bytes from the network

	// Used only by what run calls, one at a time.
	places  *places
	digest  digester
	discard *discarding // nil: the bytes are kept
	behind  behind

	// Guarded by Manager.mu.
	waiters  int
	unwanted bool // its blob was deleted: nothing is kept once nobody has a handle
	grace    *time.Timer
	ended    bool
	cancel   context.CancelCauseFunc

	mu         sync.Mutex
	changed    chan struct{} // closed and replaced when anything below changes
	phase      Phase
	err        error
	doomed     bool // it is decided that the job ends without success: no new waiters, no new sources
	folder     *folder
	hold       *holding
	ledger     *ledger
	served     served // whose bytes are in the data
	frontier   int64
	elsewhere  int64 // bytes that another process has of the blob while it is followed
	inLine     bool  // waits for transfers of this process to end
	generation int   // counts restarts
	verified   bool  // the digest is right
	sources    []*source
	hosts      map[string]*host
	only       string // the single host that is asked after a mismatch; "" = all
	queued     bool   // waits for a connection that other transfers have
	open       int    // connections under way
	conns      map[*conn]struct{}
	told       bool // a host said when to come back: it is there
	overtaken  int  // connections that were ended because they brought nothing
	lastErr    error
	rate       meter
	best       float64 // the pace of the fastest host at its best
	firstByte  time.Time
	lastByte   time.Time
	finished   time.Time
}

func newJob(root string, b Blob, o Options, sh *shared) *job {
	j := &job{
		blob: b, image: b.Digest.String(), opts: o, root: root, shared: sh,
		started: time.Now(),
		done:    make(chan struct{}),
		changed: make(chan struct{}),
		phase:   PhaseWaiting,
		hosts:   map[string]*host{},
		conns:   map[*conn]struct{}{},
		ledger:  newLedger(b.Size),
		places:  newPlaces(root, b),
		behind:  behind{readers: map[*Handle]progress{}},
	}
	j.touch()
	return j
}

// wake tells everybody who waits for this job to look again. Called with mu held.
func (j *job) wake() {
	close(j.changed)
	j.changed = make(chan struct{})
}

func (j *job) touch() { j.progress.Store(time.Now().UnixNano()) }

func (j *job) setPhase(p Phase) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.phase = p
	j.wake()
}

// addSources offers more places to fetch from; false if the job is ending and cannot use them.
func (j *job) addSources(srcs []Source) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.doomed {
		return false
	}
	for _, s := range srcs {
		j.addSource(s)
	}
	j.wake()
	return true
}

func (j *job) addSource(s Source) {
	name := s.Host()
	h := j.hosts[name]
	if h == nil {
		h = &host{name: name, shared: j.shared.hosts.host(name)}
		if j.shared.hosts.honoursRanges(h.shared) {
			h.ranges = rangesYes
		}
		j.hosts[name] = h
		j.touch() // a new host gets its time
	}
	n := 0
	for _, have := range j.sources {
		if reflect.TypeOf(s).Comparable() && have.Source == s {
			return
		}
		if have.host == h && have.gone == nil {
			n++
		}
	}
	if n < sourcesPerHost {
		j.sources = append(j.sources, &source{Source: s, host: h})
	}
}

// doom decides that the job fails; nobody can join after that.
func (j *job) doom() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.doomed = true
}

// attempt fetches what is missing, hashing it in order, and makes it durable. errMismatch: the bytes are wrong.
func (j *job) attempt(ctx context.Context) error {
	f := j.folder
	claimed, err := j.resume()
	if err != nil {
		return diskError(f.path, err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return j.hash(ctx) })
	if !j.discards() {
		g.Go(func() error { return j.writeback(ctx) })
	}
	g.Go(func() error {
		if err := j.receive(ctx, claimed); err != nil {
			return err
		}
		j.arrived()
		if j.discards() {
			return nil
		}
		if err := f.syncData(); err != nil { // while the rest is hashed
			return diskError(f.path, err)
		}
		return nil
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if err := f.seal(); err != nil {
		return diskError(f.path, err)
	}
	return nil
}

// arrived notes that the last byte is there.
func (j *job) arrived() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lastByte = time.Now()
	j.phase = PhaseVerifying
	j.wake()
}

// suspend records what the block records do not say yet: blocks that are there in part.
func (j *job) suspend() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	f := j.folder
	if f.state == nil {
		return nil
	}
	for _, s := range j.ledger.gaps {
		if n := s.off % blockSize; n > 0 {
			if err := f.record(uint32(s.off/blockSize), n, s.crc); err != nil {
				return errors.Join(diskError(f.path, err), f.closeState())
			}
		}
	}
	return f.closeState()
}

// finish settles the outcome.
func (j *job) finish(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.finished = time.Now()
	if err != nil {
		j.doomed = true
		j.err = fmt.Errorf("blob %s: %w", j.blob.Digest, err)
		j.phase = PhaseFailed
		j.stopDiscarding()
	} else {
		j.phase = PhaseComplete
	}
	j.wake()
	close(j.done)
}

// retire closes what a finished job still holds. Nobody has a handle any more.
func (j *job) retire() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	var err error
	if j.folder != nil && j.folder.data != nil {
		err = j.folder.data.Close()
	}
	return errors.Join(err, j.unlock())
}

// letGo gives the lock of a finished job back though somebody may have a handle of it.
func (j *job) letGo() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.unlock()
}

// unlock is letGo with mu held.
func (j *job) unlock() error {
	if j.hold == nil {
		return nil
	}
	l := j.hold.lock
	j.hold = nil
	return l.Close()
}
