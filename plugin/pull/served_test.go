package pull

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestFailedPullKeepsTransfers deletes, as containerd's garbage collection does, a layer whose image never became complete:
// a retry finds it. Once the image is complete, a deletion frees the layer for good.
func TestFailedPullKeepsTransfers(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	first, firstID := f.addLayer(t, 1, 1<<16)
	second, secondID := f.addLayer(t, 2, 1<<16)
	f.addImage(t, "default", []ocispec.Descriptor{first, second}, []digest.Digest{firstID, secondID})
	f.Start(t.Context(), f.images)
	shown := func(l ocispec.Descriptor) {
		t.Helper()
		if err := f.take(t, "default", l); err != nil {
			t.Fatal(err)
		}
		f.commit(l.Digest)
		f.Committed("default", l.Digest, l.Size)
		tidied(f)
	}
	deleted := func(l ocispec.Descriptor) {
		f.images.mu.Lock()
		delete(f.images.blobs, l.Digest)
		f.images.mu.Unlock()
		f.Deleted(l.Digest)
	}
	kept := func() (n int) {
		m, err := f.transfers("")
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range m.List() {
			if s.Digest == first.Digest {
				n++
			}
		}
		return n
	}
	shown(first)
	endImages(f)
	deleted(first)
	tidied(f)
	if kept() == 0 {
		t.Fatal("the transfer of a layer was removed although its image is not complete")
	}
	asked := f.asked(first.Digest)
	shown(first)
	if got := f.asked(first.Digest); got != asked {
		t.Errorf("the retry asked the registry %d times for the layer, want 0", got-asked)
	}
	shown(second)
	tidied(f)
	endImages(f)
	deleted(first)

	eventually(t, "the transfer of a deleted layer of a complete image to be removed", func() bool { return kept() == 0 })
}

// TestCompletePullFreesLayers sweeps after a snapshot had the layer and was removed: the layer stays for the retry of a
// pull that is not complete, and goes at once when it is.
func TestCompletePullFreesLayers(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	first, firstID := f.addLayer(t, 1, 1<<16)
	second, secondID := f.addLayer(t, 2, 1<<16)
	f.addImage(t, "default", []ocispec.Descriptor{first, second}, []digest.Digest{firstID, secondID})
	f.Start(t.Context(), f.images)
	unpack := func(l ocispec.Descriptor, id digest.Digest) {
		t.Helper()
		if err := f.take(t, "default", l); err != nil {
			t.Fatal(err)
		}
		f.commit(l.Digest)
		f.Committed("default", l.Digest, l.Size)
		tidied(f)
		if _, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l); err != nil {
			t.Fatal(err)
		}
		dst := filepath.Join(t.TempDir(), "layer")
		if err := errors.Join(f.layers.Link(id, dst), os.Remove(dst)); err != nil {
			t.Fatal(err)
		}
	}
	swept := func(l ocispec.Descriptor) bool {
		t.Helper()
		if err := f.layers.Sweep(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		_, err := f.layers.Lookup(l.Digest)
		return errdefs.IsNotFound(err)
	}
	unpack(first, firstID)
	if swept(first) {
		t.Error("a layer was swept although its image is not complete")
	}
	unpack(second, secondID)
	if !swept(second) {
		t.Error("the last layer of a complete image was not swept")
	}
	if !swept(first) {
		t.Error("the first layer of a complete image was not swept")
	}
}

// endImages ends all images, as after the grace period.
func endImages(f *fixture) {
	f.Puller.mu.Lock()
	images := slices.Collect(maps.Values(f.Puller.images))
	f.Puller.mu.Unlock()
	for _, img := range images {
		f.end(img)
	}
}

// tidied waits until what was told so far is dealt with.
func tidied(f *fixture) {
	done := make(chan struct{})
	f.later("", func(context.Context) error { close(done); return nil })
	<-done
}

