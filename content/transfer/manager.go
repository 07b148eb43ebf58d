package transfer

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
)

// Blob is what is wanted. The size must be known and true: it is part of a transfer's identity.
type Blob struct {
	Digest digest.Digest
	Size   int64
}

// Options of a Manager. Zero means default.
type Options struct {
	// ChunkSize is how many bytes one request asks for, rounded to blocks of 256 KiB. Default: 1 to 64 MiB, by what is
	// left of the blob and by what the host brings.
	ChunkSize int64
	// Hosts shares connections out to the transfers of all managers that have it. Default: the manager's own.
	Hosts *Hosts
	// ConnectionsPerHost is HostLimits.PerHost of the manager's own Hosts. Default 32.
	ConnectionsPerHost int
	// MaxTransfers bounds the transfers that run at once; more wait in the order of their arrival. Default 16.
	MaxTransfers int
	// GiveUp ends a transfer that makes no progress for so long. Default 2m.
	GiveUp time.Duration
	// FirstContact does so while no byte was ever received. Default 5s.
	FirstContact time.Duration
	// Stall ends a connection that brings nothing for so long; its chunk is asked for again. Default 15s.
	Stall time.Duration
	// KeepPartial is for how long Sweep leaves partial and unused transfers alone. Default 24h.
	KeepPartial time.Duration
	// Grace is for how long a transfer goes on when its last waiter has left. Default 30s.
	Grace time.Duration
	// NewHash makes what a blob's SHA-256 is computed with; the hashes of several transfers are used at once. Default:
	// crypto/sha256.
	NewHash func() hash.Hash
	// ReadOnly makes a Manager that only looks: Check, Leftovers and Close may be called.
	ReadOnly bool
}

func (o Options) withDefaults() (Options, error) {
	if o.ChunkSize < 0 || o.ConnectionsPerHost < 0 || o.MaxTransfers < 0 || min(o.GiveUp, o.FirstContact, o.Stall, o.KeepPartial, o.Grace) < 0 {
		return o, fmt.Errorf("transfer options must not be negative: %+v: %w", o, errdefs.ErrInvalidArgument)
	}
	if o.ChunkSize > 0 {
		o.ChunkSize = blockEnd(o.ChunkSize - 1)
	}
	if o.Hosts == nil {
		o.Hosts = NewHosts(HostLimits{PerHost: o.ConnectionsPerHost})
	}
	o.MaxTransfers = cmp.Or(o.MaxTransfers, 16)
	o.GiveUp = cmp.Or(o.GiveUp, 2*time.Minute)
	o.FirstContact = cmp.Or(o.FirstContact, 5*time.Second)
	o.Stall = cmp.Or(o.Stall, 15*time.Second)
	o.KeepPartial = cmp.Or(o.KeepPartial, 24*time.Hour)
	o.Grace = cmp.Or(o.Grace, 30*time.Second)
	if o.NewHash == nil {
		o.NewHash = sha256.New
	}
	return o, nil
}

// Phase says what a transfer does.
type Phase string

// The phases of a transfer.
const (
	PhaseWaiting   Phase = "waiting"   // for its turn or for the first byte
	PhaseLock      Phase = "lock"      // another process fetches the blob; what it has is shown
	PhaseFetching  Phase = "fetching"  // bytes arrive
	PhaseVerifying Phase = "verifying" // all bytes are there; hashing and fsync
	PhaseComplete  Phase = "complete"
	PhaseFailed    Phase = "failed" // what was fetched is kept
	PhaseKept      Phase = "kept"   // left on disk by an earlier process or another one; Started is when it was written last
)

// Status is a transfer as `gantry status` shows it. Sizes in bytes, Rate in bytes a second.
type Status struct {
	Digest   digest.Digest
	Size     int64
	Frontier int64 // the first missing byte
	Received int64 // bytes that are there, in order or not
	Fetched  int64 // bytes that came over the network since Started
	Rate     float64
	Phase    Phase
	Hosts    []string // in the order in which they are asked
	// Connections under way.
	Connections int
	Waiters     int
	Started     time.Time
	Err         error // why it failed, or what went wrong last
}

