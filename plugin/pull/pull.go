// Package pull brings the two halves of gantry together for one image: the
// manifest and config that containerd stored say which layers there are; their
// blobs are transferred from where containerd itself got the manifest; each is
// unpacked to a layer file while its bytes arrive.
//
// It is the only package that knows both content and snapshotter. The four
// interfaces it implements are those its neighbours declare: content.Fetcher and
// content.Observer, snapshotter.Observer, differ.Layers.
package pull

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/decompress"
	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/snapshotter/layer"
)

const (
	// grace is how long transfers and unpacks that nobody waits for any more go
	// on: a client that retries finds them under way.
	grace = 30 * time.Second
	// shunned is how long a repository that could not be reached at all is left
	// alone, so that the other layers of its images fall back at once.
	shunned = 30 * time.Second
)

// errClosed ends what is under way when the Puller is closed.
var errClosed = fmt.Errorf("gantryd is shutting down: %w", errdefs.ErrUnavailable)

// Options are what a Puller works with. All but Isolated, Discard and Workers are needed.
type Options struct {
	// Transfers returns the transfers that a namespace may use. With a shared
	// content policy it is the same manager for all.
	Transfers  func(namespace string) (*transfer.Manager, error)
	Registry   *registry.Registry
	Layers     *layer.Cache
	Containerd Containerd
	// Isolated is containerd's content sharing policy "isolated": a blob or a
	// layer file serves only the namespaces that have proved to have the blob.
	Isolated bool
	// Discard says that the compressed bytes of layers are not kept once they are unpacked.
	Discard bool
	// Workers bounds how many layers are unpacked at the same time.
	Workers int
	// Memory bounds what all decompressors together hold, in bytes; 0 means
	// decompress.DefaultBudget.
	Memory int64
}

// Puller starts and joins what a pull needs. It is safe for concurrent use.
type Puller struct {
	transfers  func(namespace string) (*transfer.Manager, error)
	registry   *registry.Registry
	layers     *layer.Cache
	containerd Containerd
	isolated   bool
	discard    bool
	workers    *semaphore.Weighted
	budget     *decompress.Budget
	blobs      Blobs

	catalog    *catalog
	hints      hints
	recent     recent
	remembered remembered

	wg sync.WaitGroup // what outlives the request that began it

	mu      sync.Mutex
	closed  bool
	stop    context.CancelFunc                 // ends what spawn began
	spawn   func(do func(ctx context.Context)) // from Start on; called with mu held and before closed
	images  map[imageKey]*image
	unpacks map[unpackKey]*unpack
	shunned map[string]time.Time // origin → until when
	events  []event              // that are told of, in their order
	telling bool                 // tell is under way
}

// New returns a Puller. Start must be called before it is used by a server.
func New(o Options) (*Puller, error) {
	if o.Transfers == nil || o.Registry == nil || o.Layers == nil || o.Containerd == nil {
		return nil, fmt.Errorf("pull: an option is missing: %w", errdefs.ErrInvalidArgument)
	}
	if o.Workers < 1 {
		return nil, fmt.Errorf("pull: %d unpack workers: %w", o.Workers, errdefs.ErrInvalidArgument)
	}
	if o.Memory == 0 {
		o.Memory = decompress.DefaultBudget
	}
	return &Puller{
		transfers: o.Transfers, registry: o.Registry, layers: o.Layers, containerd: o.Containerd,
		isolated: o.Isolated, discard: o.Discard,
		workers: semaphore.NewWeighted(int64(o.Workers)), budget: decompress.NewBudget(o.Memory),
		catalog: newCatalog(),
		images:  make(map[imageKey]*image),
		unpacks: make(map[unpackKey]*unpack),
		shunned: make(map[string]time.Time),
	}, nil
}

// Start begins to read the manifests of the store, in the background until
// Close. ctx lends its values to the log.
func (p *Puller) Start(ctx context.Context, blobs Blobs) {
	ctx, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blobs, p.stop = blobs, stop
	p.spawn = func(do func(context.Context)) { p.wg.Go(func() { do(ctx) }) }
	p.spawn(func(ctx context.Context) { p.catalog.run(ctx, blobs) })
}

// Close ends all unpacks and leaves all transfers, and waits for them.
// Transfers are resumable; an unpack begins again when it is asked for.
func (p *Puller) Close() error {
	p.mu.Lock()
	p.closed = true
	if p.stop != nil {
		p.stop()
	}
	for _, u := range p.unpacks {
		u.cancel(errClosed)
	}
	images := slices.Collect(maps.Values(p.images))
	p.mu.Unlock()
	for _, img := range images {
		p.end(img)
	}
	p.wg.Wait()
	return nil
}

// Prepared implements snapshotter.Observer.
func (p *Puller) Prepared(namespace, _ string, labels map[string]string) {
	p.hints.learn(namespace, labels)
}

// Adopted implements snapshotter.Observer.
func (p *Puller) Adopted(snapshot string, diffID digest.Digest, took time.Duration) {
	p.recent.adopted(snapshot, diffID, took)
}

