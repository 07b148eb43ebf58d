package plugin

import (
	"context"
	"sync"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/plugin/restore"
)

// restoredAtOnce is how many blobs are brought back at the same time. They share the connections.
const restoredAtOnce = 4

// discarded is what the restorer needs of the content store.
type discarded interface {
	DiscardedBlobs() []ccontent.Info
	Restore(ctx context.Context, d digest.Digest) error
}

// restorer brings back all blobs that were discarded.
type restorer struct{ store discarded }

var _ restore.Server = restorer{}

// Restore implements restore.Server. A blob that fails does not end it.
func (r restorer) Restore(ctx context.Context, send func(restore.Event) error) error {
	blobs := r.store.DiscardedBlobs()
	total := restore.Event{State: restore.Begun, Blobs: len(blobs)}
	for _, b := range blobs {
		total.Bytes += b.Size
	}
	if err := send(total); err != nil {
		return err
	}
	var mu sync.Mutex // held while sending
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(restoredAtOnce)
	for _, b := range blobs {
		if each.Err() != nil {
			break
		}
		g.Go(func() error {
			e, err := r.one(each, b)
			if err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			total.Done++
			total.DoneBytes += b.Size
			e.Done, e.Blobs, e.DoneBytes, e.Bytes = total.Done, total.Blobs, total.DoneBytes, total.Bytes
			return send(e)
		})
	}
	err := g.Wait()
	if err == nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return err
}

// one brings a blob back. Only the end of ctx is an error.
func (r restorer) one(ctx context.Context, b ccontent.Info) (restore.Event, error) {
	began := time.Now()
	err := r.store.Restore(ctx, b.Digest)
	if ctx.Err() != nil {
		return restore.Event{}, context.Cause(ctx)
	}
	e := restore.Event{State: restore.Restored, Digest: b.Digest, Size: b.Size, Seconds: time.Since(began).Seconds()}
	if err != nil && !errdefs.IsNotFound(err) { // deleted meanwhile: nobody needs it
		e.State, e.Error = restore.Failed, err.Error()
		log.G(ctx).WithField("digest", b.Digest).WithError(err).Warn("a discarded blob does not come back")
	}
	return e, nil
}
