package pull

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/status"
	"github.com/gantryd/gantry/snapshotter/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const workersInTests = 2

// fixture is a Puller on real parts: an HTTP registry on loopback, transfers,
// layer cache and content store on disk. Only containerd is played.
type fixture struct {
	*Puller
	store    *content.Store
	images   *memory // what the catalog reads, and where Layer finds local blobs
	server   *httptest.Server
	labels   labels
	mu       sync.Mutex
	blobs    map[digest.Digest][]byte
	requests []string
	answer   func(w http.ResponseWriter, r *http.Request) bool // true: answered
}

// labels plays containerd: namespace and digest to labels.
type labels struct {
	mu sync.Mutex
	m  map[string]map[string]string
}

func (l *labels) set(namespace string, d digest.Digest, kv map[string]string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.m == nil {
		l.m = make(map[string]map[string]string)
	}
	l.m[namespace+" "+d.String()] = kv
}

func (l *labels) Labels(_ context.Context, namespace string, d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	kv, ok := l.m[namespace+" "+d.String()]
	if !ok {
		return nil, fmt.Errorf("blob %s in namespace %s: %w", d, namespace, errdefs.ErrNotFound)
	}
	return kv, nil
}

func newFixture(t testing.TB, isolated bool) *fixture {
	t.Helper()
	f := &fixture{images: &memory{}, blobs: make(map[digest.Digest][]byte)}
	f.server = httptest.NewServer(http.HandlerFunc(f.serve))
	t.Cleanup(f.server.Close)
	dir := t.TempDir()
	managers := make(map[string]*transfer.Manager)
	var mu sync.Mutex
	cache, err := layer.Open(dir+"/layers", layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	f.Puller, err = New(Options{
		Transfers: func(namespace string) (*transfer.Manager, error) {
			mu.Lock()
			defer mu.Unlock()
			if !isolated {
				namespace = "shared"
			}
			if m := managers[namespace]; m != nil {
				return m, nil
			}
			m, err := transfer.New(dir+"/transfers/"+namespace, transfer.Options{ChunkSize: 256 << 10, FirstContact: time.Second})
			managers[namespace] = m
			return m, err
		},
		Registry: registry.New(registry.Options{UserAgent: "gantry/test"}), Layers: cache,
		Containerd: &f.labels, Isolated: isolated, Workers: workersInTests,
	})
	if err != nil {
		t.Fatal(err)
	}
	f.store, err = content.NewStore(dir+"/content", content.Options{Fetcher: f.Puller, Observer: f.Puller, Refetcher: f.Puller, Isolated: isolated})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(f.store.Close(), f.Close()); err != nil {
			t.Error(err)
		}
		for _, m := range managers {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return f
}

func (f *fixture) serve(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.requests = append(f.requests, r.URL.Path+" "+r.Header.Get("Range"))
	answer := f.answer
	d := digest.Digest(r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:])
	b, ok := f.blobs[d]
	f.mu.Unlock()
	if answer != nil && answer(w, r) {
		return
	}
	if !ok {
		http.Error(w, "unknown blob", http.StatusNotFound)
		return
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
}

// asked counts the requests for a blob.
func (f *fixture) asked(d digest.Digest) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for _, r := range f.requests {
		if strings.Contains(r, d.String()) {
			n++
		}
	}
	return n
}

func (f *fixture) host() string { return strings.TrimPrefix(f.server.URL, "http://") }

// addLayer serves a layer of about size random bytes and returns it with its DiffID.
func (f *fixture) addLayer(t *testing.T, seed uint64, size int) (ocispec.Descriptor, digest.Digest) {
	t.Helper()
	var raw, packed bytes.Buffer
	data := make([]byte, size)
	src := rand.NewChaCha8([32]byte{byte(seed)})
	if _, err := src.Read(data); err != nil {
		t.Fatal(err)
	}
	tw := tar.NewWriter(&raw)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("file-%d", seed), Mode: 0o644, Size: int64(size)}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	zw, err := gzip.NewWriterLevel(&packed, gzip.HuffmanOnly) // noise does not shrink, and matches are costly to look for
	if err != nil {
		t.Fatal(err)
	}
	if _, err := zw.Write(raw.Bytes()); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return f.addBlob(packed.Bytes()), digest.FromBytes(raw.Bytes())
}

