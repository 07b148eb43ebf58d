package pull

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content/transfer"
)

// eventually waits for what happens in the background.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 2000 {
		if done() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("waited in vain for %s", what)
}

// holdFrom makes the registry send the bytes below from, and nothing more until
// the returned function is called.
func (f *fixture) holdFrom(t *testing.T, d digest.Digest, from int64) (release func()) {
	t.Helper()
	gate := make(chan struct{})
	f.answer = func(_ http.ResponseWriter, r *http.Request) bool {
		if filepath.Base(r.URL.Path) != d.String() || firstByte(t, r) < from {
			return false
		}
		select {
		case <-gate:
		case <-r.Context().Done():
		}
		return false
	}
	release = sync.OnceFunc(func() { close(gate) })
	t.Cleanup(release)
	return release
}

// join fetches a layer and waits for its first bytes.
func (f *fixture) join(t *testing.T, namespace string, l ocispec.Descriptor) *waiter {
	t.Helper()
	w, err := f.Fetch(t.Context(), request(namespace, l))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first bytes", func() bool { return w.Frontier() > 0 })
	return w.(*waiter)
}

// waiters counts who waits for the transfers of a blob.
func (f *fixture) waiters(t *testing.T, d digest.Digest) (n int) {
	t.Helper()
	m, err := f.transfers("default")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range m.List() {
		if s.Digest == d && s.Phase != transfer.PhaseFailed {
			n += s.Waiters
		}
	}
	return n
}

func (f *fixture) commit(d digest.Digest) {
	f.mu.Lock()
	b := f.blobs[d]
	f.mu.Unlock()
	f.images.mu.Lock()
	defer f.images.mu.Unlock()
	f.images.blobs[d] = b
}