// Failed transfers that List remembers.
const maxFailed = 64

// Manager runs the transfers under one root. Safe for concurrent use; other managers, in this process or others, may
// use the same root.
type Manager struct {
	root   string
	opts   Options
	shared *shared
	kept   *kept
	apart  *discardFolders
	wg     sync.WaitGroup
	room   sync.Mutex // one makeRoom at a time

	mu     sync.Mutex // taken before job.mu
	closed bool
	jobs   map[Blob]*job
	failed []Status // newest last
}

// New opens root, creating it if needed. Partial transfers in it are resumed when somebody joins them.
func New(root string, o Options) (*Manager, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	root, err = filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if !o.ReadOnly {
		if err := os.MkdirAll(filepath.Join(root, locksName), 0o700); err != nil {
			return nil, fmt.Errorf("transfer root: %w", err)
		}
	}
	m := &Manager{
		root:  root,
		opts:  o,
		jobs:  map[Blob]*job{},
		kept:  &kept{root: root, seen: map[string]keptFolder{}},
		apart: &discardFolders{root: root},
		shared: &shared{
			dropPages: dropPages,
			hosts:     o.Hosts,
			running:   make(chan struct{}, o.MaxTransfers),
			liars:     map[string]time.Time{},
			done:      map[string]stamp{},
		},
	}
	m.shared.makeRoom = m.makeRoom
	return m, nil
}

func folderPath(root, name string) string { return filepath.Join(root, name) }

func (b Blob) validate() error {
	if err := b.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %q: %w: %w", b.Digest, errdefs.ErrInvalidArgument, err)
	}
	if b.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("blob %s: only sha256 is transferred: %w", b.Digest, errdefs.ErrNotImplemented)
	}
	if b.Size < 0 || b.Size > maxBlobSize {
		return fmt.Errorf("blob %s: size %d: %w", b.Digest, b.Size, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Join waits for a blob together with all who want it: it starts the transfer, or offers one under way more sources. It
// never waits itself. ctx lends its values to the log and does not bound the transfer; Close of the Handle ends it.
// Sources are asked in the order given. Without sources only what is on disk already can complete the blob. image is
// whatever names the image that the blob is wanted for: connections are shared out fairly between images.
func (m *Manager) Join(ctx context.Context, image string, b Blob, sources ...Source) (*Handle, error) {
	return m.join(ctx, image, b, false, sources)
}

func (m *Manager) join(ctx context.Context, image string, b Blob, discard bool, sources []Source) (*Handle, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil, fmt.Errorf("blob %s: %w", b.Digest, errClosed)
	}
	j := m.jobs[b]
	if j == nil || !discard && j.spent() || !j.addSources(sources) {
		j = m.start(context.WithoutCancel(ctx), image, b, discard, sources)
	}
	return m.handle(j), nil
}

// start runs a new job. Called with mu held.
func (m *Manager) start(ctx context.Context, image string, b Blob, discard bool, sources []Source) *job {
	j := m.makeJob(ctx, b, discard)
	j.image = cmp.Or(image, j.image)
	j.addSources(sources)
	ctx, j.cancel = context.WithCancelCause(ctx)
	m.jobs[b] = j
	m.failed = slices.DeleteFunc(m.failed, func(s Status) bool { return s.Digest == b.Digest && s.Size == b.Size })
	m.wg.Go(func() { m.run(ctx, j) })
	return j
}

func (m *Manager) run(ctx context.Context, j *job) {
	err := j.run(ctx)
	j.cancel(nil)
	j.finish(err)
	l := log.G(ctx).WithField("digest", j.blob.Digest)
	if err != nil {
		l.WithError(err).Debug("transfer ended")
	} else {
		l.Debug("transfer complete")
	}
	if m.settle(j, err) {
		m.retire(ctx, j)
	}
}

// settle books the end of a job; true if nobody has a handle of it.
func (m *Manager) settle(j *job, err error) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	j.ended = true
	if j.grace != nil {
		j.grace.Stop()
	}
	if err != nil || j.waiters == 0 {
		m.drop(j)
	}
	if err != nil && !errors.Is(err, errClosed) {
		m.failed = append(m.failed, j.status())
		m.failed = m.failed[max(0, len(m.failed)-maxFailed):]
	}
	return j.waiters == 0
}