func (f *fixture) addBlob(b []byte) ocispec.Descriptor {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := digest.FromBytes(b)
	f.blobs[d] = b
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: d, Size: int64(len(b))}
}

// addImage puts the image's manifest in the store, as pulled by namespace from
// the fixture's registry.
func (f *fixture) addImage(t testing.TB, namespace string, layers []ocispec.Descriptor, ids []digest.Digest) digest.Digest {
	t.Helper()
	m := putImage(t, f.images, layers, ids)
	f.pulled(namespace, m, "127.0.0.1", "test/image")
	f.prepare(namespace, m, f.host()+"/test/image:latest")
	return m
}

func (f *fixture) pulled(namespace string, m digest.Digest, hostname, repository string) {
	f.labels.set(namespace, m, map[string]string{distributionSource + hostname: repository})
}

func (f *fixture) prepare(namespace string, m digest.Digest, ref string) {
	f.Prepared(namespace, "extract", map[string]string{
		snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: m.String(),
	})
}

func request(namespace string, l ocispec.Descriptor) content.FetchRequest {
	return content.FetchRequest{Namespace: namespace, Ref: "layer-" + l.Digest.String(), Digest: l.Digest, Size: l.Size}
}

// take fetches a layer as a client's second STAT does.
func (f *fixture) take(t testing.TB, namespace string, l ocispec.Descriptor) error {
	t.Helper()
	w, err := f.Fetch(t.Context(), request(namespace, l))
	if err != nil {
		return err
	}
	defer w.Close()
	return w.Wait(t.Context())
}

func TestAllLayersStartWithTheFirst(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	var layers []ocispec.Descriptor
	var ids []digest.Digest
	for i := range uint64(3) {
		l, id := f.addLayer(t, i, 1<<20)
		layers, ids = append(layers, l), append(ids, id)
	}
	f.addImage(t, "default", layers, ids)
	f.Start(t.Context(), f.images)
	if err := f.take(t, "default", layers[0]); err != nil {
		t.Fatal(err)
	}
	for i, l := range layers {
		// The other two come from the prefetch: nobody asked for them.
		u := f.running(f.unpackKey("default", l.Digest, l.Size))
		for range 200 {
			if _, err := f.layers.Lookup(l.Digest); err == nil {
				break
			}
			if u != nil {
				if _, err := u.wait(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(10 * time.Millisecond)
			u = f.running(f.unpackKey("default", l.Digest, l.Size))
		}
		got, size, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l)
		if err != nil || got != ids[i] {
			t.Errorf("layer %d: want DiffID %s, got %s of %d bytes, %v", i, ids[i], got, size, err)
		}
	}
	if n := len(f.Recent()); n != 3 {
		t.Errorf("want each layer unpacked once, got %d unpacks", n)
	}
}

func TestOneTransferAndUnpackForAllNamespaces(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	m := f.addImage(t, "ns0", []ocispec.Descriptor{l}, []digest.Digest{id})
	for i := 1; i < 8; i++ {
		f.pulled(fmt.Sprint("ns", i), m, "127.0.0.1", "test/image")
		f.prepare(fmt.Sprint("ns", i), m, f.host()+"/test/image:latest")
	}
	f.Start(t.Context(), f.images)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			ns := fmt.Sprint("ns", i)
			if err := f.take(t, ns, l); err != nil {
				t.Errorf("%s: %v", ns, err)
				return
			}
			f.images.mu.Lock()
			f.images.blobs[l.Digest] = f.blobs[l.Digest] // committed
			f.images.mu.Unlock()
			if got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), ns), l); err != nil || got != id {
				t.Errorf("%s: want DiffID %s, got %s, %v", ns, id, got, err)
			}
		})
	}
	wg.Wait()
	chunks := int((l.Size + 256<<10 - 1) / (256 << 10))
	if n := f.asked(l.Digest); n > chunks {
		t.Errorf("want at most %d requests for %d chunks, got %d", chunks, chunks, n)
	}
	if n := len(f.Recent()); n != 1 {
		t.Errorf("want one unpack, got %d", n)
	}
}