func closed(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// One layer of an image is refused while another arrives. When its client leaves,
// nothing of gantry keeps that transfer going.
func TestFailedImageKeepsNoTransferGoing(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	slow, slowID := f.addLayer(t, 1, 4<<20)
	lost, lostID := f.addLayer(t, 2, 1000)
	f.holdFrom(t, slow.Digest, 1<<20)
	hold := f.answer
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if filepath.Base(r.URL.Path) == lost.Digest.String() {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return hold(w, r)
	}
	f.addImage(t, "default", []ocispec.Descriptor{slow, lost}, []digest.Digest{slowID, lostID})
	f.Start(t.Context(), f.images)
	w := f.join(t, "default", slow)
	if err := f.take(t, "default", lost); err == nil {
		t.Fatal("want the refusal, got a blob")
	}
	if n := f.waiters(t, slow.Digest); n == 0 {
		t.Fatal("the transfer that works was given up with the one that does not")
	}
	closed(t, w)
	f.end(w.image) // as after the grace period
	eventually(t, "the transfer to be left", func() bool { return f.waiters(t, slow.Digest) == 0 })
}

// The image ends between the start of a transfer and the start of its unpack.
func TestUnpackOfAnEndedImageIsNotStarted(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	f.holdFrom(t, l.Digest, 1<<20)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	w := f.join(t, "default", l)
	closed(t, w)
	f.end(w.image)
	eventually(t, "the transfer to be left", func() bool { return f.waiters(t, l.Digest) == 0 })
	m := f.catalog.listing(l.Digest, l.Size)[0]
	f.follow(t.Context(), w.image, m, l.Digest, l.Size)
	eventually(t, "the transfer to be left again", func() bool { return f.waiters(t, l.Digest) == 0 })
}

// Two images share a layer: it is unpacked once, and goes on until both are gone.
func TestSharedLayerIsHeldByBothImages(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	other, otherID := f.addLayer(t, 2, 1000)
	f.holdFrom(t, l.Digest, 1<<20)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	first := f.join(t, "default", l)
	f.announceImage(t, "default", []ocispec.Descriptor{l, other}, []digest.Digest{id, otherID})
	second := f.join(t, "default", l)
	if first.image == second.image {
		t.Fatal("want two images, got one")
	}
	u := f.running(f.unpackKey("default", l.Digest, l.Size))
	for i, w := range []*waiter{first, second} {
		select {
		case <-u.done:
			t.Fatalf("the unpack ended although image %d waits: %v", i+1, u.err)
		default:
		}
		closed(t, w)
		f.end(w.image)
	}
	if _, err := u.wait(t.Context()); err == nil {
		t.Error("want the unpack to end with its last image, got a layer")
	}
	eventually(t, "the transfer to be left", func() bool { return f.waiters(t, l.Digest) == 0 })
}

// announceImage is addImage after Start.
func (f *fixture) announceImage(t *testing.T, namespace string, layers []ocispec.Descriptor, ids []digest.Digest) {
	t.Helper()
	m := f.addImage(t, namespace, layers, ids)
	f.images.mu.Lock()
	defer f.images.mu.Unlock()
	for d, b := range f.images.blobs {
		if d != m {
			f.Committed(namespace, d, int64(len(b)))
		}
	}
	f.Committed(namespace, m, int64(len(f.images.blobs[m]))) // last: the most recent image is preferred
}

// A client that fetches by itself takes longer than the grace period: the unpack
// that follows it goes on.
func TestUnpackFollowsASlowClient(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if firstByte(t, r) < 1<<20 {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	data := f.blobs[l.Digest]
	s, err := f.store.Open(ctx, "default/1/layer-"+l.Digest.String(), l.Size, "")
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, s)
	st, err := s.Status(ctx)
	if err != nil || st.Offset == 0 || st.Offset == l.Size {
		t.Fatalf("want a partial takeover, got %+v, %v", st, err)
	}
	half := (st.Offset + l.Size) / 2
	count, err := s.Write(ctx, 0, data[st.Offset:half])
	if err != nil {
		t.Fatal(err)
	}
	f.Puller.mu.Lock()
	var images []*image
	for _, img := range f.Puller.images {
		images = append(images, img)
	}
	f.Puller.mu.Unlock()
	for _, img := range images {
		f.end(img) // as after the grace period
	}
	if count, err = s.Write(ctx, count, data[half:]); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Commit(ctx, count, l.Size, l.Digest, nil); err != nil {
		t.Fatal(err)
	}
	f.commit(l.Digest)
	if got, _, err := f.Layer(ctx, l); err != nil || got != id {
		t.Fatalf("want %s, got %s, %v", id, got, err)
	}
	for _, u := range f.Recent() {
		if u.Error != "" {
			t.Errorf("the unpack was given up while its client wrote: %s", u.Error)
		}
	}
}

// A pull fails and is tried again at once: the unpack that the first left waiting for bytes gets those of the second.
func TestUnpackGoesOnWithARetry(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<16)
	var refuse atomic.Bool
	refuse.Store(true)
	f.answer = func(w http.ResponseWriter, _ *http.Request) bool {
		if !refuse.Load() {
			return false
		}
		w.WriteHeader(http.StatusNotFound)
		return true
	}
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	if err := f.take(t, "default", l); err == nil {
		t.Fatal("want the refusal, got a blob")
	}
	u := f.running(f.unpackKey("default", l.Digest, l.Size))
	if u == nil {
		t.Fatal("want the unpack to wait for bytes")
	}
	eventually(t, "the unpack to be without bytes", func() bool {
		source, _ := u.current()
		return source == nil
	})
	refuse.Store(false)
	if err := f.take(t, "default", l); err != nil {
		t.Fatal(err)
	}
	if got, err := u.wait(t.Context()); err != nil || got.DiffID != id {
		t.Errorf("got %+v, %v; want the unpack that waited to have gone on to %s", got, err, id)
	}
}

// gated is a source of bytes that are not the blob's.
type gated struct {
	*bytes.Reader
	gate chan struct{}
}

func (g gated) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	select {
	case <-g.gate:
		return g.Reader.ReadAt(p, off)
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}
func (gated) Verified(context.Context) error { return fmt.Errorf("never asked") }
func (gated) End() (int64, bool)             { return 0, false }
func (gated) Lasts() bool                    { return false }
func (gated) Close() error                   { return nil }

