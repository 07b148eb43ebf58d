package pull

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content"
)

func newDiscardingFixture(t *testing.T, isolated bool) *fixture {
	t.Helper()
	f := newFixture(t, isolated)
	f.discard = true
	return f
}

// record waits for a layer as a client does and returns what is left of it.
func (f *fixture) record(t *testing.T, namespace string, l ocispec.Descriptor) (*content.Record, error) {
	t.Helper()
	w, err := f.Fetch(t.Context(), request(namespace, l))
	if err != nil {
		return nil, err
	}
	defer w.Close()
	if err := w.Wait(t.Context()); err != nil {
		return nil, err
	}
	r := w.(content.Discarding).Record()
	if r == nil {
		path := filepath.Join(t.TempDir(), "link")
		if err := w.LinkTo(path); err != nil {
			return nil, err
		}
		if got, err := os.ReadFile(path); err != nil || digest.FromBytes(got) != l.Digest {
			t.Errorf("the file that was kept has %d bytes, %v", len(got), err)
		}
	}
	return r, nil
}

func TestUnpackedLayersAreDiscarded(t *testing.T) {
	t.Parallel()
	for _, isolated := range []bool{false, true} {
		f := newDiscardingFixture(t, isolated)
		l, id := f.addLayer(t, 1, 5<<20)
		m := f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
		f.Start(t.Context(), f.images)
		r, err := f.record(t, "default", l)
		if err != nil || r == nil {
			t.Fatalf("record %v, %v", r, err)
		}
		if r.Digest != l.Digest || r.Size != l.Size || len(r.Sums) != 6 || r.Namespace != "default" ||
			len(r.Origins) != 1 || r.Origins[0].String() != f.host()+"/test/image" {
			t.Errorf("record %+v", r)
		}
		if got, err := f.layers.Lookup(l.Digest); err != nil || got != id {
			t.Errorf("the layer was not recorded before its blob was: %s, %v", got, err)
		}
		asked := f.asked(l.Digest)
		again, err := f.record(t, "default", l) // containerd deleted it, because the pull failed for another layer
		if err != nil || again == nil || f.asked(l.Digest) != asked {
			t.Errorf("a retry gets %v, %v, after %d requests more", again, err, f.asked(l.Digest)-asked)
		}
		if isolated {
			f.pulled("other", m, "127.0.0.1", "test/image")
			f.prepare("other", m, f.host()+"/test/image:latest")
			if r, err := f.record(t, "other", l); err != nil || r != nil && r.Namespace != "other" || f.asked(l.Digest) == asked {
				t.Errorf("another namespace did not fetch for itself: %v, %v", r, err)
			}
		}
	}
}

// The layer file is there from an earlier pull: nothing unpacks the blob, and it is discarded all the same.
func TestLayersThatAreThereAreDiscarded(t *testing.T) {
	t.Parallel()
	f := newDiscardingFixture(t, false)
	l, id := f.addLayer(t, 1, 3<<20)
	f.images.put(t, f.blobs[l.Digest])
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	if _, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l); err != nil {
		t.Fatal(err)
	}
	if r, err := f.record(t, "default", l); err != nil || r == nil {
		t.Errorf("record %v, %v", r, err)
	}
}