func TestForgedLabelsOpenNoConnection(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	trap := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a forged label made gantry ask for %s", r.URL)
	}))
	defer trap.Close()
	l, id := f.addLayer(t, 1, 1000)
	m := putImage(t, f.images, []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	f.prepare("default", m, strings.TrimPrefix(trap.URL, "http://")+"/test/image:latest")

	// containerd does not even have the manifest in this namespace.
	if err := f.take(t, "default", l); !errdefs.IsNotFound(err) {
		t.Errorf("no record: want ErrNotFound, got %v", err)
	}
	// It was imported: no source is recorded.
	f.labels.set("default", m, map[string]string{"containerd.io/gc.ref.content.l.0": l.Digest.String()})
	if err := f.take(t, "default", l); !errdefs.IsNotFound(err) {
		t.Errorf("imported: want ErrNotFound, got %v", err)
	}
	// It came from elsewhere; same host name, other repository.
	f.pulled("default", m, "127.0.0.1", "other/image")
	if err := f.take(t, "default", l); err == nil {
		t.Error("other repository: want an error, got a transfer")
	}
	// Another namespace's record does not count.
	if err := f.take(t, "other", l); !errdefs.IsNotFound(err) {
		t.Errorf("other namespace: want ErrNotFound, got %v", err)
	}
}

// The host is the one that containerd recorded, the port is the image's own idea.
func TestForgedPortOpensNoConnection(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	trap := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("a forged port made gantry ask for %s", r.URL)
	}))
	defer trap.Close()
	forged := strings.TrimPrefix(trap.URL, "http://") + "/test/image:latest"
	l, id := f.addLayer(t, 1, 1000)
	victim := putImage(t, f.images, []ocispec.Descriptor{l}, []digest.Digest{id})
	f.pulled("default", victim, "127.0.0.1", "test/image")
	// Another image names the victim's manifest and a port in its annotations,
	// which a client that unpacks by itself passes on as labels.
	evil := l
	evil.Annotations = map[string]string{
		snapshotters.TargetRefLabel: forged, snapshotters.TargetManifestDigestLabel: victim.String(),
	}
	f.pulled("default", putImage(t, f.images, []ocispec.Descriptor{evil}, []digest.Digest{id}), "127.0.0.1", "evil/image")
	f.Prepared("default", "extract", evil.Annotations)
	f.Start(t.Context(), f.images)
	if err := f.take(t, "default", l); err == nil {
		t.Error("want no transfer: nothing listens where the image may have come from")
	}
}

func TestManifestOfTooManyLayersMakesAllLabelsSuspect(t *testing.T) {
	t.Parallel()
	m := &memory{}
	c := startCatalog(t, m)
	putImage(t, m, slices.Repeat([]ocispec.Descriptor{layerOf("l")}, maxLayers+1), nil)
	for d := range m.blobs {
		c.announce(d, 100)
	}
	if err := c.settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	if c.honest("registry.example:5000/a:b") {
		t.Error("a reference counts although a manifest that was not read may have named it")
	}
}

func TestHintEndsWithItsPull(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1000)
	m := f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	w, err := f.Fetch(t.Context(), request("default", l))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Wait(t.Context()), w.Close()); err != nil {
		t.Fatal(err)
	}
	if f.hints.ref("default", m) == "" {
		t.Error("the reference went before the pull")
	}
	f.end(w.(*waiter).image) // as after the grace period
	if ref := f.hints.ref("default", m); ref != "" {
		t.Errorf("the reference %s outlives its pull", ref)
	}
}