// An unpack that trips over bytes nobody has verified says nothing about the blob.
func TestLayerIsNotJudgedByUnverifiedBytes(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<16)
	f.images.put(t, f.blobs[l.Digest])
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	bad := bytes.Clone(f.blobs[l.Digest])
	bad[len(bad)/2] ^= 0xff
	gate := make(chan struct{})
	u, err := f.unpack(t.Context(), f.unpackKey("default", l.Digest, l.Size), func() (byteSource, error) {
		return gated{bytes.NewReader(bad), gate}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l)
			if err != nil || got != id {
				t.Errorf("want %s from the blob in the store, got %s, %v", id, got, err)
			}
		})
	}
	eventually(t, "the requests to wait", func() bool {
		f.Puller.mu.Lock()
		defer f.Puller.mu.Unlock()
		return u.holders == 4
	})
	close(gate)
	wg.Wait()
	f.images.mu.Lock()
	defer f.images.mu.Unlock()
	if f.images.open != 0 {
		t.Errorf("%d readers of the store were left open", f.images.open)
	}
}

// Many ask for a layer at once: one unpack, and every reader is closed.
func TestLayersAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<20)
	f.images.put(t, f.blobs[l.Digest])
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l); err != nil || got != id {
				t.Errorf("want %s, got %s, %v", id, got, err)
			}
		})
	}
	wg.Wait()
	if n := len(f.Recent()); n != 1 {
		t.Errorf("want one unpack, got %d", n)
	}
	f.images.mu.Lock()
	defer f.images.mu.Unlock()
	if f.images.open != 0 {
		t.Errorf("%d readers of the store were left open", f.images.open)
	}
}

// The only host sends wrong bytes first and the right ones when it is asked again.
func TestRestartedTransfer(t *testing.T) {
	t.Parallel()
	for name, add := range map[string]func(f *fixture) (ocispec.Descriptor, digest.Digest){
		"wrong bytes unpack": func(f *fixture) (ocispec.Descriptor, digest.Digest) {
			l := f.addPlainLayer(t, 2<<20)
			return l, l.Digest
		},
		"wrong bytes do not": func(f *fixture) (ocispec.Descriptor, digest.Digest) { return f.addLayer(t, 3, 2<<20) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, false)
			l, id := add(f)
			bad := f.spoiled(l.Digest)
			var mu sync.Mutex
			sent := map[int64]bool{}
			f.answer = func(w http.ResponseWriter, r *http.Request) bool {
				mu.Lock()
				defer mu.Unlock()
				from := firstByte(t, r)
				if sent[from] {
					return false
				}
				sent[from] = true
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(bad))
				return true
			}
			f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
			f.Start(t.Context(), f.images)
			if err := f.take(t, "default", l); err != nil {
				t.Fatal(err)
			}
			f.commit(l.Digest)
			got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l)
			if err != nil || got != id {
				t.Errorf("want %s, got %s, %v", id, got, err)
			}
			if got, err := f.layers.Lookup(l.Digest); err != nil || got != id {
				t.Errorf("on record: want %s, got %s, %v", id, got, err)
			}
		})
	}
}

// What a failed transfer left behind goes when it turns out wrong, so that a retry
// under any ref begins anew.
func TestMismatchForgetsTheTransfer(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	bad := f.spoiled(l.Digest)
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if firstByte(t, r) >= 1<<20 {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(bad))
		return true
	}
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	if _, err := writeAs(ctx, f.store, "default/1/layer-"+l.Digest.String(), f.blobs[l.Digest]); err == nil {
		t.Fatal("want the commit of wrong bytes to fail")
	}
	f.mu.Lock()
	f.answer = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	f.mu.Unlock()
	eventually(t, "a retry under another ref that gets no byte of it", func() bool {
		from, err := writeAs(ctx, f.store, fmt.Sprintf("default/%d/layer-%s", time.Now().UnixNano(), l.Digest), f.blobs[l.Digest])
		return err == nil && from == 0
	})
}

// blockingLabels is a containerd that does not answer.
type blockingLabels struct{ asked chan struct{} }

func (b blockingLabels) Labels(ctx context.Context, _ string, _ digest.Digest) (map[string]string, error) {
	close(b.asked)
	<-ctx.Done()
	return nil, context.Cause(ctx)
}

