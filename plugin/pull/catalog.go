package pull

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxDocument bounds what is read as a manifest or a config, in bytes. It is
// containerd's own limit for manifests.
const maxDocument = 8 << 20

// Blobs is what the catalog reads of the content store.
type Blobs interface {
	Info(ctx context.Context, d digest.Digest) (ccontent.Info, error)
	ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error)
	Walk(ctx context.Context, fn ccontent.WalkFunc, filters ...string) error
	// Discarded says that a blob's bytes are not there. Such a blob is a layer.
	Discarded(d digest.Digest) bool
}

// manifest is what the catalog keeps of one image manifest.
type manifest struct {
	digest digest.Digest
	config digest.Digest
	layers []ocispec.Descriptor // digest, size and media type only

	// Guarded by catalog.mu.
	seen    uint64                     // order in which it arrived
	missing map[digest.Digest]struct{} // layers that the store does not show
	served  time.Time                  // since when its last pull has had all it needs; zero: not yet
}

// config is what the catalog keeps of one image config.
type config struct {
	diffIDs []digest.Digest
	chain   digest.Digest // the chain ID of the uppermost layer, which its snapshot is named after
}

// maxLayers bounds how many layers a manifest or a config may name. Overlay can
// mount 500. A document of maxDocument could name millions, which take fifty times
// its size in memory.
const maxLayers = 1000

var errTooMany = fmt.Errorf("more than %d layers: %w", maxLayers, errdefs.ErrInvalidArgument)

// document is either a manifest or a config; the other half stays empty.
type document struct {
	Config struct {
		Digest digest.Digest `json:"digest"`
	} `json:"config"`
	Layers list[listed] `json:"layers"`
	RootFS struct {
		DiffIDs list[digest.Digest] `json:"diff_ids"`
	} `json:"rootfs"`
}

// listed is what is read of a layer's descriptor.
type listed struct {
	MediaType   string            `json:"mediaType"`
	Digest      digest.Digest     `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations"`
}

// list is a slice that refuses more than maxLayers elements before it holds them.
type list[T any] []T

// UnmarshalJSON implements json.Unmarshaler.
func (l *list[T]) UnmarshalJSON(raw []byte) error {
	d := json.NewDecoder(bytes.NewReader(raw))
	*l = nil // of two lists the last one counts, as everywhere
	switch start, err := d.Token(); {
	case err != nil:
		return err
	case start == nil:
		return nil
	case start != json.Delim('['):
		return fmt.Errorf("%v where a list should be: %w", start, errdefs.ErrInvalidArgument)
	}
	for d.More() {
		if len(*l) == maxLayers {
			return errTooMany
		}
		var v T
		if err := d.Decode(&v); err != nil {
			return err
		}
		*l = append(*l, v)
	}
	return nil
}

// catalog knows which layers the manifests in the store list, and which DiffIDs
// their configs name. It is derived from the store alone, so it survives a
// restart. Documents are read on one goroutine, never on the caller's: they are
// announced from inside containerd's database transaction.
type catalog struct {
	mu        sync.Mutex
	blobs     Blobs
	manifests map[digest.Digest]*manifest
	layers    map[digest.Digest][]*manifest
	configs   map[digest.Digest]config
	pending   []digest.Digest
	added     uint64        // documents announced so far
	done      uint64        // documents read so far
	changed   chan struct{} // closed and replaced whenever added or done moves
	arrivals  uint64
	// forged are the image references that manifests named themselves, in
	// annotations which reach Prepare as if containerd had set them. They are kept
	// when the manifest goes: what was learned from it is still about. Where they
	// cannot be told, all are suspect.
	forged  map[string]struct{}
	suspect bool
}

func newCatalog() *catalog {
	return &catalog{
		manifests: make(map[digest.Digest]*manifest),
		layers:    make(map[digest.Digest][]*manifest),
		configs:   make(map[digest.Digest]config),
		changed:   make(chan struct{}),
		forged:    make(map[string]struct{}),
		// The first document is the store itself: until it was walked, nothing settles.
		added: 1,
	}
}