// A layer that is made, or started ahead, when the client has the whole image already is not kept for it.
func TestNotWantedByACompleteImage(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<20)
	m := f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.images.put(t, f.blobs[l.Digest])
	f.Start(t.Context(), f.images)
	w, err := f.Fetch(t.Context(), request("default", l))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	made := func() {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if u := f.running(f.unpackKey("default", l.Digest, l.Size)); u == nil {
				if _, err := f.layers.Lookup(l.Digest); err == nil {
					return
				}
			}
			if time.Now().After(deadline) {
				t.Fatal("the layer is not unpacked")
			}
		}
	}
	served := func() {
		t.Helper()
		link := filepath.Join(t.TempDir(), "link")
		if err := errors.Join(f.layers.Link(id, link), os.Remove(link)); err != nil {
			t.Fatal(err)
		}
	}
	swept := func(what string) {
		t.Helper()
		if err := f.layers.Sweep(t.Context(), time.Hour); err != nil {
			t.Fatal(err)
		}
		if _, err := f.layers.Get(t.Context(), id); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the layer file is kept: %v", what, err)
		}
	}
	made()
	served()
	f.follow(t.Context(), &image{key: imageKey{"default", m}}, f.catalog.listing(l.Digest, l.Size)[0], l.Digest, l.Size)
	swept("started ahead")
	if err := w.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Layer(t.Context(), l); err != nil { // is made once more
		t.Fatal(err)
	}
	made()
	served()
	swept("unpacked")

	// An image that misses another layer counts on it, whatever others do.
	other, otherID := f.addLayer(t, 2, 1<<20)
	under := f.addImage(t, "default", []ocispec.Descriptor{l, other}, []digest.Digest{id, otherID})
	f.catalog.announce(under, int64(len(f.images.blobs[under])))
	if err := f.catalog.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Layer(t.Context(), l); err != nil {
		t.Fatal(err)
	}
	made()
	served()
	f.layers.Want(id)
	f.wantedNoMore(l.Digest, l.Size, id)
	if err := f.layers.Sweep(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := f.layers.Get(t.Context(), id); err != nil {
		t.Errorf("a pull under way lost its layer: %v", err)
	}
}

// Of an image whose lowest layers the client has as snapshots, it asks for the others only.
func TestNothingBelowTheFirstLayerAskedForIsFetched(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	var layers []ocispec.Descriptor
	var ids []digest.Digest
	for i := range uint64(4) {
		l, id := f.addLayer(t, i, 1<<16)
		layers, ids = append(layers, l), append(ids, id)
	}
	f.addImage(t, "default", layers, ids)
	f.Start(t.Context(), f.images)
	if err := f.take(t, "default", layers[2]); err != nil {
		t.Fatal(err)
	}
	arrived := func(l ocispec.Descriptor) func() bool {
		return func() bool { _, err := f.layers.Lookup(l.Digest); return err == nil }
	}
	eventually(t, "the layer above to come unasked", arrived(layers[3]))
	if got := f.asked(layers[0].Digest) + f.asked(layers[1].Digest); got > 0 {
		t.Errorf("the registry was asked %d times for layers below the first that the client asked for", got)
	}
	if err := f.take(t, "default", layers[0]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the layer between to come unasked", arrived(layers[1]))
}

// skipped is an image of which the client had the lowest layer as a snapshot: it took and mounted the other one. A third
// was never asked for, though gantry has fetched it.
type skipped struct {
	*fixture
	manifest   digest.Digest
	has, ahead ocispec.Descriptor
	snapshot   string // what the client made of the layer it took
}

func skipLowest(t *testing.T) *skipped {
	t.Helper()
	f := newFixture(t, false)
	s := &skipped{fixture: f, snapshot: filepath.Join(t.TempDir(), "layer")}
	lowest, lowestID := f.addLayer(t, 1, 1<<16)
	has, hasID := f.addLayer(t, 2, 1<<16)
	ahead, aheadID := f.addLayer(t, 3, 1<<16)
	s.has, s.ahead = has, ahead
	ids := []digest.Digest{lowestID, hasID, aheadID}
	s.manifest = f.addImage(t, "default", []ocispec.Descriptor{lowest, has, ahead}, ids)
	f.Start(t.Context(), f.images)
	if err := f.take(t, "default", has); err != nil {
		t.Fatal(err)
	}
	f.commit(has.Digest)
	f.Committed("default", has.Digest, has.Size)
	if _, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), has); err != nil {
		t.Fatal(err)
	}
	if err := f.layers.Link(hasID, s.snapshot); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the next layer to be unpacked ahead", func() bool { return s.there(ahead) })
	f.SnapshotCommitted("default", "default/12/"+identity.ChainID(ids[:2]).String())
	tidied(f)
	if f.there(lowest) {
		t.Error("the layer that the client has was fetched")
	}
	f.SnapshotCommitted("default", "default/13/"+identity.ChainID(ids).String())
	tidied(f)
	return s
}