func TestOnlyListedLayersAreTaken(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1000)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	other, _ := f.addLayer(t, 2, 1000)
	lie := l
	lie.Size++
	for name, l := range map[string]ocispec.Descriptor{"not listed": other, "other size": lie} {
		if err := f.take(t, "default", l); !errdefs.IsNotFound(err) {
			t.Errorf("%s: want ErrNotFound, got %v", name, err)
		}
	}
	if len(f.requests) != 0 {
		t.Errorf("want no request, got %v", f.requests)
	}
}

func TestRefusalSendsTheWholeImageBackAtOnce(t *testing.T) {
	t.Parallel()
	for _, code := range []int{http.StatusUnauthorized, http.StatusForbidden} {
		t.Run(http.StatusText(code), func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, false)
			f.answer = func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(code)
				return true
			}
			a, idA := f.addLayer(t, 1, 1000)
			b, idB := f.addLayer(t, 2, 1000)
			f.addImage(t, "default", []ocispec.Descriptor{a, b}, []digest.Digest{idA, idB})
			f.Start(t.Context(), f.images)
			if err := f.take(t, "default", a); err == nil {
				t.Fatal("want an error, got a blob")
			}
			f.mu.Lock()
			before := len(f.requests)
			f.mu.Unlock()
			if err := f.take(t, "default", b); err == nil {
				t.Error("second layer: want an error, got a blob")
			}
			f.mu.Lock()
			defer f.mu.Unlock()
			if len(f.requests) > before+1 {
				t.Errorf("the registry was asked again although it had just refused: %v", f.requests[before:])
			}
		})
	}
}

// writeAs plays a client that writes the rest of a blob itself, through the
// store's session, and commits it.
func writeAs(ctx context.Context, s *content.Store, ref string, blob []byte) (int64, error) {
	session, err := s.Open(ctx, ref, int64(len(blob)), "")
	if err != nil {
		return 0, err
	}
	defer session.Close()
	st, err := session.Status(ctx)
	if err != nil {
		return 0, err
	}
	var count int64
	for off := st.Offset; off < int64(len(blob)); {
		n := min(int64(len(blob)), off+64<<10) - off
		next, err := session.Write(ctx, count, blob[off:off+n])
		if err != nil {
			return st.Offset, err
		}
		off += next - count
		count = next
	}
	_, err = session.Commit(ctx, count, int64(len(blob)), digest.FromBytes(blob), nil)
	return st.Offset, err
}

func TestUnpackFollowsTheClientThatGoesOn(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	half := int64(1 << 20)
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		var from int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
			t.Errorf("range %q: %v", r.Header.Get("Range"), err)
		}
		if from >= half {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		return false
	}
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	from, err := writeAs(ctx, f.store, "default/1/layer-"+l.Digest.String(), f.blobs[l.Digest])
	if err != nil {
		t.Fatal(err)
	}
	if from <= 0 || from > half {
		t.Errorf("want the client to go on within the first %d bytes, got %d", half, from)
	}
	f.images.mu.Lock()
	f.images.blobs[l.Digest] = f.blobs[l.Digest]
	f.images.mu.Unlock()
	got, _, err := f.Layer(ctx, l)
	if err != nil || got != id {
		t.Fatalf("want DiffID %s, got %s, %v", id, got, err)
	}
	for _, u := range f.Recent() {
		if u.Error != "" {
			t.Errorf("an unpack failed on the way: %v", u.Error)
		}
	}
}

func TestBadLayersAreNamed(t *testing.T) {
	t.Parallel()
	cases := []struct {
		name  string
		spoil func(b []byte) []byte
		says  string
	}{
		{"truncated gzip", func(b []byte) []byte { return b[:len(b)/2] }, "unexpected EOF"},
		{"corrupt gzip", func(b []byte) []byte { b[len(b)/2] ^= 0xff; return b }, ""},
		{"no tar at all", func([]byte) []byte { return bytes.Repeat([]byte("not a tar. "), 1000) }, ""},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, false)
			l, id := f.addLayer(t, 1, 1<<16)
			b := tc.spoil(bytes.Clone(f.blobs[l.Digest]))
			l = f.addBlob(b)
			f.images.put(t, b)
			f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
			f.Start(t.Context(), f.images)
			_, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l)
			if err == nil {
				t.Fatal("want an error, got a layer")
			}
			for _, want := range []string{l.Digest.String(), "/test/image:latest", tc.says} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("want %q in %q", want, err)
				}
			}
			if _, err := f.layers.Lookup(l.Digest); !errdefs.IsNotFound(err) {
				t.Errorf("a bad layer is on record: %v", err)
			}
		})
	}
}

