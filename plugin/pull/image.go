package pull

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/transfer"
)

// image is one image while clients of one namespace wait for layers of it.
type image struct {
	key     imageKey
	started time.Time
	cancel  context.CancelFunc // ends what starts layers ahead
	failed  chan struct{}      // closed when its origins could not be reached at all

	// The rest is guarded by Puller.mu.
	waiters int
	left    time.Time // when the last waiter left
	ended   bool      // it holds nothing any more
	ahead   int       // the layers from here on have been started
	idle    *time.Timer
	handles []*transfer.Handle
	unpacks []*unpack
	failure error
}

type imageKey struct {
	namespace string
	manifest  digest.Digest
}

// enter joins the transfer of one layer for one client, and starts those of the
// layers above it.
func (p *Puller) enter(ctx context.Context, key imageKey, m *manifest, origins []origin, req content.FetchRequest) (content.Transfer, error) {
	origins = p.reachable(origins)
	if len(origins) == 0 {
		return nil, fmt.Errorf("the registry of manifest %s did not answer a moment ago: %w", m.digest, errdefs.ErrUnavailable)
	}
	img, err := p.attend(key, m)
	if err != nil {
		return nil, err
	}
	h, err := p.join(ctx, key, m, transfer.Blob{Digest: req.Digest, Size: req.Size}, origins)
	if err != nil {
		p.leave(img)
		return nil, err
	}
	p.follow(ctx, img, m, req.Digest, req.Size)
	p.startAhead(ctx, img, m, origins, req.Digest)
	return &waiter{Handle: h, puller: p, image: img, origins: origins}, nil
}

// attend counts a client in.
func (p *Puller) attend(key imageKey, m *manifest) (*image, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errClosed
	}
	img := p.images[key]
	if img == nil {
		img = &image{key: key, started: time.Now(), failed: make(chan struct{}), cancel: func() {}, ahead: len(m.layers)}
		p.images[key] = img
		p.catalog.reopen(m)
	}
	if img.idle != nil {
		img.idle.Stop()
		img.idle = nil
	}
	img.waiters++
	return img, nil
}

// leave counts a client out. The image goes on for a grace period after its
// last one, so that a retry finds it under way.
func (p *Puller) leave(img *image) {
	p.mu.Lock()
	defer p.mu.Unlock()
	img.left = time.Now()
	if img.waiters--; img.waiters == 0 && !img.ended {
		img.idle = time.AfterFunc(grace, func() { p.end(img) })
	}
}

// end lets go of what the image holds, unless somebody came back.
func (p *Puller) end(img *image) {
	p.mu.Lock()
	if img.ended || (img.waiters > 0 && !p.closed) {
		p.mu.Unlock()
		return
	}
	img.ended = true
	if p.images[img.key] == img {
		delete(p.images, img.key)
	}
	img.cancel()
	if img.idle != nil {
		img.idle.Stop()
	}
	handles := img.handles
	for _, u := range img.unpacks {
		p.release(u)
	}
	img.handles, img.unpacks = nil, nil
	if img.waiters > 0 {
		img.left = time.Now() // the puller closes
	}
	entry := log.L.WithFields(log.Fields{
		"namespace": img.key.namespace, "manifest": img.key.manifest, "ref": p.hints.ref(img.key.namespace, img.key.manifest),
		"duration": img.left.Sub(img.started).Round(time.Millisecond),
	})
	failure := img.failure
	if p.images[img.key] == nil {
		p.hints.forget(img.key.namespace, img.key.manifest)
	}
	p.mu.Unlock()
	for _, h := range handles {
		closeHandle(h)
	}
	// The one line about a pull; its layers are told at debug.
	if failure != nil {
		entry.WithError(failure).Info("image left to containerd's own fetch")
	} else {
		entry.Info("image fetched")
	}
}

