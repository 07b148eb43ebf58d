package pull

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/decompress"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/snapshotter/layer"
)

// patience is how long an unpack whose bytes stopped coming waits for another
// source of them: a client that falls back begins to write within moments.
const patience = 10 * time.Second

// maxRestarts bounds how often an unpack begins again because the bytes below it
// were fetched anew.
const maxRestarts = 8

// errNoBytes means that the unpack ended for lack of bytes, not because of them.
var errNoBytes = errors.New("the bytes stopped coming")

// byteSource is where an unpack reads the compressed bytes while they arrive.
type byteSource interface {
	// ReadAt waits until there is a byte at off.
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	// Verified waits until the bytes are known to carry the blob's digest.
	Verified(ctx context.Context) error
	// End is where the bytes end, if that is known before they are verified.
	End() (int64, bool)
	// Lasts says whether the source comes to its end though nobody waits for it.
	Lasts() bool
	Close() error
}

type transferSource struct{ *transfer.Handle }

func (s transferSource) Verified(ctx context.Context) error { return s.Wait(ctx) }
func (s transferSource) End() (int64, bool)                 { return s.Size(), true }
func (s transferSource) Lasts() bool                        { return s.Frontier() == s.Size() }

type ingestSource struct{ *content.Growing }

// End is not known: the client may stop.
func (ingestSource) End() (int64, bool) { return 0, false }

// Lasts is always true: the client writes for itself, and ends the source when it stops.
func (ingestSource) Lasts() bool { return true }

type localSource struct{ ccontent.ReaderAt }

func (s localSource) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n, err := 0, error(nil)
	if r, ok := s.ReaderAt.(content.ContextReaderAt); ok { // it comes over the network again
		n, err = r.ReadAtContext(ctx, p, off)
	} else {
		n, err = s.ReaderAt.ReadAt(p, off)
	}
	if n > 0 {
		return n, nil
	}
	return n, err
}
func (localSource) End() (int64, bool)             { return 0, false } // it says so itself
func (localSource) Verified(context.Context) error { return nil }
func (localSource) Lasts() bool                    { return true }

// unpackKey names an unpack. The size belongs to it because a manifest can lie
// about it, the namespace because content may be isolated.
type unpackKey struct {
	namespace string
	blob      digest.Digest
	size      int64
}

func (p *Puller) unpackKey(namespace string, d digest.Digest, size int64) unpackKey {
	if !p.isolated {
		namespace = ""
	}
	return unpackKey{namespace, d, size}
}

// unpack is one blob on its way to a layer file.
type unpack struct {
	key     unpackKey
	started time.Time
	cancel  context.CancelCauseFunc
	local   bool // it reads the blob in the store, which is verified

	// Guarded by Puller.mu.
	holders int  // who waits for it, images included
	removed bool // the last image with the blob was removed since

	done  chan struct{} // closed when layer, err and ended are set
	layer *layer.Layer
	err   error
	ended time.Time

	phase   atomic.Value // a phase constant
	read    atomic.Int64 // compressed bytes
	written atomic.Int64 // uncompressed bytes
	times   times
	clock   clock

	mu      sync.Mutex
	sources []byteSource  // the first is read, the others are for when it fails
	changed chan struct{} // closed and replaced when a source is added
}