// announce queues a blob to be looked at. It never blocks.
func (c *catalog) announce(d digest.Digest, size int64) {
	if size <= 0 || size > maxDocument {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pending = append(c.pending, d)
	c.added++
	c.signal()
}

// signal wakes everybody who waits for a change. Called with mu held.
func (c *catalog) signal() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// settle waits until everything announced before the call has been read.
func (c *catalog) settle(ctx context.Context) error {
	c.mu.Lock()
	target := c.added
	for c.done < target {
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("reading the manifests in the store: %w", context.Cause(ctx))
		}
		c.mu.Lock()
	}
	c.mu.Unlock()
	return nil
}

// watch returns a channel that is closed when something was announced or read.
func (c *catalog) watch() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// run reads the store and then whatever is announced, until ctx ends.
func (c *catalog) run(ctx context.Context, blobs Blobs) {
	c.mu.Lock()
	c.blobs = blobs
	c.mu.Unlock()
	var small []digest.Digest
	err := blobs.Walk(ctx, func(i ccontent.Info) error {
		if i.Size > 0 && i.Size <= maxDocument {
			small = append(small, i.Digest)
		}
		return nil
	})
	if err != nil {
		log.G(ctx).WithError(err).Warn("reading the content store for manifests; layers of images that are there already are not taken over")
	}
	for _, d := range small {
		c.read(ctx, d)
	}
	c.finish(1)
	for {
		c.mu.Lock()
		batch, changed := c.pending, c.changed
		c.pending = nil
		c.mu.Unlock()
		if len(batch) == 0 {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return
			}
		}
		for _, d := range batch {
			c.read(ctx, d)
		}
		c.finish(uint64(len(batch)))
	}
}

func (c *catalog) finish(n uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done += n
	c.signal()
}