// startAhead starts the layers above the one asked for, once and in the background, so that a client that asks for three
// at a time does not wait for what could be under way. Clients ask from below; what lies below the first that they ask
// for, they have, or a snapshot of it: containerd does not fetch it.
func (p *Puller) startAhead(ctx context.Context, img *image, m *manifest, origins []origin, asked digest.Digest) {
	from := slices.IndexFunc(m.layers, func(l ocispec.Descriptor) bool { return l.Digest == asked })
	p.mu.Lock()
	defer p.mu.Unlock()
	if from < 0 || from >= img.ahead || p.closed || p.images[img.key] != img {
		return
	}
	layers := m.layers[from+1 : img.ahead]
	img.ahead = from
	if len(layers) == 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	others := img.cancel
	img.cancel = func() { others(); cancel() }
	p.wg.Go(func() {
		defer cancel()
		for _, l := range layers {
			if l.Digest == asked {
				continue
			}
			if err := p.startOne(ctx, img, m, origins, transfer.Blob{Digest: l.Digest, Size: l.Size}); err != nil {
				log.G(ctx).WithField("digest", l.Digest).WithError(err).Debug("layers are not started ahead")
				return
			}
		}
	})
}

// startOne starts a layer that no client has asked for yet.
func (p *Puller) startOne(ctx context.Context, img *image, m *manifest, origins []origin, b transfer.Blob) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, err := p.blobs.Info(ctx, b.Digest); err == nil && !p.isolated {
		return nil // there already
	}
	h, err := p.join(ctx, img.key, m, b, origins)
	if err != nil {
		return err
	}
	p.mu.Lock()
	gone := p.images[img.key] != img
	if !gone {
		img.handles = append(img.handles, h)
	}
	p.mu.Unlock()
	if gone {
		closeHandle(h)
		return nil
	}
	p.follow(ctx, img, m, b.Digest, b.Size)
	return nil
}

