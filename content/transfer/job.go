package transfer

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
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
)

// job is one transfer while it runs and for as long as anybody holds a handle of it.
type job struct {
	blob    Blob
	opts    Options
	root    string
	shared  *shared
	started time.Time
	done    chan struct{} // closed when the job ended; err and folder are settled then

	progress atomic.Int64 // when something moved last, Unix ns
	received atomic.Int64 // bytes from the network

	// Guarded by Manager.mu.
	waiters int
	grace   *time.Timer
	ended   bool
	cancel  context.CancelCauseFunc

	mu         sync.Mutex
	changed    chan struct{} // closed and replaced when anything below changes
	phase      Phase
	err        error
	doomed     bool // it is decided that the job ends without success: no new waiters, no new sources
	folder     *folder
	hold       *holding
	ledger     *ledger
	frontier   int64
	generation int  // counts restarts
	verified   bool // the digest is right
	sources    []*source
	hosts      map[string]*host
	only       string // the single host that is asked after a mismatch; "" = all
	queued     int    // workers waiting for a connection
	open       int    // connections under way
	lastErr    error
	rate       meter
	firstByte  time.Time
	lastByte   time.Time
	finished   time.Time
}

// shared is what all transfers of a manager have in common.
type shared struct {
	conns   *limiter
	running chan struct{} // a slot for each running transfer

	mu     sync.Mutex
	ranges map[string]bool  // hosts known to honour ranges
	done   map[string]stamp // finished data files by path, verified in this process
}

// stamp recognises a data file that was verified before.
type stamp struct {
	info os.FileInfo
}

func (s stamp) matches(st os.FileInfo) bool {
	return s.info != nil && os.SameFile(s.info, st) && s.info.Size() == st.Size() && s.info.ModTime().Equal(st.ModTime())
}