// Fetch implements content.Fetcher: the blob is transferred if a manifest in the
// store lists it as a layer of this size and containerd recorded where the
// namespace got that manifest. The layers above it start with it.
func (p *Puller) Fetch(ctx context.Context, req content.FetchRequest) (content.Transfer, error) {
	if err := p.catalog.settle(ctx); err != nil {
		return nil, err
	}
	listing := p.catalog.listing(req.Digest, req.Size)
	if len(listing) == 0 {
		return nil, fmt.Errorf("blob %s is not a layer of any manifest here: %w", req.Digest, errdefs.ErrNotFound)
	}
	var errs []error
	for _, m := range p.preferHinted(req.Namespace, listing) {
		origins, err := p.origins(ctx, req.Namespace, m)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if t, ok := p.again(req); ok {
			return t, nil
		}
		p.configured(ctx, m)
		return p.enter(ctx, imageKey{req.Namespace, m.digest}, m, origins, req)
	}
	return nil, errors.Join(errs...)
}

// preferHinted moves the manifests that a Prepare in this namespace named to the
// front: a layer that images share belongs to the one that is being pulled.
func (p *Puller) preferHinted(namespace string, listing []*manifest) []*manifest {
	var hinted, rest []*manifest
	for _, m := range listing {
		if p.hints.ref(namespace, m.digest) != "" {
			hinted = append(hinted, m)
		} else {
			rest = append(rest, m)
		}
	}
	return append(hinted, rest...)
}

// Layer implements differ.Layers: it returns the DiffID of a blob, with its
// layer file in the cache. It waits for an unpack under way, or unpacks the local
// blob. The namespace in ctx must have the blob where content is isolated.
func (p *Puller) Layer(ctx context.Context, desc ocispec.Descriptor) (digest.Digest, int64, error) {
	namespace, err := p.allow(ctx, desc.Digest)
	if err != nil {
		return "", 0, err
	}
	l, err := p.unpacked(ctx, p.unpackKey(namespace, desc.Digest, desc.Size))
	if err != nil {
		_ = p.catalog.settle(ctx) // only to name the image
		return "", 0, p.name(namespace, desc, err)
	}
	return p.checked(ctx, namespace, desc, l)
}

// unpacked returns the layer of a blob: from the unpack under way, from the cache,
// or from the blob in the store.
func (p *Puller) unpacked(ctx context.Context, key unpackKey) (*layer.Layer, error) {
	var failed error
	u := p.running(key)
	for {
		if u != nil {
			l, err := p.await(ctx, u)
			if err == nil || ctx.Err() != nil || u.local {
				return l, err
			}
			// It read bytes while they came, before anybody knew whether they are
			// the blob's. The store knows.
			failed = err
		}
		if id, err := p.layers.Lookup(key.blob); err == nil {
			if l, err := p.layers.Get(ctx, id); err == nil {
				return l, nil
			}
		}
		var err error
		u, err = p.unpack(ctx, key, func() (byteSource, error) {
			ra, err := p.blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: key.blob})
			return localSource{ra}, err
		})
		if err != nil && failed != nil {
			return nil, failed
		}
		if err != nil {
			return nil, err
		}
	}
}

// allow checks that the request's namespace may have the blob unpacked.
func (p *Puller) allow(ctx context.Context, d digest.Digest) (string, error) {
	namespace := namespaceOf(ctx)
	if !p.isolated {
		return namespace, nil
	}
	if _, err := p.containerd.Labels(ctx, namespace, d); err != nil {
		return "", fmt.Errorf("namespace %s may not use layer %s: %w", namespace, d, err)
	}
	return namespace, nil
}

// checked compares the layer with what the configs in the store say it should
// be. Where one of them agrees, containerd decides, who knows which image this is.
func (p *Puller) checked(ctx context.Context, namespace string, desc ocispec.Descriptor, l *layer.Layer) (digest.Digest, int64, error) {
	if err := p.catalog.settle(ctx); err != nil {
		return "", 0, err
	}
	var claimed digest.Digest
	for _, m := range p.catalog.listing(desc.Digest, desc.Size) {
		switch id := p.catalog.diffID(m, desc.Digest); id {
		case "":
		case l.DiffID:
			if p.catalog.served(m) { // serve has looked before the layer was there
				p.layers.Satisfied(l.DiffID)
			}
			return l.DiffID, l.Size, nil
		default:
			claimed = id
		}
	}
	if claimed != "" {
		return "", 0, p.name(namespace, desc, fmt.Errorf(
			"the image config says its uncompressed content is %s, but it is %s: %w", claimed, l.DiffID, errdefs.ErrFailedPrecondition))
	}
	return l.DiffID, l.Size, nil
}

// name says which layer of which image an error is about, for the person who
// reads the pod's events.
func (p *Puller) name(namespace string, desc ocispec.Descriptor, err error) error {
	for _, m := range p.catalog.listing(desc.Digest, desc.Size) {
		if ref := p.hints.ref(namespace, m.digest); ref != "" {
			return fmt.Errorf("image %s: layer %s: %w", ref, desc.Digest, err)
		}
	}
	return fmt.Errorf("layer %s: %w", desc.Digest, err)
}
