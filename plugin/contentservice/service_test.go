package contentservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	api "github.com/containerd/containerd/api/services/content/v1"
	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/gantryd/gantry/content"
)

// transfer has brought the first have bytes of data, and no more will come.
type transfer struct {
	data []byte
	have int64
	file string
}

func (t *transfer) Wait(context.Context) error {
	if t.have < int64(len(t.data)) {
		return fmt.Errorf("registry.test: %w", errdefs.ErrUnavailable)
	}
	return nil
}
func (t *transfer) Frontier() int64          { return t.have }
func (t *transfer) LinkTo(path string) error { return os.Link(t.file, path) }
func (t *transfer) Close() error             { return nil }
func (t *transfer) CloneTo(_ context.Context, f *os.File, off int64) (int64, error) {
	n, err := f.WriteAt(t.data[off:t.have], off)
	return int64(n), err
}

type fetcher struct {
	transfer *transfer
	mu       sync.Mutex
	requests []content.FetchRequest
}

func (f *fetcher) Fetch(_ context.Context, req content.FetchRequest) (content.Transfer, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.requests = append(f.requests, req)
	if req.Digest != digest.FromBytes(f.transfer.data) {
		return nil, errdefs.ErrNotFound
	}
	return f.transfer, nil
}

// node is what a node runs: containerd's API on its metadata store on the proxy
// on gantry's service.
type node struct {
	fetcher *fetcher
	store   *content.Store    // gantry's
	direct  api.ContentClient // gantry's API
	db      *metadata.DB
	inside  ccontent.Store // as containerd's transfer service sees it
	outside ccontent.Store // as a client of containerd sees it
}

func listen(t *testing.T, service api.ContentServer) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessage), grpc.WaitForHandlers(true))
	api.RegisterContentServer(server, service)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return conn
}

// newNode starts a node whose transfer of data stops after have bytes.
func newNode(t *testing.T, data []byte, have int64, opts ...metadata.DBOpt) *node {
	t.Helper()
	dir := t.TempDir()
	file := filepath.Join(dir, "transfer")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	n := &node{fetcher: &fetcher{transfer: &transfer{data: data, have: have, file: file}}}
	var err error
	n.store, err = content.NewStore(filepath.Join(dir, "content"), content.Options{Fetcher: n.fetcher})
	if err != nil {
		t.Fatal(err)
	}
	conn := listen(t, New(n.store, nil))
	n.direct = api.NewContentClient(conn)
	db, err := bolt.Open(filepath.Join(dir, "metadata.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	})
	n.db = metadata.NewDB(db, proxy.NewContentStore(conn), nil, opts...)
	n.inside = n.db.ContentStore()
	n.outside = proxy.NewContentStore(listen(t, contentserver.New(n.inside)))
	return n
}

// registry serves a blob and counts the bytes it sends.
type registry struct {
	*bytes.Reader
	sent int64
}

func (r *registry) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.sent += int64(n)
	return n, err
}

// pull is what containerd does for one layer.
func pull(ctx context.Context, cs ccontent.Store, data []byte) (sent int64, err error) {
	desc := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	w, err := ccontent.OpenWriter(ctx, cs, ccontent.WithRef("layer-"+desc.Digest.String()), ccontent.WithDescriptor(desc))
	if err != nil {
		return 0, err
	}
	defer func() { _ = w.Close() }()
	st, err := w.Status()
	if err != nil {
		return 0, err
	}
	if st.Offset == desc.Size {
		if err := w.Commit(ctx, desc.Size, desc.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
			return 0, err
		}
		return 0, nil
	}
	r := &registry{Reader: bytes.NewReader(data)}
	err = ccontent.Copy(ctx, w, struct{ io.ReadSeeker }{r}, desc.Size, desc.Digest)
	return r.sent, err
}

func wantBlob(ctx context.Context, t *testing.T, cs ccontent.Store, data []byte) {
	t.Helper()
	got, err := ccontent.ReadBlob(ctx, cs, ocispec.Descriptor{Digest: digest.FromBytes(data)})
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, data) {
		t.Fatalf("the blob reads %d other bytes", len(got))
	}
}

func testData(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i>>16 ^ i>>8 ^ i)
	}
	return p
}

