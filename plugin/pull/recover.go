package pull

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/snapshotter/layer"
)

// What follows is for `gantry check --repair`: it brings back blobs and layer files that turned out broken.

// IsLayer says whether a manifest in the store lists the blob as a layer.
func (p *Puller) IsLayer(ctx context.Context, d digest.Digest) (bool, error) {
	if err := p.catalog.settle(ctx); err != nil {
		return false, err
	}
	p.catalog.mu.Lock()
	defer p.catalog.mu.Unlock()
	return len(p.catalog.layers[d]) > 0, nil
}

// DiffIDs lists all that the configs in the store name.
func (p *Puller) DiffIDs(ctx context.Context) ([]digest.Digest, error) {
	if err := p.catalog.settle(ctx); err != nil {
		return nil, err
	}
	p.catalog.mu.Lock()
	defer p.catalog.mu.Unlock()
	var all []digest.Digest
	for _, c := range p.catalog.configs {
		all = append(all, c.diffIDs...)
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// LayerBlobs are the blobs that become the layer diffID, by what manifests and configs in the store say.
func (p *Puller) LayerBlobs(diffID digest.Digest) []ocispec.Descriptor {
	p.catalog.mu.Lock()
	defer p.catalog.mu.Unlock()
	var found []ocispec.Descriptor
	for _, m := range p.catalog.manifests {
		ids := p.catalog.configs[m.config].diffIDs
		for i, l := range m.layers {
			if len(ids) == len(m.layers) && ids[i] == diffID && !slices.ContainsFunc(found, func(o ocispec.Descriptor) bool {
				return o.Digest == l.Digest && o.Size == l.Size
			}) {
				found = append(found, l)
			}
		}
	}
	return found
}

// Bring fetches a blob again, verified and durable, from where containerd recorded that the namespace got it, or a
// manifest that lists it. What lies of it in the transfers is read anew before it counts. use gets the finished file.
func (p *Puller) Bring(ctx context.Context, namespace string, d digest.Digest, size int64, use func(link func(path string) error) error) error {
	ways := []sourcing{p.registry.Sources}
	if layer, err := p.IsLayer(ctx, d); err != nil {
		return err
	} else if !layer && size <= maxDocument { // a config, a manifest or an index
		ways = []sourcing{p.registry.ManifestSources, p.registry.Sources}
	}
	var errs []error
	for _, way := range ways {
		err := p.bring(ctx, namespace, d, size, way, use)
		if err == nil || ctx.Err() != nil {
			return err
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// sourcing is one of the ways in which a registry serves a digest.
type sourcing func(ctx context.Context, host, repository string, d digest.Digest, size int64) ([]*registry.Source, error)

func (p *Puller) bring(ctx context.Context, namespace string, d digest.Digest, size int64, way sourcing, use func(func(string) error) error) error {
	h, err := p.fetchAgain(ctx, namespace, d, size, way)
	if err != nil {
		return err
	}
	defer p.tidyTransfer(namespace, d)
	defer closeHandle(h)
	if err := h.Wait(ctx); err != nil {
		return err
	}
	return use(h.LinkTo)
}

// tidyTransfer removes what a transfer of a blob leaves that was only fetched to replace another.
func (p *Puller) tidyTransfer(namespace string, d digest.Digest) {
	p.later(d.String(), func(context.Context) error {
		m, err := p.transfers(namespace)
		if err != nil {
			return err
		}
		return errors.Join(m.Served(d), m.ForgetServed(d))
	})
}

func (p *Puller) fetchAgain(ctx context.Context, namespace string, d digest.Digest, size int64, way sourcing) (*transfer.Handle, error) {
	m, err := p.transfers(namespace)
	if err != nil {
		return nil, err
	}
	if err := m.Distrust(d); err != nil {
		return nil, err
	}
	origins, err := p.whence(ctx, namespace, d, size)
	if err != nil {
		return nil, err
	}
	var sources []transfer.Source
	var errs []error
	for _, o := range origins {
		found, err := way(ctx, o.host, o.repository, d, size)
		errs = append(errs, err)
		for _, s := range found {
			sources = append(sources, s)
		}
	}
	if len(sources) == 0 {
		return nil, errors.Join(append(errs, fmt.Errorf("no host for %s: %w", d, errdefs.ErrNotFound))...)
	}
	return m.Join(ctx, d.String(), transfer.Blob{Digest: d, Size: size}, sources...)
}

// whence finds where a blob came from: what containerd recorded of itself, else of the manifests that list it.
func (p *Puller) whence(ctx context.Context, namespace string, d digest.Digest, size int64) ([]origin, error) {
	var found []origin
	labels, err := p.containerd.Labels(ctx, namespace, d)
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		hostname, ok := strings.CutPrefix(key, distributionSource)
		if !ok || hostname == "" {
			continue
		}
		for repository := range strings.SplitSeq(labels[key], ",") {
			for _, host := range p.registry.HostsFor(hostname) {
				if repository != "" {
					found = append(found, origin{host, repository})
				}
			}
		}
	}
	errs := []error{err}
	for _, m := range p.catalog.listing(d, size) {
		more, err := p.origins(ctx, namespace, m)
		errs = append(errs, err)
		for _, o := range more {
			if !slices.Contains(found, o) {
				found = append(found, o)
			}
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("nobody recorded where blob %s came from: %w", d, errors.Join(append(errs, errdefs.ErrNotFound)...))
	}
	return found, nil
}

// Rewrite makes the layer file of diffID anew, from a blob in the store or from a registry. The caller has dropped the
// broken one. namespaces are those of containerd, to ask where an image came from.
func (p *Puller) Rewrite(ctx context.Context, diffID digest.Digest, namespaces []string) error {
	if err := p.catalog.settle(ctx); err != nil {
		return err
	}
	blobs := p.LayerBlobs(diffID)
	recorded, err := p.layers.Blobs(diffID)
	errs := []error{err}
	for _, d := range recorded {
		info, err := p.blobs.Info(ctx, d)
		if err == nil && !slices.ContainsFunc(blobs, func(b ocispec.Descriptor) bool { return b.Digest == d }) {
			blobs = append(blobs, ocispec.Descriptor{Digest: d, Size: info.Size})
		}
	}
	for _, b := range blobs {
		for _, namespace := range namespaces {
			l, err := p.unpackAgain(ctx, namespace, b)
			if err == nil && l.DiffID != diffID {
				err = fmt.Errorf("blob %s is unpacked to %s: %w", b.Digest, l.DiffID, errdefs.ErrDataLoss)
			}
			if err == nil || ctx.Err() != nil {
				return err
			}
			errs = append(errs, err)
		}
	}
	if len(blobs) == 0 {
		errs = append(errs, fmt.Errorf("no image in the store has a layer %s: %w", diffID, errdefs.ErrNotFound))
	}
	return errors.Join(errs...)
}

// unpackAgain unpacks a blob from the store or, if that does not have it, as it is fetched.
func (p *Puller) unpackAgain(ctx context.Context, namespace string, b ocispec.Descriptor) (*layer.Layer, error) {
	u, err := p.unpack(ctx, p.unpackKey(namespace, b.Digest, b.Size), func() (byteSource, error) {
		ra, err := p.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: b.Digest})
		if err == nil {
			return localSource{ra}, nil
		}
		return nil, err
	})
	if errdefs.IsNotFound(err) {
		h, ferr := p.fetchAgain(ctx, namespace, b.Digest, b.Size, p.registry.Sources)
		if ferr != nil {
			return nil, ferr
		}
		defer p.tidyTransfer(namespace, b.Digest)
		used := false
		u, err = p.unpack(ctx, p.unpackKey(namespace, b.Digest, b.Size), func() (byteSource, error) {
			used = true
			return transferSource{h}, nil
		})
		if !used {
			closeHandle(h)
		}
	}
	if err != nil {
		return nil, err
	}
	return p.await(ctx, u)
}
