package content

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// fakeTransfer is a transfer whose progress a test decides.
type fakeTransfer struct {
	data []byte
	file string // where the finished file is; "" makes LinkTo fail
	// cloneErr is what CloneTo says when it has written, and that lost bytes of it do not count.
	cloneErr error
	lost     int64
	// record is what is left of a blob whose bytes were given up.
	record *Record

	mu       sync.Mutex
	frontier int64
	err      error
	waits    int
	closed   int
	done     chan struct{}
}

func newTransfer(t *testing.T, data []byte) *fakeTransfer {
	t.Helper()
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return &fakeTransfer{data: data, file: file, done: make(chan struct{})}
}

func (f *fakeTransfer) progress(n int64) { f.mu.Lock(); f.frontier = n; f.mu.Unlock() }

func (f *fakeTransfer) finish() *fakeTransfer {
	f.progress(int64(len(f.data)))
	close(f.done)
	return f
}

func (f *fakeTransfer) fail(at int64) *fakeTransfer {
	f.mu.Lock()
	f.err = fmt.Errorf("registry.test: %w", errdefs.ErrUnavailable)
	f.mu.Unlock()
	f.progress(at)
	close(f.done)
	return f
}

func (f *fakeTransfer) Wait(ctx context.Context) error {
	f.mu.Lock()
	f.waits++
	f.mu.Unlock()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-f.done:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

func (f *fakeTransfer) Frontier() int64 { f.mu.Lock(); defer f.mu.Unlock(); return f.frontier }

func (f *fakeTransfer) LinkTo(path string) error {
	if f.file == "" {
		return fmt.Errorf("link: %w", os.ErrInvalid)
	}
	return os.Link(f.file, path)
}

// CloneTo has written all before it finds out what there was to say about it.
func (f *fakeTransfer) CloneTo(_ context.Context, dst *os.File, off int64) (int64, error) {
	end := f.Frontier()
	if off >= end {
		return 0, nil
	}
	n, err := dst.WriteAt(f.data[off:end], off)
	if err == nil && f.cloneErr != nil {
		return int64(n) - f.lost, f.cloneErr
	}
	return int64(n), err
}

func (f *fakeTransfer) Record() *Record { return f.record }

func (f *fakeTransfer) Close() error { f.mu.Lock(); f.closed++; f.mu.Unlock(); return nil }

func (f *fakeTransfer) counts() (waits, closed int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.waits, f.closed
}

// fakeFetcher has one transfer for every request, or none.
type fakeFetcher struct {
	transfer *fakeTransfer
	err      error

	mu       sync.Mutex
	requests []FetchRequest
}

func (f *fakeFetcher) Fetch(_ context.Context, req FetchRequest) (Transfer, error) {
	f.mu.Lock()
	f.requests = append(f.requests, req)
	f.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	if f.transfer == nil {
		return nil, fmt.Errorf("no source: %w", errdefs.ErrNotFound)
	}
	return f.transfer, nil
}

func (f *fakeFetcher) asked() []FetchRequest {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]FetchRequest(nil), f.requests...)
}

// fakeObserver writes down what it is told, and uses the store meanwhile.
type fakeObserver struct {
	store *Store

	mu      sync.Mutex
	events  []string
	growing []*Growing
}

func (o *fakeObserver) note(format string, a ...any) {
	if o.store != nil {
		_, _ = o.store.ListStatuses(context.Background())
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events = append(o.events, fmt.Sprintf(format, a...))
}

func (o *fakeObserver) Committed(ns string, d digest.Digest, size int64) {
	o.note("committed %s %s %d", ns, d, size)
}

func (o *fakeObserver) Ingesting(ns string, d digest.Digest, size int64, g *Growing) {
	o.note("ingesting %s %s %d", ns, d, size)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.growing = append(o.growing, g)
}

func (o *fakeObserver) Mismatched(ns string, d digest.Digest) { o.note("mismatched %s %s", ns, d) }

func (o *fakeObserver) Deleted(d digest.Digest) { o.note("deleted %s", d) }

func (o *fakeObserver) seen() []string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]string(nil), o.events...)
}