// One image in several namespaces, by every way there is to containerd.
func TestPull(t *testing.T) {
	t.Parallel()
	data := testData(2<<20 + 4321)
	size := int64(len(data))
	for name, have := range map[string]int64{"taken over": size, "nothing came": 0, "half came": size / 2, "all but one byte": size - 1} {
		for policy, opts := range map[string][]metadata.DBOpt{"shared": nil, "isolated": {metadata.WithPolicyIsolated}} {
			for way, client := range map[string]func(*node) ccontent.Store{
				"inside":  func(n *node) ccontent.Store { return n.inside },
				"outside": func(n *node) ccontent.Store { return n.outside },
			} {
				t.Run(name+", "+policy+", "+way, func(t *testing.T) {
					t.Parallel()
					n := newNode(t, data, have, opts...)
					for i, ns := range []string{"default", "k8s.io"} {
						ctx := namespaces.WithNamespace(t.Context(), ns)
						sent, err := pull(ctx, client(n), data)
						if err != nil {
							t.Fatalf("pull in %s: %v", ns, err)
						}
						if want := size - have; sent != want && (i == 0 || sent != 0) {
							t.Fatalf("pull in %s: the registry sent %d bytes, wanted %d", ns, sent, want)
						}
						wantBlob(ctx, t, client(n), data)
					}
					wantRequests(t, n, data)
				})
			}
		}
	}
}

func wantRequests(t *testing.T, n *node, data []byte) {
	t.Helper()
	d := digest.FromBytes(data)
	for i, got := range n.fetcher.requests {
		want := content.FetchRequest{Namespace: []string{"default", "k8s.io"}[i], Ref: "layer-" + d.String(), Digest: d, Size: int64(len(data))}
		if got != want {
			t.Errorf("request %+v, wanted %+v", got, want)
		}
	}
	if len(n.fetcher.requests) == 0 {
		t.Error("no transfer was asked for")
	}
}

func TestGarbageCollection(t *testing.T) {
	t.Parallel()
	data := testData(1 << 20)
	d := digest.FromBytes(data)
	n := newNode(t, data, int64(len(data)))
	ctx := namespaces.WithNamespace(t.Context(), "default")
	w, err := n.inside.Writer(ctx, ccontent.WithRef("layer-"+d.String()), ccontent.WithDescriptor(ocispec.Descriptor{Digest: d, Size: int64(len(data))}))
	if err != nil {
		t.Fatal(err)
	}
	if st, err := w.Status(); err != nil || st.Offset != int64(len(data)) {
		t.Fatalf("status %+v, %v", st, err)
	}
	// An ingest that containerd does not know, and a blob that nobody owns.
	if err := ccontent.WriteBlob(ctx, n.store, "orphan", bytes.NewReader([]byte("orphan")), ocispec.Descriptor{}); err != nil {
		t.Fatal(err)
	}
	half, err := n.store.Writer(ctx, ccontent.WithRef("unknown"))
	if err != nil {
		t.Fatal(err)
	}
	if err := half.Close(); err != nil {
		t.Fatal(err)
	}
	collect(t, n)
	if _, err := n.store.Info(ctx, digest.FromString("orphan")); !errdefs.IsNotFound(err) {
		t.Errorf("an orphan after garbage collection: %v", err)
	}
	if st, err := n.store.ListStatuses(ctx); err != nil || len(st) != 1 {
		t.Errorf("ingests after garbage collection: %v, %v, wanted the one that goes on", st, err)
	}
	if err := w.Commit(ctx, int64(len(data)), d); err != nil {
		t.Fatal(err)
	}
	wantBlob(ctx, t, n.inside, data)

	if err := n.inside.Delete(ctx, d); err != nil {
		t.Fatal(err)
	}
	collect(t, n)
	if _, err := n.store.Info(ctx, d); !errdefs.IsNotFound(err) {
		t.Errorf("deleted content after garbage collection: %v", err)
	}
}

func collect(t *testing.T, n *node) {
	t.Helper()
	// The collector looks at the backend only when something has made it dirty.
	ctx := namespaces.WithNamespace(t.Context(), "gc")
	if err := ccontent.WriteBlob(ctx, n.inside, "dirt", bytes.NewReader([]byte("dirt")), ocispec.Descriptor{}); err != nil {
		t.Fatal(err)
	}
	if err := n.inside.Delete(ctx, digest.FromString("dirt")); err != nil {
		t.Fatal(err)
	}
	if _, err := n.db.GarbageCollect(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// A client that vanishes in the middle comes back and goes on where it was.
func TestClientVanishes(t *testing.T) {
	t.Parallel()
	data := testData(3 << 20)
	d := digest.FromBytes(data)
	n := newNode(t, nil, 0)
	desc := ocispec.Descriptor{Digest: d, Size: int64(len(data))}
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(t.Context(), "default"))
	w, err := n.inside.Writer(ctx, ccontent.WithRef("layer-"+d.String()), ccontent.WithDescriptor(desc))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data[:1<<20]); err != nil {
		t.Fatal(err)
	}
	cancel()
	sent, err := pull(namespaces.WithNamespace(t.Context(), "default"), n.inside, data)
	if err != nil || sent != 2<<20 {
		t.Fatalf("the registry sent %d bytes again, %v", sent, err)
	}
}

