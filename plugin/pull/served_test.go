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
		if err := f.served(t.Context(), "default", l.Digest, l.Size); err != nil { // as Committed does, but here and now
			t.Fatal(err)
		}
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
	if err := f.served(t.Context(), "default", second.Digest, second.Size); err != nil { // as Committed does
		t.Fatal(err)
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

// tidied waits until all is done that was begun in the background. The catalog goes on by itself, so it is not waited for.
func tidied(f *fixture) {
	done := make(chan struct{})
	f.background(func(context.Context) error { close(done); return nil }, "")
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
	f.wantedNoMore(t.Context(), l.Digest, l.Size, id)
	if err := f.layers.Sweep(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if _, err := f.layers.Get(t.Context(), id); err != nil {
		t.Errorf("a pull under way lost its layer: %v", err)
	}
}