// wait waits for the layer. An end of ctx does not end the unpack.
func (u *unpack) wait(ctx context.Context) (*layer.Layer, error) {
	select {
	case <-u.done:
		return u.layer, u.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// lasts says whether the unpack comes to an end by itself.
func (u *unpack) lasts() bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return slices.ContainsFunc(u.sources, byteSource.Lasts)
}

// release counts a holder out. Without holders an unpack that would keep a
// transfer going for nobody ends. Called with mu held.
func (p *Puller) release(u *unpack) {
	if u.holders--; u.holders > 0 || u.lasts() {
		return
	}
	if p.unpacks[u.key] == u {
		delete(p.unpacks, u.key) // whoever comes now begins another
	}
	u.cancel(fmt.Errorf("nobody waits for layer %s any more: %w", u.key.blob, errNoBytes))
}

// offer gives the unpack one more source of the same bytes, for when those it
// has fail. The unpack closes it, at once if it has no use for it any more.
func (u *unpack) offer(s byteSource) {
	u.mu.Lock()
	defer u.mu.Unlock()
	select {
	case <-u.done:
		closeSource(s)
	default:
		u.sources = append(u.sources, s)
		close(u.changed)
		u.changed = make(chan struct{})
	}
}

// current returns the source to read, nil if there is none, and what tells of another.
func (u *unpack) current() (byteSource, <-chan struct{}) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.sources) == 0 {
		return nil, u.changed
	}
	return u.sources[0], u.changed
}

// drop takes a source that failed out of the unpack.
func (u *unpack) drop(s byteSource) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.sources) > 0 && u.sources[0] == s {
		u.sources = u.sources[1:]
	}
	closeSource(s)
}

func closeSource(s byteSource) {
	if err := s.Close(); err != nil {
		log.L.WithError(err).Debug("closing a source of compressed bytes")
	}
}

// running returns the unpack under way, if there is one.
func (p *Puller) running(key unpackKey) *unpack {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.unpacks[key]
}

// await waits for an unpack as one of its holders.
func (p *Puller) await(ctx context.Context, u *unpack) (*layer.Layer, error) {
	p.mu.Lock()
	u.holders++
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.release(u)
	}()
	return u.wait(ctx)
}

// unpack returns the unpack under way for key, or starts one from the source. It
// outlives ctx, which lends its values to the log.
func (p *Puller) unpack(ctx context.Context, key unpackKey, open func() (byteSource, error)) (*unpack, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u := p.unpacks[key]; u != nil {
		if source, _ := u.current(); source == nil && !p.closed {
			// Its last source failed, and it waits for a client to go on: this is one.
			if source, err := open(); err == nil {
				u.offer(source)
			}
		}
		return u, nil
	}
	if p.closed {
		return nil, errClosed
	}
	source, err := open()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	u := &unpack{
		key: key, started: time.Now(), cancel: cancel, sources: []byteSource{source},
		done: make(chan struct{}), changed: make(chan struct{}),
	}
	_, u.local = source.(localSource)
	u.phase.Store(phaseQueued)
	p.unpacks[key] = u
	p.wg.Go(func() { p.run(ctx, u) })
	return u, nil
}

// Ingesting implements content.Observer: the client writes the blob itself, and
// the unpack follows.
func (p *Puller) Ingesting(namespace string, d digest.Digest, size int64, g *content.Growing) {
	key := p.unpackKey(namespace, d, size)
	if u := p.running(key); u != nil {
		u.offer(ingestSource{g})
		return
	}
	followed := false
	if p.wanted(d, size) {
		_, err := p.unpack(context.Background(), key, func() (byteSource, error) {
			followed = true
			return ingestSource{g}, nil
		})
		if err != nil {
			log.L.WithField("digest", d).WithError(err).Debug("the unpack does not follow")
		}
	}
	if !followed {
		closeSource(ingestSource{g})
	}
}

// wanted says whether the blob is an image's layer that is not unpacked yet.
func (p *Puller) wanted(d digest.Digest, size int64) bool {
	isLayer := slices.ContainsFunc(p.catalog.listing(d, size), func(m *manifest) bool { return p.catalog.diffID(m, d) != "" })
	if !isLayer {
		return false
	}
	_, err := p.layers.Lookup(d)
	return err != nil
}