func newJob(root string, b Blob, o Options, sh *shared) *job {
	j := &job{
		blob: b, opts: o, root: root, shared: sh,
		started: time.Now(),
		done:    make(chan struct{}),
		changed: make(chan struct{}),
		phase:   PhaseWaiting,
		hosts:   map[string]*host{},
		ledger:  newLedger(b.Size),
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
		h = &host{name: name}
		if j.shared.honoursRanges(name) {
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

// run brings the blob here. On return nobody writes the folder any more.
func (j *job) run(ctx context.Context) error {
	err := j.runLocked(ctx, false)
	if errors.Is(err, errNeedsLock) {
		err = j.runLocked(ctx, true)
	}
	return err
}

// runLocked takes the lock, works and gives the lock back; after success a shared lock stays until the job is retired.
func (j *job) runLocked(ctx context.Context, exclusive bool) (err error) {
	hold, err := lockFolder(ctx, j.root, j.blob, exclusive, j.opts.GiveUp, func(name string) {
		if j.currentPhase() != PhaseLock {
			log.G(ctx).WithField("digest", j.blob.Digest).Infof("another process fetches the blob: waiting for the lock of %s", name)
			j.setPhase(PhaseLock)
		}
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, hold.lock.Close())
		}
	}()
	j.setPhase(PhaseWaiting)
	if err := j.shared.enter(ctx); err != nil {
		return err
	}
	defer j.shared.leave()
	if err := j.work(ctx, hold); err != nil {
		return err
	}
	// Shared from now on, so that others may use the blob and nobody removes it. The kernel gives the lock up for a
	// moment; should another process get in between, it finds a finished blob and does not write either.
	if _, err := hold.lock.TryRLock(); err != nil {
		return fmt.Errorf("lock of %s: %w", hold.name, err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.hold = hold
	return nil
}

func (j *job) currentPhase() Phase {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.phase
}

// work does everything that needs the lock.
func (j *job) work(ctx context.Context, hold *holding) error {
	path := folderPath(j.root, hold.name)
	f, err := openFolder(path, j.blob)
	if err != nil {
		return diskError(path, err)
	}
	j.mu.Lock()
	if j.folder != nil { // a second try under the exclusive lock
		err = j.folder.data.Close()
	}
	j.folder = f
	j.wake()
	j.mu.Unlock()
	if err != nil {
		return err
	}
	if f.sealed {
		ok, err := j.adopt(ctx, path)
		if ok || err != nil {
			return err
		}
		if hold.shared {
			return errNeedsLock
		}
		log.G(ctx).WithField("digest", j.blob.Digest).Warnf("finished transfer %s does not match its digest: fetching again", path)
		if err := j.restart(""); err != nil {
			return err
		}
	}
	err = j.download(ctx)
	if err == nil {
		j.shared.remember(path, f.data)
		return nil
	}
	return errors.Join(err, j.suspend())
}

// adopt checks a finished data file against the digest without asking anybody for a byte.
func (j *job) adopt(ctx context.Context, path string) (bool, error) {
	f := j.folder
	if !j.shared.remembers(path, f.data) {
		j.setPhase(PhaseVerifying)
		ok, err := hashesTo(ctx, f.data, j.blob)
		if !ok || err != nil {
			return false, err
		}
		j.shared.remember(path, f.data)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ledger = newLedger(0)
	j.frontier, j.verified = j.blob.Size, true
	j.lastByte = time.Now()
	j.wake()
	return true, nil
}

// download fetches until the digest is right. After a mismatch each host gets one chance to serve the whole blob
// alone, those first that had no part in what was wrong: only the whole blob has a digest, so with several hosts
// nobody knows who lied.
func (j *job) download(ctx context.Context) error {
	err := j.attempt(ctx)
	if !errors.Is(err, errMismatch) {
		return err
	}
	tried := map[string]bool{}
	wrong := []error{err}
	for {
		name := j.nextAlone(tried)
		if name == "" {
			return j.reject(wrong)
		}
		tried[name] = true
		log.G(ctx).WithField("digest", j.blob.Digest).WithField("host", name).WithError(err).
			Warn("fetching the whole blob again from one host alone")
		if err := j.restart(name); err != nil {
			return err
		}
		if err = j.attempt(ctx); !errors.Is(err, errMismatch) && !errors.Is(err, errNoSource) {
			return err
		}
		wrong = append(wrong, err)
	}
}

// nextAlone chooses the host that is asked alone next; "" when all were.
func (j *job) nextAlone(tried map[string]bool) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	choice := ""
	for _, s := range j.sources {
		if s.gone != nil || tried[s.host.name] {
			continue
		}
		if !s.host.served {
			return s.host.name
		}
		if choice == "" {
			choice = s.host.name
		}
	}
	if choice == "" {
		j.doomed = true
	}
	return choice
}

// reject drops the data: no host has the blob.
func (j *job) reject(wrong []error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.generation++
	j.frontier = 0
	return errors.Join(j.folder.remove(), fmt.Errorf("no host has the right bytes, the data was dropped: %w: %w", errdefs.ErrDataLoss, oneLine(wrong)))
}

// restart throws away what was fetched and tells readers so.
func (j *job) restart(only string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	old := j.folder.data
	if err := errors.Join(j.folder.reset(), old.Close()); err != nil {
		return diskError(j.folder.path, err)
	}
	j.ledger = newLedger(j.blob.Size)
	j.frontier = 0
	j.generation++
	j.only = only
	for _, h := range j.hosts {
		h.served = false
	}
	j.touch()
	j.wake()
	return nil
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
	g.Go(func() error { return j.writeback(ctx) })
	g.Go(func() error {
		if err := j.receive(ctx, claimed); err != nil {
			return err
		}
		j.arrived()
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
	if j.hold != nil {
		err = errors.Join(err, j.hold.lock.Close())
	}
	return err
}

func (s *shared) enter(ctx context.Context) error {
	select {
	case s.running <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *shared) leave() { <-s.running }

func (s *shared) honoursRanges(host string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ranges[host]
}

func (s *shared) learnRanges(host string, yes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if yes {
		s.ranges[host] = true
	} else {
		delete(s.ranges, host)
	}
}

func (s *shared) remember(path string, f *os.File) {
	st, err := f.Stat()
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done[path] = stamp{info: st}
}

func (s *shared) remembers(path string, f *os.File) bool {
	st, err := f.Stat()
	if err != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done[path].matches(st)
}

func (s *shared) forget(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.done, path)
}