func TestEveryReplyHasTheDigest(t *testing.T) {
	t.Parallel()
	data := testData(12 << 20)
	d := digest.FromBytes(data)
	n := newNode(t, nil, 0)
	stream, err := n.direct.Write(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const half = 8 << 20
	for i, step := range []struct {
		req    *api.WriteContentRequest
		digest digest.Digest
		offset int64
	}{
		{&api.WriteContentRequest{Action: api.WriteAction_STAT, Ref: "x", Total: int64(len(data))}, digest.FromString(""), 0},
		{&api.WriteContentRequest{Action: api.WriteAction_STAT}, digest.FromString(""), 0},
		{&api.WriteContentRequest{Action: api.WriteAction_WRITE, Data: data[:half]}, digest.FromBytes(data[:half]), half},
		{&api.WriteContentRequest{Action: api.WriteAction_STAT}, digest.FromBytes(data[:half]), half},
		{&api.WriteContentRequest{Action: api.WriteAction_COMMIT, Offset: half, Data: data[half:], Expected: d.String()}, d, int64(len(data))},
	} {
		if err := stream.Send(step.req); err != nil {
			t.Fatal(err)
		}
		reply, err := stream.Recv()
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if reply.Digest != step.digest.String() || reply.Offset != step.offset || reply.Action != step.req.Action {
			t.Fatalf("reply %d: %v %d %s, wanted %v %d %s", i, reply.Action, reply.Offset, reply.Digest, step.req.Action, step.offset, step.digest)
		}
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("after COMMIT: %v, wanted the stream's end", err)
	}
}

func TestErrorsHaveCodes(t *testing.T) {
	t.Parallel()
	n := newNode(t, nil, 0)
	if _, err := n.direct.Abort(t.Context(), &api.AbortRequest{Ref: "unknown"}); err != nil {
		t.Errorf("abort of an unknown ref: %v", err)
	}
	if err := ccontent.WriteBlob(t.Context(), n.store, "there", bytes.NewReader([]byte("there")), ocispec.Descriptor{}); err != nil {
		t.Fatal(err)
	}
	locked, err := n.store.Open(t.Context(), "locked", 0, "")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = locked.Close() }()
	stat, write, commit := api.WriteAction_STAT, api.WriteAction_WRITE, api.WriteAction_COMMIT
	for name, tt := range map[string]struct {
		requests []*api.WriteContentRequest
		want     codes.Code
	}{
		"no ref":       {[]*api.WriteContentRequest{{Action: stat}}, codes.InvalidArgument},
		"bad digest":   {[]*api.WriteContentRequest{{Action: stat, Ref: "a", Expected: "junk"}}, codes.InvalidArgument},
		"bad action":   {[]*api.WriteContentRequest{{Action: 17, Ref: "b"}}, codes.InvalidArgument},
		"locked":       {[]*api.WriteContentRequest{{Action: stat, Ref: "locked"}}, codes.Unavailable},
		"there":        {[]*api.WriteContentRequest{{Action: stat, Ref: "c", Expected: digest.FromString("there").String()}}, codes.AlreadyExists},
		"gap":          {[]*api.WriteContentRequest{{Action: stat, Ref: "d"}, {Action: write, Offset: 9, Data: []byte("x")}}, codes.OutOfRange},
		"other size":   {[]*api.WriteContentRequest{{Action: write, Ref: "e", Data: []byte("x")}, {Action: commit, Offset: 1, Total: 2}}, codes.FailedPrecondition},
		"exists":       {[]*api.WriteContentRequest{{Action: commit, Ref: "f", Data: []byte("there")}}, codes.AlreadyExists},
		"other digest": {[]*api.WriteContentRequest{{Action: commit, Ref: "g", Data: []byte("x"), Expected: digest.FromString("y").String()}}, codes.FailedPrecondition},
	} {
		if got := status.Code(send(t, n.direct, tt.requests)); got != tt.want {
			t.Errorf("%s: %v, wanted %v", name, got, tt.want)
		}
	}
}

// send returns the error of the last of the requests.
func send(t *testing.T, client api.ContentClient, requests []*api.WriteContentRequest) error {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i, req := range requests {
		if err := stream.Send(req); err != nil {
			t.Fatal(err)
		}
		if _, err = stream.Recv(); err != nil && i < len(requests)-1 {
			t.Fatalf("message %d: %v", i, err)
		}
		if i == len(requests)-1 {
			return err
		}
	}
	return nil
}