// run unpacks the blob and records what it is, once its digest is verified.
func (p *Puller) run(ctx context.Context, u *unpack) {
	l, err := p.produce(ctx, u)
	u.layer, u.err, u.ended = l, err, time.Now()
	u.mu.Lock()
	sources := slices.Clone(u.sources)
	u.mu.Unlock()
	done := p.finished(u, sources)
	p.recent.add(done) // before anybody can have a snapshot adopt the layer
	p.mu.Lock()
	if p.unpacks[u.key] == u {
		delete(p.unpacks, u.key)
	}
	p.mu.Unlock()
	u.mu.Lock()
	for _, s := range u.sources { // before done: who waited for it may count on that
		closeSource(s)
	}
	u.sources = nil
	close(u.done)
	u.mu.Unlock()
	u.cancel(nil)
	entry := log.G(ctx).WithField("digest", u.key.blob).WithField("duration", time.Since(u.started).Round(time.Millisecond))
	if err != nil {
		entry.WithError(err).Warn("layer not unpacked")
		return
	}
	entry.WithField("diffid", l.DiffID).WithField("bytes", l.Size).WithField("tail", done.TailSeconds).Debug("layer unpacked")
}

func (p *Puller) produce(ctx context.Context, u *unpack) (*layer.Layer, error) {
	var lost error
	for range maxRestarts {
		f := &follower{u: u, lease: &lease{workers: p.workers}, lost: lost}
		l, err := p.write(ctx, u, f)
		if err == nil {
			if err = p.verify(ctx, u, f); err == nil {
				if err := p.layers.Record(u.key.blob, l.DiffID); err != nil {
					return l, err
				}
				p.wantedNoMore(u.key.blob, u.key.size, l.DiffID)
				return l, p.retireLate(u, l.DiffID)
			}
		} else if f.err == nil && errors.Is(p.verify(ctx, u, f), errRestart) {
			err = errRestart // not the layer is broken: these were not its bytes
		}
		if !errors.Is(err, errRestart) {
			return nil, err
		}
		lost = f.lost
		log.G(ctx).WithField("digest", u.key.blob).Info("the bytes come anew or from elsewhere, the unpack begins again")
	}
	return nil, fmt.Errorf("gave up after %d restarts: %w", maxRestarts, errors.Join(errNoBytes, lost))
}

// retireLate gives up a layer whose last image was removed while it was made.
func (p *Puller) retireLate(u *unpack, id digest.Digest) error {
	p.mu.Lock()
	late := u.removed && u.holders == 0
	p.mu.Unlock()
	if !late || len(p.catalog.listing(u.key.blob, u.key.size)) > 0 {
		return nil
	}
	return p.retire(u.key.blob, id)
}

// write turns the followed bytes into a layer file, with a worker.
func (p *Puller) write(ctx context.Context, u *unpack, f *follower) (*layer.Layer, error) {
	queued := time.Now()
	if err := f.work(ctx); err != nil {
		return nil, err
	}
	defer f.rest()
	since(queued, &u.times.queued)
	u.phase.Store(phaseUnpacking)
	u.read.Store(0)
	u.written.Store(0)
	l, err := p.decompress(ctx, u, f)
	if err != nil {
		return nil, f.explain(err)
	}
	return l, nil
}

// decompress returns when nobody reads the follower any more.
func (p *Puller) decompress(ctx context.Context, u *unpack, f *follower) (_ *layer.Layer, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(errEnded)
	r, err := decompress.NewReader(ctx, f.reader(ctx), decompress.WithBudget(p.budget), decompress.WithIdle(f.idle))
	if err != nil {
		return nil, err
	}
	defer func() {
		cancel(errEnded) // Close waits for a reader that waits for bytes
		err = errors.Join(err, r.Close())
	}()
	return p.layers.Write(ctx, u.clock.timed(r), u.written.Store)
}

// verify waits until the compressed bytes are known to be the blob's. Only then
// may anybody find the layer by the blob's digest.
func (p *Puller) verify(ctx context.Context, u *unpack, f *follower) error {
	u.phase.Store(phaseVerifying)
	defer since(time.Now(), &u.times.verify)
	return f.verified(ctx)
}
