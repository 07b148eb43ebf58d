package pull

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// memory is a content store of documents.
type memory struct {
	mu     sync.Mutex
	blobs  map[digest.Digest][]byte
	opened int // readers, and those of them not closed
	open   int
	// discarded are there, and not to be opened.
	discarded map[digest.Digest]bool
}

func (m *memory) Discarded(d digest.Digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.discarded[d]
}

func (m *memory) put(t testing.TB, v any) digest.Digest {
	t.Helper()
	b, ok := v.([]byte)
	if !ok {
		var err error
		if b, err = json.Marshal(v); err != nil {
			t.Fatal(err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.blobs == nil {
		m.blobs = make(map[digest.Digest][]byte)
	}
	d := digest.FromBytes(b)
	m.blobs[d] = b
	return d
}

func (m *memory) Info(_ context.Context, d digest.Digest) (ccontent.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	b, ok := m.blobs[d]
	if !ok {
		return ccontent.Info{}, fmt.Errorf("blob %s: %w", d, errdefs.ErrNotFound)
	}
	return ccontent.Info{Digest: d, Size: int64(len(b))}, nil
}

type memoryReader struct {
	*bytes.Reader
	m *memory
}

func (r memoryReader) Close() error {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.m.open--
	return nil
}

func (m *memory) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error) {
	if _, err := m.Info(ctx, desc.Digest); err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.opened++
	m.open++
	return memoryReader{bytes.NewReader(m.blobs[desc.Digest]), m}, nil
}

func (m *memory) Walk(ctx context.Context, fn ccontent.WalkFunc, _ ...string) error {
	m.mu.Lock()
	var all []ccontent.Info
	for d, b := range m.blobs {
		all = append(all, ccontent.Info{Digest: d, Size: int64(len(b))})
	}
	m.mu.Unlock()
	for _, i := range all {
		if err := fn(i); err != nil {
			return err
		}
	}
	return nil
}

// putImage stores a config and a manifest for the layers, and returns the manifest's digest.
func putImage(t testing.TB, m *memory, layers []ocispec.Descriptor, diffIDs []digest.Digest) digest.Digest {
	t.Helper()
	var config ocispec.Image
	config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: diffIDs}
	c := m.put(t, config)
	return m.put(t, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: c, Size: 1},
		Layers:    layers,
	})
}

func layerOf(content string) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString(content), Size: int64(len(content))}
}

func startCatalog(t *testing.T, m *memory) *catalog {
	t.Helper()
	c := newCatalog()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); c.run(ctx, m) }()
	t.Cleanup(func() { cancel(); <-done })
	return c
}

func TestCatalogSurvivesARestart(t *testing.T) {
	t.Parallel()
	m := &memory{}
	a, b := layerOf("a"), layerOf("bb")
	ids := []digest.Digest{digest.FromString("A"), digest.FromString("B")}
	want := putImage(t, m, []ocispec.Descriptor{a, b}, ids)
	c := startCatalog(t, m)
	if err := c.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	got := c.listing(b.Digest, b.Size)
	if len(got) != 1 || got[0].digest != want {
		t.Fatalf("listing of layer b: want manifest %s, got %v", want, got)
	}
	if id := c.diffID(got[0], b.Digest); id != ids[1] {
		t.Errorf("DiffID of layer b: want %s, got %s", ids[1], id)
	}
	if got := c.listing(b.Digest, b.Size+1); len(got) != 0 {
		t.Errorf("a size that no manifest names was believed: %v", got)
	}
}