// A client that goes away leaves nothing behind, wherever its request is.
func TestFetchEndsWithItsContext(t *testing.T) {
	t.Parallel()
	for name, at := range map[string]func(t *testing.T, f *fixture, l ocispec.Descriptor, ctx context.Context, cancel func()) error{
		"before the manifests are read": func(_ *testing.T, f *fixture, l ocispec.Descriptor, ctx context.Context, cancel func()) error {
			time.AfterFunc(10*time.Millisecond, cancel)
			_, err := f.Fetch(ctx, request("default", l))
			f.Start(context.WithoutCancel(ctx), f.images)
			return err
		},
		"while containerd is asked": func(_ *testing.T, f *fixture, l ocispec.Descriptor, ctx context.Context, cancel func()) error {
			f.Start(context.WithoutCancel(ctx), f.images)
			b := blockingLabels{make(chan struct{})}
			f.containerd = b
			go func() { <-b.asked; cancel() }()
			_, err := f.Fetch(ctx, request("default", l))
			return err
		},
		"while the blob arrives": func(t *testing.T, f *fixture, l ocispec.Descriptor, ctx context.Context, cancel func()) error {
			f.Start(context.WithoutCancel(ctx), f.images)
			w, err := f.Fetch(ctx, request("default", l))
			if err != nil {
				t.Fatal(err)
			}
			defer closed(t, w)
			eventually(t, "the first bytes", func() bool { return w.Frontier() > 0 })
			cancel()
			return w.Wait(ctx)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, false)
			l, id := f.addLayer(t, 1, 4<<20)
			f.holdFrom(t, l.Digest, 1<<20)
			f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if err := at(t, f, l, ctx, cancel); err == nil {
				t.Fatal("want the end of the context, got nil")
			}
			f.Puller.mu.Lock()
			var images []*image
			for _, img := range f.Puller.images {
				images = append(images, img)
				if img.waiters != 0 {
					t.Errorf("%d clients are still counted", img.waiters)
				}
			}
			f.Puller.mu.Unlock()
			for _, img := range images {
				f.end(img)
			}
			eventually(t, "the transfer to be left", func() bool { return f.waiters(t, l.Digest) == 0 })
		})
	}
}

// gantryd stops while clients wait for layers that arrive, for their unpack, and
// for a worker. Nobody is left waiting.
func TestCloseEndsWhoWaits(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	var layers []ocispec.Descriptor
	var ids []digest.Digest
	for i := range uint64(4) { // two workers
		l, id := f.addLayer(t, i, 2<<20)
		layers, ids = append(layers, l), append(ids, id)
	}
	f.answer = func(_ http.ResponseWriter, r *http.Request) bool {
		if firstByte(t, r) >= 1<<20 {
			<-r.Context().Done()
		}
		return false
	}
	f.addImage(t, "default", layers, ids)
	f.Start(t.Context(), f.images)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	var wg sync.WaitGroup
	for _, l := range layers {
		// Not for the first bytes: requests that are held up may have all connections that the host is trusted with.
		w, err := f.Fetch(t.Context(), request("default", l))
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer closed(t, w)
			if err := w.Wait(t.Context()); err == nil {
				t.Error("a transfer that cannot end has ended")
			}
		})
		wg.Go(func() {
			if _, _, err := f.Layer(ctx, l); err == nil {
				t.Error("an unpack that cannot end has ended")
			}
		})
	}
	eventually(t, "the unpacks", func() bool { return len(f.Unpacks()) == 4 })
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	m, err := f.transfers("default")
	if err != nil {
		t.Fatal(err)
	}
	closed(t, m)
	wg.Wait()
	if n := len(f.Unpacks()); n != 0 {
		t.Errorf("%d unpacks are left", n)
	}
}

// An unpack has closed what it read from when its waiters go on.
func TestSourcesAreClosedBeforeDone(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1<<10)
	f.images.put(t, f.blobs[l.Digest])
	f.Start(t.Context(), f.images)
	ra, err := f.images.ReaderAt(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	s := &slowSource{localSource: localSource{ra}}
	u, err := f.unpack(t.Context(), f.unpackKey("default", l.Digest, l.Size), func() (byteSource, error) { return s, nil })
	if err != nil {
		t.Fatal(err)
	}
	got, err := f.await(t.Context(), u)
	if err != nil || got.DiffID != id {
		t.Fatalf("want %s, got %v, %v", id, got, err)
	}
	if !s.closed.Load() {
		t.Error("its source is still open")
	}
}

// slowSource takes its time to close.
type slowSource struct {
	localSource
	closed atomic.Bool
}

func (s *slowSource) Close() error {
	time.Sleep(50 * time.Millisecond) // nothing depends on how long
	s.closed.Store(true)
	return s.localSource.Close()
}
