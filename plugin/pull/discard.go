package pull

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/transfer"
)

// What becomes of compressed bytes where they are not kept (Options.Discard): a layer that gantry fetches is joined with
// JoinDiscarding, its unpack tells how far it has read, and when the layer file is durable and recorded under the
// blob's digest, the waiting client gets a record for a blob. Whatever comes between, a layer that is not unpacked or
// fails, leaves a blob as usual, or none.

var (
	_ content.Refetcher  = (*Puller)(nil)
	_ content.Discarding = (*waiter)(nil)
)

// discarder is a byteSource that need not keep what was read.
type discarder interface{ Discard(upTo int64) }

// discards says whether the bytes of a layer are not kept: of an image's layer, which will be unpacked.
func (p *Puller) discards(m *manifest, d digest.Digest) bool {
	return p.discard && p.catalog.diffID(m, d) != ""
}

// configWithin is how long a layer waits for its image's config where that decides whether bytes are kept. A client that
// pulls by itself may fetch both at once.
const configWithin = 2 * time.Second

// configured waits until the config of a manifest has been read, or it is clear that it will not come soon.
func (p *Puller) configured(ctx context.Context, m *manifest) {
	if !p.discard {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, configWithin)
	defer cancel()
	for {
		changed := p.catalog.watch()
		_, err := p.blobs.Info(ctx, m.config)
		if p.catalog.settle(ctx) != nil || err == nil {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// needless tells a transfer that nobody will read its bytes: the layer is there.
func (p *Puller) needless(ctx context.Context, img *image, b transfer.Blob) {
	if !p.discard {
		return
	}
	t, err := p.transfers(img.key.namespace)
	if err != nil {
		return
	}
	h, err := t.JoinDiscarding(ctx, img.key.manifest.String(), b)
	if err != nil {
		return
	}
	h.Discard(b.Size)
	p.mu.Lock()
	ended := img.ended
	if !ended {
		img.handles = append(img.handles, h)
	}
	p.mu.Unlock()
	if ended {
		closeHandle(h)
	}
}

// settle decides what becomes of the bytes of a complete blob that is discarded as it is unpacked.
func (w *waiter) settle(ctx context.Context) error {
	if !w.Discarding() {
		return nil
	}
	_, err := w.puller.recorded(ctx, w.puller.unpackKey(w.image.key.namespace, w.Digest(), w.Size()))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		kerr := w.Keep()
		if kerr == nil {
			return nil // as where all bytes are kept: Apply says what is wrong
		}
		w.Abandon()
		if errors.Is(kerr, transfer.ErrDiscarded) {
			kerr = nil
		}
		return errors.Join(fmt.Errorf("the layer was not unpacked, and its compressed bytes are discarded: %w", err), kerr)
	}
	sums, err := w.Discarded(ctx)
	if errdefs.IsFailedPrecondition(err) && !w.Discarding() {
		return nil // another client has kept it
	}
	if err != nil {
		return err
	}
	w.record = &content.Record{
		Digest: w.Digest(), Size: w.Size(), Chunk: transfer.DiscardChunk, Namespace: w.image.key.namespace, Sums: sums,
	}
	for _, o := range w.origins {
		w.record.Origins = append(w.record.Origins, content.Origin{Host: o.host, Repository: o.repository})
	}
	w.puller.remembered.add(w.puller.unpackKey(w.image.key.namespace, w.Digest(), w.Size()), w.record)
	return nil
}

// Record implements content.Discarding.
func (w *waiter) Record() *content.Record { return w.record }

// recorded waits for the unpack under way and returns the layer that a blob is durably recorded as.
func (p *Puller) recorded(ctx context.Context, key unpackKey) (digest.Digest, error) {
	if u := p.running(key); u != nil {
		if _, err := p.await(ctx, u); err != nil {
			return "", err
		}
	}
	return p.layers.Lookup(key.blob)
}

// Refetch implements content.Refetcher.
func (p *Puller) Refetch(ctx context.Context, r *content.Record) (content.Refetch, error) {
	origins := make([]origin, len(r.Origins))
	for i, o := range r.Origins {
		origins[i] = origin{o.Host, o.Repository}
	}
	m, err := p.transfers(r.Namespace)
	if err != nil {
		return nil, err
	}
	b := transfer.Blob{Digest: r.Digest, Size: r.Size}
	sources, err := p.sources(ctx, b, origins)
	if err != nil {
		return nil, err
	}
	h, err := m.Join(ctx, r.Digest.String(), b, sources...)
	if err != nil {
		return nil, err
	}
	return &refetch{Handle: h, manager: m}, nil
}

// refetch is a discarded blob on its way back.
type refetch struct {
	*transfer.Handle
	manager *transfer.Manager
}

// Close leaves the transfer. What is complete goes at once or, where the blob was restored, with the blob.
func (r *refetch) Close() error {
	err := r.Handle.Close()
	return errors.Join(err, r.manager.Served(r.Digest()), r.manager.ForgetServed(r.Digest()))
}