func TestCatalogReadsWhatIsAnnounced(t *testing.T) {
	t.Parallel()
	m := &memory{}
	c := startCatalog(t, m)
	l := layerOf("layer")
	first := putImage(t, m, []ocispec.Descriptor{l}, []digest.Digest{l.Digest})
	second := putImage(t, m, []ocispec.Descriptor{l, layerOf("more")}, []digest.Digest{l.Digest, l.Digest})
	for _, d := range []digest.Digest{first, second} {
		c.announce(d, 100)
	}
	if err := c.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	var got []digest.Digest
	for _, m := range c.listing(l.Digest, l.Size) {
		got = append(got, m.digest)
	}
	if want := []digest.Digest{second, first}; !slices.Equal(got, want) {
		t.Errorf("want the most recent manifest first: %v, got %v", want, got)
	}
	if m := c.forget(t.Context(), first); m != nil {
		t.Error("a manifest that is in the store again was forgotten")
	}
	m.blobs = nil
	for _, d := range []digest.Digest{first, second} {
		if m := c.forget(t.Context(), d); m == nil || m.digest != d {
			t.Errorf("want manifest %s forgotten, got %v", d, m)
		}
	}
	if got := c.listing(l.Digest, l.Size); len(got) != 0 {
		t.Errorf("deleted manifests are still listed: %v", got)
	}
}

func TestCatalogPassesOverOtherBlobs(t *testing.T) {
	t.Parallel()
	m := &memory{}
	for name, b := range map[string][]byte{
		"text":             []byte("hello"),
		"half JSON":        []byte(`{"layers": [`),
		"wrong types":      []byte(`{"layers": 3, "config": []}`),
		"invalid digest":   []byte(`{"config":{"digest":"sha256:1"},"layers":[{"digest":"../../etc","size":1}]}`),
		"negative size":    []byte(`{"config":{"digest":"x"},"layers":[{"digest":"` + digest.FromString("n").String() + `","size":-1}]}`),
		"diff ids too few": []byte(`{"rootfs":{"diff_ids":[]}}`),
	} {
		_ = name
		m.put(t, b)
	}
	c := startCatalog(t, m)
	if err := c.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(c.manifests) != 0 || len(c.configs) != 0 {
		t.Errorf("want an empty catalog, got %v and %v", c.manifests, c.configs)
	}
}

// A document may name so many layers that holding them takes the node's memory.
func TestCatalogBoundsTheLayersOfADocument(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		n    int
		want bool
	}{"as many as may be": {maxLayers, true}, "one more": {maxLayers + 1, false}, "millions": {2 << 20, false}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := `{"digest":"` + digest.FromString("l").String() + `","size":1}`
			if tc.n > maxLayers+1 {
				l = "{}"
			}
			m := &memory{}
			d := m.put(t, []byte(`{"config":{"digest":"x"},"layers":[`+l+strings.Repeat(","+l, tc.n-1)+`],"rootfs":{"diff_ids":["a"]}}`))
			c := newCatalog()
			c.blobs = m
			c.read(t.Context(), d)
			if got := c.manifests[d] != nil; got != tc.want {
				t.Errorf("a manifest of %d layers: kept %t, want %t", tc.n, got, tc.want)
			}
			ids := m.put(t, []byte(`{"rootfs":{"diff_ids":["a"`+strings.Repeat(`,"a"`, tc.n-1)+`]}}`))
			c.read(t.Context(), ids)
			if got := c.configs[ids].chain != ""; got != tc.want {
				t.Errorf("a config of %d layers: kept %t, want %t", tc.n, got, tc.want)
			}
		})
	}
}

func TestSettleEndsWithItsContext(t *testing.T) {
	t.Parallel()
	c := newCatalog() // never run: nothing settles
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := c.settle(ctx); err == nil {
		t.Error("want the end of the context, got nil")
	}
}

func FuzzCatalog(f *testing.F) {
	f.Add([]byte(`{"config":{"digest":"sha256:1"},"layers":[{"digest":"x","size":1}],"rootfs":{"diff_ids":["y"]}}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &memory{}
		d := m.put(t, b)
		c := newCatalog()
		c.blobs = m
		c.read(t.Context(), d)
		for _, m := range c.manifests {
			for _, l := range m.layers {
				if l.Digest.Validate() != nil || l.Size <= 0 {
					t.Errorf("kept the layer %v", l)
				}
				_ = c.diffID(m, l.Digest)
			}
		}
	})
}

var _ io.ReaderAt = memoryReader{}