func (o *fakeObserver) follower(t *testing.T, i int) *Growing {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.growing) <= i {
		t.Fatalf("Ingesting was called %d times, wanted more than %d", len(o.growing), i)
	}
	g := o.growing[i]
	t.Cleanup(func() { _ = g.Close() })
	return g
}

func randomBytes(t *testing.T, n int) ([]byte, digest.Digest) {
	t.Helper()
	var seed [32]byte
	copy(seed[:], t.Name())
	seed[31] = byte(n)
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(seed).Read(p)
	return p, digest.FromBytes(p)
}

func layerRef(d digest.Digest) string { return "default/1/layer-" + d.String() }

func testContext(t *testing.T) context.Context {
	t.Helper()
	return namespaces.WithNamespace(t.Context(), "default")
}

func newStore(t *testing.T, root string, o Options) *Store {
	t.Helper()
	s, err := NewStore(root, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // what was aborted is freed behind the call
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func open(t *testing.T, s *Store, ref string, total int64) *Session {
	t.Helper()
	sess, err := s.Open(testContext(t), ref, total, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sess.Close() })
	return sess
}

func mustWrite(t *testing.T, s *Session, off int64, p []byte, want int64) {
	t.Helper()
	n, err := s.Write(testContext(t), off, p)
	if err != nil {
		t.Fatal(err)
	}
	if n != want {
		t.Fatalf("write at %d: count %d, wanted %d", off, n, want)
	}
}

func mustCommit(t *testing.T, s *Session, off, total int64, d digest.Digest) {
	t.Helper()
	n, err := s.Commit(testContext(t), off, total, d, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n != total {
		t.Fatalf("commit: offset %d, wanted %d", n, total)
	}
}

func mustStatus(t *testing.T, s *Session, want int64) {
	t.Helper()
	st, err := s.Status(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if st.Offset != want {
		t.Fatalf("status: offset %d, wanted %d", st.Offset, want)
	}
}

func wantDigest(t *testing.T, s *Session, want digest.Digest) {
	t.Helper()
	if got := s.Digest(); got != want {
		t.Fatalf("digest %q, wanted %q", got, want)
	}
}

func wantErr(t *testing.T, err, want error) {
	t.Helper()
	if !is(err, want) {
		t.Fatalf("error %v, wanted %v", err, want)
	}
}

// wantBlob checks what containerd sees of a blob, or that it sees nothing.
func wantBlob(t *testing.T, s *Store, data []byte, visible bool) {
	t.Helper()
	d := digest.FromBytes(data)
	_, err := s.Info(t.Context(), d)
	if !visible {
		wantErr(t, err, errdefs.ErrNotFound)
		_, err = s.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d})
		wantErr(t, err, errdefs.ErrNotFound)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	got, err := ccontent.ReadBlob(t.Context(), s, ocispec.Descriptor{Digest: d})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("blob %s reads %d other bytes", d, len(got))
	}
}

// wantFile checks what lies in blobs/, visible or not.
func wantFile(t *testing.T, s *Store, d digest.Digest, there bool) {
	t.Helper()
	_, err := os.Stat(s.blobPath(d))
	if got := err == nil; got != there {
		t.Fatalf("file of %s there: %t (%v), wanted %t", d, got, err, there)
	}
}

func wantNoIngests(t *testing.T, s *Store) {
	t.Helper()
	s.freeing.Wait()
	entries, err := os.ReadDir(filepath.Join(s.root, ingestFolder))
	if err != nil || len(entries) != 0 {
		t.Fatalf("%d ingests left (%v), wanted none", len(entries), err)
	}
	if st, err := s.ListStatuses(t.Context()); err != nil || len(st) != 0 {
		t.Fatalf("statuses %v (%v), wanted none", st, err)
	}
}
