package pull

import (
	"context"
	"errors"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
)

// How long what was fetched and unpacked for an image is kept. Until the image is served, its pull may fail and come
// back: transfers and layer files stay. An image is served when the store shows all its layers, or a snapshot of its
// uppermost one is committed: containerd does not fetch layers whose snapshots it has. From then on a transfer goes with
// its blob, and a layer file with its last snapshot. What neither blob nor snapshot was made of, because gantry was
// ahead of a client that did without, goes when the image is removed.

// event is something that the store or the snapshotter told, and that is dealt with after it was told.
type event struct {
	about string // for the log
	do    func(ctx context.Context) error
}

// later deals with an event when those before it have been dealt with, unless the Puller is closed before.
func (p *Puller) later(about string, do func(ctx context.Context) error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.spawn == nil {
		return
	}
	p.events = append(p.events, event{about, do})
	if !p.telling {
		p.telling = true
		p.spawn(p.tell)
	}
}

// tell deals with events until there are none.
func (p *Puller) tell(ctx context.Context) {
	for {
		p.mu.Lock()
		if p.closed || len(p.events) == 0 {
			p.telling, p.events = false, nil
			p.mu.Unlock()
			return
		}
		e := p.events[0]
		p.events = p.events[1:]
		p.mu.Unlock()
		if err := e.do(ctx); err != nil && ctx.Err() == nil && !errdefs.IsNotFound(err) {
			log.L.WithField("about", e.about).WithError(err).Warn("what was fetched for an image is not tidied up")
		}
	}
}

// Committed implements content.Observer.
func (p *Puller) Committed(namespace string, d digest.Digest, size int64) {
	p.catalog.announce(d, size)
	p.later(d.String(), func(ctx context.Context) error {
		if err := p.catalog.settle(ctx); err != nil {
			return err
		}
		var errs []error
		for _, m := range p.catalog.shows(d) {
			errs = append(errs, p.serve(namespace, m))
		}
		return errors.Join(errs...)
	})
}

// SnapshotCommitted implements snapshotter.Observer.
func (p *Puller) SnapshotCommitted(namespace, name string) {
	p.later(name, func(ctx context.Context) error {
		if err := p.catalog.settle(ctx); err != nil {
			return err
		}
		var errs []error
		// containerd's metadata store calls it namespace/number/chain ID.
		for _, m := range p.catalog.ending(digest.Digest(name[strings.LastIndexByte(name, '/')+1:])) {
			errs = append(errs, p.serve(namespace, m))
			p.dismiss(m.digest)
		}
		return errors.Join(errs...)
	})
}

// serve tells the transfers and layers of an image that they need not be kept for a retry.
func (p *Puller) serve(namespace string, m *manifest) error {
	p.catalog.serve(m)
	transfers, err := p.transfers(namespace)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range m.layers {
		errs = append(errs, transfers.Served(l.Digest))
		if id, err := p.layers.Lookup(l.Digest); err == nil {
			p.layers.Satisfied(id)
		}
	}
	return errors.Join(errs...)
}

// dismiss ends the images of a manifest that no client waits for a layer of: those that were started ahead are not needed.
func (p *Puller) dismiss(m digest.Digest) {
	var images []*image
	p.mu.Lock()
	for key, img := range p.images {
		if key.manifest == m {
			images = append(images, img)
		}
	}
	p.mu.Unlock()
	for _, img := range images {
		p.end(img)
	}
}

// wantedNoMore ends Want for a layer that was made, or wanted, when the images with it were served already: serve has
// looked before, and nobody would end it. An image that is not served still counts on it.
func (p *Puller) wantedNoMore(blob digest.Digest, size int64, id digest.Digest) {
	images := p.catalog.listing(blob, size)
	waits := func(m *manifest) bool { return !p.catalog.served(m) }
	if len(images) > 0 && !slices.ContainsFunc(images, waits) {
		p.layers.Satisfied(id)
	}
}

// Mismatched implements content.Observer: what the transfer left behind would
// spoil the next try too.
func (p *Puller) Mismatched(namespace string, d digest.Digest) {
	p.later(d.String(), func(context.Context) error {
		m, err := p.transfers(namespace)
		if err != nil {
			return err
		}
		return m.Forget(d)
	})
}

// Deleted implements content.Observer.
func (p *Puller) Deleted(d digest.Digest) {
	// Freeing a large file takes its time, and containerd's garbage collection waits.
	p.later(d.String(), func(ctx context.Context) error {
		var errs []error
		if m := p.catalog.forget(ctx, d); m != nil && p.catalog.served(m) {
			errs = append(errs, p.removed(m))
		}
		return errors.Join(append(errs, p.forgetServed(d))...)
	})
}

func (p *Puller) forgetServed(d digest.Digest) error {
	if p.isolated {
		return nil // whose transfer it was is not known here; the sweep removes it
	}
	m, err := p.transfers("")
	if err != nil {
		return err
	}
	return m.ForgetServed(d)
}

// removed takes away what an image that was served has left where no other image has the layer.
func (p *Puller) removed(m *manifest) error {
	p.dismiss(m.digest)
	var errs []error
	for _, l := range m.layers {
		if len(p.catalog.listing(l.Digest, l.Size)) > 0 {
			continue
		}
		errs = append(errs, p.forgetServed(l.Digest))
		p.mu.Lock()
		for key, u := range p.unpacks {
			if key.blob == l.Digest {
				u.removed = true
			}
		}
		p.mu.Unlock()
		if id, err := p.layers.Lookup(l.Digest); err == nil {
			errs = append(errs, p.retire(l.Digest, id))
		}
	}
	return errors.Join(errs...)
}

// retire gives up the layer of a blob that no image has any more, unless one has the same layer as another blob.
func (p *Puller) retire(blob, id digest.Digest) error {
	if len(p.LayerBlobs(id)) > 0 {
		return nil
	}
	return p.layers.Retire(blob)
}