// follow starts to unpack a layer whose transfer is under way, on behalf of the
// image. Layers of things that are not images are only transferred.
func (p *Puller) follow(ctx context.Context, img *image, m *manifest, d digest.Digest, size int64) {
	if p.catalog.diffID(m, d) == "" {
		return
	}
	if id, err := p.layers.Lookup(d); err == nil && id != "" {
		p.layers.Want(id)
		p.wantedNoMore(d, size, id) // the client may have been quicker than startAhead
		p.needless(ctx, img, transfer.Blob{Digest: d, Size: size})
		return
	}
	u, err := p.unpack(ctx, p.unpackKey(img.key.namespace, d, size), func() (byteSource, error) {
		t, err := p.transfers(img.key.namespace)
		if err != nil {
			return nil, err
		}
		join := t.Join
		if p.discards(m, d) {
			join = t.JoinDiscarding
		}
		h, err := join(ctx, string(m.digest), transfer.Blob{Digest: d, Size: size})
		if err != nil {
			return nil, err
		}
		return transferSource{h}, nil
	})
	if err != nil {
		return // the transfer ended, or gantryd does; Layer tries again
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(img.unpacks, u) {
		return
	}
	u.holders++
	if img.ended {
		p.release(u)
		return
	}
	img.unpacks = append(img.unpacks, u)
}

// join joins or starts a transfer from all hosts of all origins.
func (p *Puller) join(ctx context.Context, key imageKey, m *manifest, b transfer.Blob, origins []origin) (*transfer.Handle, error) {
	t, err := p.transfers(key.namespace)
	if err != nil {
		return nil, err
	}
	sources, err := p.sources(ctx, b, origins)
	if err != nil {
		return nil, err
	}
	if !p.discards(m, b.Digest) {
		return t.Join(ctx, string(key.manifest), b, sources...)
	}
	h, err := t.JoinDiscarding(ctx, string(key.manifest), b, sources...)
	if err != nil || !h.Spent() || p.unpackedFor(key.namespace, b) {
		return h, err
	}
	// What was unpacked of it went since, with an image that was removed.
	h.Abandon()
	closeHandle(h)
	return t.JoinDiscarding(ctx, string(key.manifest), b, sources...)
}

// unpackedFor says whether a blob's layer is there or on its way.
func (p *Puller) unpackedFor(namespace string, b transfer.Blob) bool {
	if p.running(p.unpackKey(namespace, b.Digest, b.Size)) != nil {
		return true
	}
	_, err := p.layers.Lookup(b.Digest)
	return err == nil
}

// sources are the places of a blob at all origins, at least one.
func (p *Puller) sources(ctx context.Context, b transfer.Blob, origins []origin) ([]transfer.Source, error) {
	var sources []transfer.Source
	var errs []error
	for _, o := range origins {
		found, err := p.registry.Sources(ctx, o.host, o.repository, b.Digest, b.Size)
		errs = append(errs, err)
		for _, s := range found {
			sources = append(sources, s)
		}
	}
	if len(sources) == 0 {
		return nil, fmt.Errorf("no host for %s: %w", b.Digest, errors.Join(append(errs, errdefs.ErrNotFound)...))
	}
	return sources, nil
}

// reachable leaves out the origins that did not answer a moment ago.
func (p *Puller) reachable(origins []origin) []origin {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	return slices.DeleteFunc(slices.Clone(origins), func(o origin) bool {
		until, ok := p.shunned[o.String()]
		if ok && now.After(until) {
			delete(p.shunned, o.String())
			return false
		}
		return ok
	})
}

// fail notes that nothing at all came from the origins: everybody who waits for
// a layer of this image that has not begun falls back now.
func (p *Puller) fail(img *image, origins []origin, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(p.shunned, func(_ string, until time.Time) bool { return now.After(until) })
	for _, o := range origins {
		p.shunned[o.String()] = now.Add(shunned)
	}
	if img.failure == nil {
		img.failure = err
		close(img.failed)
	}
	if p.images[img.key] == img {
		// The next client starts afresh.
		delete(p.images, img.key)
		img.cancel()
		for _, h := range img.handles {
			closeHandle(h)
		}
		img.handles = nil
		// The unpacks go on until its clients have left: they follow what those
		// fetch by themselves.
	}
}

// waiter is one client's wait for one layer. It implements content.Transfer.
type waiter struct {
	*transfer.Handle
	puller  *Puller
	image   *image
	origins []origin
	record  *content.Record // set by Wait
	once    sync.Once
}

// Wait waits until the blob is complete, verified and durable.
func (w *waiter) Wait(ctx context.Context) error {
	done := make(chan error, 1)
	waitCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { done <- w.Handle.Wait(waitCtx) }()
	failed := w.image.failed
	for {
		select {
		case err := <-done:
			if err == nil {
				return w.settle(ctx)
			}
			if ctx.Err() == nil {
				err = w.failed(err)
			}
			return err
		case <-failed:
			failed = nil
			if w.Frontier() == 0 {
				cancel()
				<-done //nolint:errcheck // its context has ended it
				return w.image.failure
			}
		}
	}
}

// failed decides what the end of the transfer means for the client. What no host
// has, containerd's own fetch will not find either, and its message would name
// neither image nor layer.
func (w *waiter) failed(err error) error {
	switch {
	case errors.Is(err, transfer.ErrWrongSize):
		return w.refuse(fmt.Errorf("its manifest says it has %d bytes, which is wrong: %w", w.Size(), err))
	case errdefs.IsDataLoss(err):
		return w.refuse(fmt.Errorf("its digest does not match: %w", err))
	}
	if w.Frontier() == 0 && final(err) {
		w.puller.fail(w.image, w.origins, err)
	}
	return err
}

func (w *waiter) refuse(err error) error {
	key := w.image.key
	ref := w.puller.hints.ref(key.namespace, key.manifest)
	if ref == "" {
		ref = fmt.Sprintf("%s@%s", w.origins[len(w.origins)-1], key.manifest)
	}
	return fmt.Errorf("image %s: layer %s: %w: %w", ref, w.Digest(), content.ErrRefused, err)
}

// final says whether the error is about the repository rather than this blob.
func final(err error) bool {
	return errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) || errdefs.IsUnavailable(err)
}

// Close ends the wait. It may be called more than once.
func (w *waiter) Close() error {
	var err error
	w.once.Do(func() {
		err = w.Handle.Close()
		w.puller.leave(w.image)
	})
	return err
}

func closeHandle(h *transfer.Handle) {
	if err := h.Close(); err != nil {
		log.L.WithField("digest", h.Digest()).WithError(err).Warn("leaving a transfer")
	}
}

// namespaceOf returns the namespace that the request came with.
func namespaceOf(ctx context.Context) string {
	namespace, _ := namespaces.Namespace(ctx)
	return namespace
}