// drop makes sure nobody joins a job any more. Called with mu held.
func (m *Manager) drop(j *job) {
	if m.jobs[j.blob] == j {
		delete(m.jobs, j.blob)
	}
}

// retire closes the files of an ended job that nobody has a handle of and nobody can join. Not under Manager.mu:
// closing the last descriptor of a large file that was removed takes its time.
func (m *Manager) retire(ctx context.Context, j *job) {
	err := errors.Join(j.retire(), j.removeApart())
	if j.unwanted {
		err = errors.Join(err, m.Forget(j.blob.Digest))
	}
	if err != nil {
		log.G(ctx).WithField("digest", j.blob.Digest).WithError(err).Warn("closing a transfer")
	}
}

// handle adds a waiter. Called with mu held.
func (m *Manager) handle(j *job) *Handle {
	j.waiters++
	j.unwanted = false
	if j.grace != nil {
		j.grace.Stop()
		j.grace = nil
	}
	return &Handle{m: m, job: j, generation: j.currentGeneration()}
}

// leave removes a waiter; true if it was the last one of an ended job.
func (m *Manager) leave(j *job) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if j.waiters--; j.waiters > 0 {
		return false
	}
	if j.ended {
		m.drop(j)
	} else {
		j.grace = time.AfterFunc(m.opts.Grace, func() { m.abandon(j) })
	}
	return j.ended
}

// abandon stops a job that still has no waiter when its grace is over.
func (m *Manager) abandon(j *job) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if j.waiters > 0 || j.ended {
		return
	}
	m.drop(j)
	j.doom()
	j.cancel(errAbandoned)
}

// List shows the transfers under way, those complete that somebody still holds, the last ones that failed, and what else
// lies on disk that nobody links.
func (m *Manager) List() []Status {
	left := m.kept.list()
	m.mu.Lock()
	defer m.mu.Unlock()
	list := slices.Clone(m.failed)
	for _, j := range m.jobs {
		s := j.status()
		s.Waiters = j.waiters
		list = append(list, s)
	}
	failed, known := list[:len(m.failed)], list
	for _, s := range left {
		same := func(k Status) bool { return k.Digest == s.Digest && k.Size == s.Size }
		if i := slices.IndexFunc(failed, same); i >= 0 && s.Started.After(failed[i].Started) {
			failed[i].Received, failed[i].Frontier = s.Received, s.Frontier // another process may have gone on
		} else if !slices.ContainsFunc(known, same) {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, func(a, b Status) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Digest, b.Digest))
	})
	return list
}

func (j *job) status() Status {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := Status{
		Digest: j.blob.Digest, Size: j.blob.Size,
		Frontier: j.frontier, Received: j.blob.Size, Fetched: j.received.Load(),
		Phase: j.phase, Started: j.started, Connections: j.open,
		Err: cmp.Or(j.err, j.lastErr),
	}
	if !j.verified {
		s.Received = max(j.ledger.there(), j.elsewhere, j.frontier)
	}
	if j.phase == PhaseFetching || j.phase == PhaseLock {
		s.Rate = j.rate.value()
	}
	if j.phase == PhaseComplete {
		s.Err = nil
	}
	for _, src := range j.sources {
		if j.usable(src) && !slices.Contains(s.Hosts, src.host.name) {
			s.Hosts = append(s.Hosts, src.host.name)
		}
	}
	return s
}

func (j *job) currentGeneration() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.generation
}

// Close stops all transfers, resumable, and waits for them. Handles stay readable below their frontier until they are
// closed; Wait of unfinished ones returns an error. A second call does nothing.
func (m *Manager) Close() error {
	m.mu.Lock()
	m.closed = true
	for _, j := range m.jobs {
		j.doom()
		j.cancel(errClosed)
		j.stopDiscarding()
	}
	m.mu.Unlock()
	m.wg.Wait()
	return m.apart.close()
}