// An image is removed, layer files and all, and pulled again while gantryd still has its transfers: they have nothing to
// unpack any more, and nobody waits for them.
func TestRemovedLayersAreFetchedAgain(t *testing.T) {
	t.Parallel()
	f := newDiscardingFixture(t, false)
	first, firstID := f.addLayer(t, 1, 1<<20)
	second, secondID := f.addLayer(t, 2, 1<<20)
	f.addImage(t, "default", []ocispec.Descriptor{first, second}, []digest.Digest{firstID, secondID})
	f.Start(t.Context(), f.images)
	for try := range 2 {
		for _, l := range []ocispec.Descriptor{first, second} {
			if r, err := f.record(t, "default", l); err != nil || r == nil {
				t.Fatalf("try %d: record %v, %v", try, r, err)
			}
		}
		for _, id := range []digest.Digest{firstID, secondID} {
			if err := f.layers.Drop(id); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// What nobody unpacks is kept: an artifact, whose config names no layers.
func TestLayersThatAreNotUnpackedAreKept(t *testing.T) {
	t.Parallel()
	f := newDiscardingFixture(t, false)
	l, _ := f.addLayer(t, 1, 3<<20)
	f.addImage(t, "default", []ocispec.Descriptor{l}, nil)
	f.Start(t.Context(), f.images)
	if r, err := f.record(t, "default", l); err != nil || r != nil {
		t.Errorf("record %v, %v; want none", r, err)
	}
}

// The unpack fails behind bytes that are gone: the client fetches the blob from its first byte, which is kept, and Apply
// names what is wrong.
func TestBadLayerIsNotDiscarded(t *testing.T) {
	t.Parallel()
	f := newDiscardingFixture(t, false)
	l, id := f.addLayer(t, 1, 6<<20)
	b := bytes.Clone(f.blobs[l.Digest])
	b[len(b)-200<<10] ^= 0xff
	l = f.addBlob(b)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	from, err := writeAs(ctx, f.store, "default/1/layer-"+l.Digest.String(), b)
	if err != nil {
		t.Fatal(err)
	}
	if from != 0 {
		t.Errorf("the client goes on at %d, want from the start", from)
	}
	if f.store.Discarded(l.Digest) {
		t.Error("a layer that nobody unpacked was discarded")
	}
	if got, err := ccontent.ReadBlob(ctx, f.store, l); err != nil || !bytes.Equal(got, b) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	f.images.put(t, b)
	if _, _, err := f.Layer(ctx, l); err == nil || !strings.Contains(err.Error(), l.Digest.String()) {
		t.Errorf("Apply says %v", err)
	}
}

// A discarded blob is read through the store, checked, also by an unpack whose layer file is lost; and never to find out
// whether it is a manifest.
func TestDiscardedBlobIsReadAgain(t *testing.T) {
	t.Parallel()
	f := newDiscardingFixture(t, false)
	l, id := f.addLayer(t, 1, 5<<20)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	seen := &seenBlobs{Blobs: f.images, layers: f.store}
	f.Start(t.Context(), seen)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	if from, err := writeAs(ctx, f.store, "default/1/layer-"+l.Digest.String(), f.blobs[l.Digest]); err != nil || from != l.Size {
		t.Fatalf("from %d, %v", from, err)
	}
	if !f.store.Discarded(l.Digest) {
		t.Fatal("not discarded")
	}
	f.mu.Lock()
	f.answer = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusNotFound)
		return true
	}
	f.mu.Unlock()
	_, err := ccontent.ReadBlob(ctx, f.store, l)
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), f.host()) {
		t.Errorf("a read of what the registry has no more: %v", err)
	}
	f.mu.Lock()
	f.answer = nil
	f.mu.Unlock()
	if got, err := ccontent.ReadBlob(ctx, f.store, l); err != nil || !bytes.Equal(got, f.blobs[l.Digest]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	path := layerFile(t, f, id)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	f.blobs = nil // from here on only what was fetched a moment ago
	seen.all.Store(true)
	if got, _, err := f.Layer(ctx, l); err != nil || got != id {
		t.Errorf("Apply of a layer whose file is lost: %s, %v", got, err)
	}
}

// seenBlobs shows an image's documents, and its layers too once all is set.
type seenBlobs struct {
	Blobs
	layers Blobs
	all    atomic.Bool
}

func (s *seenBlobs) of() Blobs {
	if s.all.Load() {
		return s.layers
	}
	return s.Blobs
}

// Info implements Blobs.
func (s *seenBlobs) Info(ctx context.Context, d digest.Digest) (ccontent.Info, error) {
	return s.of().Info(ctx, d)
}

// ReaderAt implements Blobs.
func (s *seenBlobs) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error) {
	return s.of().ReaderAt(ctx, desc)
}

// Discarded implements Blobs.
func (s *seenBlobs) Discarded(d digest.Digest) bool { return s.of().Discarded(d) }

func layerFile(t *testing.T, f *fixture, id digest.Digest) string {
	t.Helper()
	l, err := f.layers.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	return l.Path
}

func TestCatalogDoesNotReadDiscardedBlobs(t *testing.T) {
	t.Parallel()
	m := &memory{}
	d := m.put(t, []byte("{}"))
	m.discarded = map[digest.Digest]bool{d: true}
	c := startCatalog(t, m)
	c.announce(d, 2)
	if err := c.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m.opened > 0 {
		t.Error("a discarded blob was fetched to look into it")
	}
}
