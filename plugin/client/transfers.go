package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/setup"
)

// tellEvery is how often progress is told. Twice for each sample of a rate is as much as an eye follows.
const tellEvery = 200 * time.Millisecond

// withoutContainerd fetches config and layers in this process and leaves them as finished transfers: in the store of
// blobs containerd's garbage collection would remove them, as it does not know them yet.
func (p *Pull) withoutContainerd(ctx context.Context) (_ *Summary, err error) {
	m, err := transfer.New(p.Folder(), setup.TransferOptions(p.config))
	if err != nil {
		return nil, fmt.Errorf("open the transfers in %s: %w", p.Folder(), asRoot(err))
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	r, err := setup.Registry(p.config)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	state := p.state(ViaTransfers)
	p.tell(state)
	var target ocispec.Descriptor
	var image *ocispec.Manifest
	if err := patiently(ctx, func() (err error) {
		target, image, err = p.resolve(ctx, r)
		return err
	}); err != nil {
		return nil, p.explain(err, nil)
	}
	state.Digest = target.Digest
	f := &fetching{pull: p, manager: m, state: state}
	defer f.close()
	for _, desc := range unique(append([]ocispec.Descriptor{image.Config}, image.Layers...)) {
		if err := f.join(ctx, r, desc, desc.Digest != image.Config.Digest); err != nil {
			return nil, fmt.Errorf("image %s: %w", p.named, err)
		}
	}
	if err := f.wait(ctx); err != nil {
		return nil, p.explain(err, nil)
	}
	sum := summary(f.snapshot())
	sum.Folder = p.Folder()
	return sum, nil
}

// resolve asks the registry what the reference stands for.
func (p *Pull) resolve(ctx context.Context, r *registry.Registry) (target ocispec.Descriptor, image *ocispec.Manifest, err error) {
	resolver := r.Resolver()
	name, target, err := resolver.Resolve(ctx, p.named.String())
	if err != nil {
		return target, nil, err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return target, nil, err
	}
	image, err = p.manifest(ctx, &documents{fetcher, map[digest.Digest][]byte{}}, target)
	return target, image, err
}

// fetching are the transfers of one image.
type fetching struct {
	pull    *Pull
	manager *transfer.Manager
	state   State // Layers are filled in by snapshot
	blobs   []*fetchedBlob
}

type fetchedBlob struct {
	*transfer.Handle
	blob   transfer.Blob
	layer  bool          // else the config
	waited bool          // another process was at it
	done   chan struct{} // closed when it has ended
	err    error         // set before done is closed
	left   bool          // another blob has failed; the same
}

// join starts the transfer of a blob from all hosts that have it, and waits for nothing.
func (f *fetching) join(ctx context.Context, r *registry.Registry, desc ocispec.Descriptor, layer bool) error {
	named := f.pull.named
	found, err := r.Sources(ctx, reference.Domain(named), reference.Path(named), desc.Digest, desc.Size)
	if err != nil {
		return err
	}
	sources := make([]transfer.Source, 0, len(found))
	for _, s := range found {
		sources = append(sources, s)
	}
	b := transfer.Blob{Digest: desc.Digest, Size: desc.Size}
	h, err := f.manager.Join(ctx, f.state.Digest.String(), b, sources...)
	if err != nil {
		return err
	}
	f.blobs = append(f.blobs, &fetchedBlob{Handle: h, blob: b, layer: layer, done: make(chan struct{})})
	return nil
}

// close lets go of the transfers. They end with their manager, resumable.
func (f *fetching) close() {
	for _, b := range f.blobs {
		_ = b.Close() // never fails
	}
}

// wait returns when all blobs are complete, verified and durable, or one of them cannot be. It tells how far they are.
func (f *fetching) wait(ctx context.Context) error {
	g, waitCtx := errgroup.WithContext(ctx)
	for _, b := range f.blobs {
		g.Go(func() error {
			b.err = b.Wait(waitCtx)
			b.left = waitCtx.Err() != nil && errors.Is(b.err, context.Cause(waitCtx))
			close(b.done)
			return b.err
		})
	}
	ended := make(chan error, 1)
	go func() { ended <- g.Wait() }()
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		f.pull.tell(f.snapshot())
		select {
		case err := <-ended:
			f.pull.tell(f.snapshot())
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		case <-tick.C:
		}
	}
}

// snapshot is the state now.
func (f *fetching) snapshot() State {
	s := f.state
	s.Layers = []Layer{}
	running := map[transfer.Blob]transfer.Status{}
	for _, t := range f.manager.List() {
		running[transfer.Blob{Digest: t.Digest, Size: t.Size}] = t
	}
	for _, b := range f.blobs {
		if b.layer {
			s.Layers = append(s.Layers, b.report(running[b.blob]))
		}
	}
	return s
}

// report tells of a layer. t is zero when its transfer is over.
func (b *fetchedBlob) report(t transfer.Status) Layer {
	l := Layer{
		Digest: b.Digest(), Size: b.Size(), Phase: Phase(t.Phase), Received: t.Received, Fetched: b.Fetched(),
		Rate: t.Rate, Hosts: t.Hosts,
	}
	if t.Err != nil {
		l.Error = t.Err.Error()
	}
	b.waited = b.waited || t.Phase == transfer.PhaseLock
	select {
	case <-b.done:
	default:
		if t.Phase == transfer.PhaseComplete { // its Wait returns in a moment
			l.Phase = PhaseVerifying
		}
		return l
	}
	l.Rate = 0
	switch {
	case b.left:
		return l
	case b.err != nil:
		l.Phase, l.Error = PhaseFailed, b.err.Error()
		return l
	case l.Fetched == 0 && !b.waited && l.Size > 0:
		l.Phase = PhaseExists
	default:
		l.Phase = PhaseDone
	}
	l.Received, l.Error = l.Size, ""
	wait, download, verify := b.Timings()
	l.Seconds.Wait, l.Seconds.Download, l.Seconds.Verify = wait.Seconds(), download.Seconds(), verify.Seconds()
	l.Seconds.Total = (wait + download + verify).Seconds()
	return l
}