func TestForgedDiffIDIsRefused(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	secret, secretID := f.addLayer(t, 1, 1000)
	junk, junkID := f.addLayer(t, 2, 1000)
	f.images.put(t, f.blobs[secret.Digest])
	f.images.put(t, f.blobs[junk.Digest])
	f.addImage(t, "victim", []ocispec.Descriptor{secret}, []digest.Digest{secretID})
	f.addImage(t, "thief", []ocispec.Descriptor{junk}, []digest.Digest{secretID})
	f.Start(t.Context(), f.images)
	if got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "victim"), secret); err != nil || got != secretID {
		t.Fatalf("want %s, got %s, %v", secretID, got, err)
	}
	got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "thief"), junk)
	if err == nil {
		t.Fatalf("a forged DiffID was accepted, got layer %s", got)
	}
	for _, want := range []string{junk.Digest.String(), secretID.String(), junkID.String()} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in %q", want, err)
		}
	}
}

func TestIsolatedLayersServeOnlyWhoHasTheBlob(t *testing.T) {
	t.Parallel()
	f := newFixture(t, true)
	l, id := f.addLayer(t, 1, 1000)
	f.images.put(t, f.blobs[l.Digest])
	f.addImage(t, "owner", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.labels.set("owner", l.Digest, nil)
	f.Start(t.Context(), f.images)
	if _, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "owner"), l); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "stranger"), l); !errdefs.IsNotFound(err) {
		t.Errorf("want ErrNotFound for a namespace without the blob, got %v", err)
	}
}

func TestCloseEndsEverything(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	release := make(chan struct{})
	f.answer = func(_ http.ResponseWriter, r *http.Request) bool {
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return true
	}
	defer close(release)
	l, id := f.addLayer(t, 1, 1<<20)
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
	f.Start(t.Context(), f.images)
	w, err := f.Fetch(t.Context(), request("default", l))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Fetch(t.Context(), request("default", l)); !errdefs.IsUnavailable(err) {
		t.Errorf("after Close: want ErrUnavailable, got %v", err)
	}
}

func TestStalledLayersHoldNoWorkers(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	stalled := make(map[string]bool)
	release := make(chan struct{})
	defer close(release)
	f.answer = func(_ http.ResponseWriter, r *http.Request) bool {
		if !stalled[r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]] {
			return false
		}
		select {
		case <-release:
		case <-r.Context().Done():
		}
		return true
	}
	var layers []ocispec.Descriptor
	var ids []digest.Digest
	for i := range uint64(2) { // as many as there are workers
		l, id := f.addLayer(t, i, 1<<20)
		layers, ids = append(layers, l), append(ids, id)
		stalled[l.Digest.String()] = true
	}
	f.addImage(t, "default", layers, ids)
	other, want := f.addLayer(t, 7, 1000)
	f.images.put(t, f.blobs[other.Digest])
	f.Start(t.Context(), f.images)
	w, err := f.Fetch(t.Context(), request("default", layers[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for len(f.Unpacks()) < 2 || slices.ContainsFunc(f.Unpacks(), func(u status.Unpack) bool { return u.Phase == phaseQueued }) {
		if t.Context().Err() != nil {
			t.Fatal("the layers did not get to a worker")
		}
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(t.Context(), "default"), 8*time.Second)
	defer cancel()
	if got, _, err := f.Layer(ctx, other); err != nil || got != want {
		t.Errorf("want %s while other layers stall, got %s, %v", want, got, err)
	}
}