func (f *fixture) there(l ocispec.Descriptor) bool {
	_, err := f.layers.Lookup(l.Digest)
	return err == nil
}

func (s *skipped) delete(d digest.Digest) {
	s.images.mu.Lock()
	delete(s.images.blobs, d)
	s.images.mu.Unlock()
	s.Deleted(d)
	tidied(s.fixture)
}

func (s *skipped) transfers(t *testing.T) int {
	t.Helper()
	m, err := s.fixture.transfers("")
	if err != nil {
		t.Fatal(err)
	}
	return len(m.List())
}

// Without all its blobs, as containerd keeps it with discard_unpacked_layers, an image is served when its uppermost snapshot
// is there: nothing of it is kept for a retry.
func TestServedWithoutAllBlobs(t *testing.T) {
	t.Parallel()
	s := skipLowest(t)
	s.Puller.mu.Lock()
	images := len(s.Puller.images)
	s.Puller.mu.Unlock()
	if images > 0 {
		t.Error("layers of an image that the client has are still fetched ahead")
	}
	if err := os.Remove(s.snapshot); err != nil {
		t.Fatal(err)
	}
	if err := s.layers.Sweep(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if s.there(s.has) {
		t.Error("a layer is kept although its last snapshot is gone")
	}
}

// What the client never had goes with the image, whatever is removed first.
func TestRemovedImageLeavesNothing(t *testing.T) {
	t.Parallel()
	for name, manifestFirst := range map[string]bool{"manifest first": true, "layer first": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := skipLowest(t)
			if err := s.layers.Sweep(t.Context(), time.Hour); err != nil {
				t.Fatal(err)
			}
			if !s.there(s.ahead) || !s.there(s.has) {
				t.Fatal("a layer went before the image")
			}
			if manifestFirst {
				s.delete(s.manifest)
			}
			s.delete(s.has.Digest)
			if !manifestFirst {
				s.delete(s.manifest)
			}
			if s.there(s.ahead) {
				t.Error("the layer file of an image that was removed is kept")
			}
			if !s.there(s.has) {
				t.Error("a layer went before its snapshot")
			}
			if n := s.transfers(t); n > 0 {
				t.Errorf("%d transfers are kept", n)
			}
			if err := errors.Join(os.Remove(s.snapshot), s.layers.Sweep(t.Context(), time.Hour)); err != nil {
				t.Fatal(err)
			}
			if s.there(s.has) {
				t.Error("a layer is kept although its last snapshot is gone")
			}
		})
	}
}

// A layer that is still being unpacked when its image is removed is not kept for a retry.
func TestRemovedWhileItIsUnpacked(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<20)
	m := f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	if err := f.workers.Acquire(t.Context(), int64(workersInTests)); err != nil { // nothing can be unpacked
		t.Fatal(err)
	}
	if err := f.take(t, "default", l); err != nil {
		t.Fatal(err)
	}
	f.commit(l.Digest)
	f.Committed("default", l.Digest, l.Size)
	for _, d := range []digest.Digest{m, l.Digest} {
		f.images.mu.Lock()
		delete(f.images.blobs, d)
		f.images.mu.Unlock()
		f.Deleted(d)
	}
	tidied(f)
	u := f.running(f.unpackKey("default", l.Digest, l.Size))
	if u == nil {
		t.Fatal("the unpack ended without a worker")
	}
	f.workers.Release(int64(workersInTests))
	if _, err := u.wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.there(l) {
		t.Error("the layer file of an image that was removed is kept")
	}
}