// read looks at one blob. What is neither manifest nor config is passed over:
// the store holds other small blobs, too.
func (c *catalog) read(ctx context.Context, d digest.Digest) {
	if c.blobs.Discarded(d) {
		return
	}
	doc, err := readDocument(ctx, c.blobs, d)
	if err != nil {
		if !errdefs.IsNotFound(err) {
			log.G(ctx).WithField("digest", d).WithError(err).Debug("not read as manifest or config")
			c.mu.Lock()
			defer c.mu.Unlock()
			c.suspect = c.suspect || errors.Is(err, errTooMany)
		}
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range doc.Layers {
		c.accuse(l.Annotations[snapshotters.TargetRefLabel])
	}
	if len(doc.RootFS.DiffIDs) > 0 {
		c.configs[d] = config{doc.RootFS.DiffIDs, identity.ChainID(doc.RootFS.DiffIDs)}
	}
	if len(doc.Layers) == 0 || doc.Config.Digest == "" {
		return
	}
	c.arrivals++
	if m := c.manifests[d]; m != nil {
		m.seen = c.arrivals
		return
	}
	m := &manifest{digest: d, config: doc.Config.Digest, seen: c.arrivals}
	for _, l := range doc.Layers {
		if l.Digest.Validate() != nil || l.Size <= 0 {
			return // not an image that anybody can pull
		}
		m.layers = append(m.layers, ocispec.Descriptor{MediaType: l.MediaType, Digest: l.Digest, Size: l.Size})
	}
	m.missing = make(map[digest.Digest]struct{})
	for _, l := range m.layers {
		if _, err := c.blobs.Info(ctx, l.Digest); err != nil {
			m.missing[l.Digest] = struct{}{}
		}
	}
	if len(m.missing) == 0 { // nothing is left to pull of it
		m.served = time.Now()
	}
	c.manifests[d] = m
	for _, l := range m.layers {
		if !slices.Contains(c.layers[l.Digest], m) {
			c.layers[l.Digest] = append(c.layers[l.Digest], m)
		}
	}
}

// accuse notes a reference that a manifest names itself. Called with mu held.
func (c *catalog) accuse(ref string) {
	if ref == "" {
		return
	}
	if len(c.forged) >= maxHints {
		c.suspect = true
		return
	}
	c.forged[ref] = struct{}{}
}

// honest says whether a reference learned from a snapshot's labels can only have
// come from containerd.
func (c *catalog) honest(ref string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, forged := c.forged[ref]
	return !forged && !c.suspect
}

func readDocument(ctx context.Context, blobs Blobs, d digest.Digest) (*document, error) {
	ra, err := blobs.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	var first [1]byte
	if _, err := ra.ReadAt(first[:], 0); err != nil {
		return nil, err
	}
	if first[0] != '{' {
		return nil, fmt.Errorf("blob %s is no JSON object: %w", d, errdefs.ErrNotFound)
	}
	var doc document
	if err := json.NewDecoder(io.NewSectionReader(ra, 0, min(ra.Size(), maxDocument))).Decode(&doc); err != nil {
		return nil, fmt.Errorf("blob %s: %w", d, err)
	}
	return &doc, nil
}

// shows notes that the store shows a blob, and returns the manifests that list it and have all their layers there.
func (c *catalog) shows(d digest.Digest) (complete []*manifest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.layers[d] {
		if delete(m.missing, d); len(m.missing) == 0 {
			complete = append(complete, m)
		}
	}
	return complete
}

// forget notes that a blob was deleted from the store. A manifest or config is dropped, unless it is there again, and the
// manifest returned.
func (c *catalog) forget(ctx context.Context, d digest.Digest) *manifest {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.layers[d] {
		m.missing[d] = struct{}{}
	}
	if c.blobs != nil {
		if _, err := c.blobs.Info(ctx, d); err == nil {
			return nil
		}
	}
	delete(c.configs, d)
	m := c.manifests[d]
	if m == nil {
		return nil
	}
	delete(c.manifests, d)
	for _, l := range m.layers {
		rest := slices.DeleteFunc(c.layers[l.Digest], func(o *manifest) bool { return o == m })
		if len(rest) == 0 {
			delete(c.layers, l.Digest)
			continue
		}
		c.layers[l.Digest] = rest
	}
	return m
}

// serve notes that the last pull of a manifest has all it needs.
func (c *catalog) serve(m *manifest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	m.served = time.Now()
}

// reopen notes that another pull began, which may fail. A layer that is asked for just after the image was served still
// belongs to the pull before.
func (c *catalog) reopen(m *manifest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if time.Since(m.served) > grace {
		m.served = time.Time{}
	}
}

func (c *catalog) served(m *manifest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !m.served.IsZero()
}

// ending returns the manifests whose uppermost layer has this chain ID.
func (c *catalog) ending(chain digest.Digest) (found []*manifest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range c.manifests {
		if conf, ok := c.configs[m.config]; ok && conf.chain == chain {
			found = append(found, m)
		}
	}
	return found
}

// listing returns the manifests that list the blob with exactly this size, the
// most recent first.
func (c *catalog) listing(d digest.Digest, size int64) []*manifest {
	c.mu.Lock()
	defer c.mu.Unlock()
	var found []*manifest
	for _, m := range c.layers[d] {
		if slices.ContainsFunc(m.layers, func(l ocispec.Descriptor) bool { return l.Digest == d && l.Size == size }) {
			found = append(found, m)
		}
	}
	slices.SortFunc(found, func(a, b *manifest) int { return int(int64(b.seen) - int64(a.seen)) })
	return found
}

// diffID returns what the image's config says the layer is, uncompressed; empty
// while the config is unknown, or when the image is not made of file system
// layers (an artifact).
func (c *catalog) diffID(m *manifest, layer digest.Digest) digest.Digest {
	c.mu.Lock()
	defer c.mu.Unlock()
	ids := c.configs[m.config].diffIDs
	if len(ids) != len(m.layers) {
		return ""
	}
	for i, l := range m.layers {
		if l.Digest == layer {
			return ids[i]
		}
	}
	return ""
}
