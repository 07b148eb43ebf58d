package plugin

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	ccontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/diff"
	diffproxy "github.com/containerd/containerd/v2/core/diff/proxy"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotsproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
)

// node is a whole gantryd and what of containerd keeps namespaces apart: its
// metadata store, which has gantryd as its content backend and which gantryd asks.
type node struct {
	content   ccontent.Store // containerd's
	apply     func(ctx context.Context, l ocispec.Descriptor, key string) (ocispec.Descriptor, error)
	snapshots snapshots.Snapshotter

	registry string
	layer    []byte
	asked    atomic.Int64 // requests for the layer
}

func newNode(t *testing.T, policy string, opts ...metadata.DBOpt) *node {
	t.Helper()
	n := &node{layer: gzipped(t)}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, digest.FromBytes(n.layer).String()) {
			http.NotFound(w, r)
			return
		}
		n.asked.Add(1)
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(n.layer))
	}))
	t.Cleanup(server.Close)
	n.registry = strings.TrimPrefix(server.URL, "http://")

	// Directories, so that no mount is left behind.
	c := testConfig(t, "snapshotter.mount = \"directory\"\ncontainerd.content_sharing_policy = \""+policy+"\"\n")
	run(t, c)
	conn := dial(t, c.Address)
	db, err := bolt.Open(filepath.Join(t.TempDir(), "metadata.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	n.content = metadata.NewDB(db, contentproxy.NewContentStore(conn), nil, opts...).ContentStore()
	n.snapshots = snapshotsproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "gantry")
	differ := diffproxy.NewDiffApplier(diffapi.NewDiffClient(conn)).(diff.Applier)
	n.apply = func(ctx context.Context, l ocispec.Descriptor, key string) (ocispec.Descriptor, error) {
		mounts, err := n.snapshots.Mounts(ctx, key)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return differ.Apply(ctx, l, mounts)
	}
	serveContainerd(t, c.Containerd.Address, n.content)
	return n
}

// serveContainerd is the part of containerd's API that gantryd asks.
func serveContainerd(t *testing.T, address string, store ccontent.Store) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", address)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.WaitForHandlers(true))
	contentapi.RegisterContentServer(server, contentserver.New(store))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
}

func gzipped(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	zw := gzip.NewWriter(&b)
	tw := tar.NewWriter(zw)
	data := []byte(strings.Repeat("of one namespace ", 1000))
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "secret", Mode: 0o600, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func (n *node) descriptor() ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(n.layer), Size: int64(len(n.layer))}
}

func (n *node) put(ctx context.Context, t *testing.T, v any, labels map[string]string) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	d := ocispec.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b))}
	if err := ccontent.WriteBlob(ctx, n.content, "put-"+d.Digest.String(), bytes.NewReader(b), d, ccontent.WithLabels(labels)); err != nil {
		t.Fatal(err)
	}
	return d
}

// resolve does what a pull does before its first layer. source is the label that
// containerd would record, ref what a Prepare names.
func (n *node) resolve(ctx context.Context, t *testing.T, key string, source map[string]string, ref string) {
	t.Helper()
	zr, err := gzip.NewReader(bytes.NewReader(n.layer))
	if err != nil {
		t.Fatal(err)
	}
	id, err := digest.FromReader(zr)
	if err != nil {
		t.Fatal(err)
	}
	config := n.put(ctx, t, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{id}}}, nil)
	m := n.put(ctx, t, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, Config: config, Layers: []ocispec.Descriptor{n.descriptor()}}, source)
	n.prepare(ctx, t, key, map[string]string{snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: m.Digest.String()})
}

func (n *node) prepare(ctx context.Context, t *testing.T, key string, labels map[string]string) {
	t.Helper()
	if _, err := n.snapshots.Prepare(ctx, key, "", snapshots.WithLabels(labels)); err != nil {
		t.Fatal(err)
	}
}

// fetched opens the layer's writer as a pull does, says how much of it gantry
// offers, and commits if that is all.
func (n *node) fetched(ctx context.Context, t *testing.T) int64 {
	t.Helper()
	l := n.descriptor()
	w, err := ccontent.OpenWriter(ctx, n.content, ccontent.WithRef("layer-"+l.Digest.String()), ccontent.WithDescriptor(l))
	if errdefs.IsAlreadyExists(err) {
		return l.Size // containerd shares it
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = w.Close() }()
	st, err := w.Status()
	if err != nil {
		t.Fatal(err)
	}
	if st.Offset == l.Size {
		if err := w.Commit(ctx, l.Size, l.Digest); err != nil && !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	return st.Offset
}

// Two namespaces on one gantryd: what the policy allows containerd's own store,
// and nothing more, holds for takeover and Apply.
func TestContentSharing(t *testing.T) {
	t.Parallel()
	for policy, opts := range map[string][]metadata.DBOpt{"shared": nil, "isolated": {metadata.WithPolicyIsolated}} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, policy, opts...)
			isolated := policy == "isolated"
			l := n.descriptor()
			source := map[string]string{"containerd.io/distribution.source.127.0.0.1": "a/b"}
			ref := n.registry + "/a/b:latest"

			owner := namespaces.WithNamespace(t.Context(), "owner")
			n.resolve(owner, t, "owner-1", source, ref)
			if got := n.fetched(owner, t); got != l.Size {
				t.Fatalf("owner: gantry offers %d of %d bytes", got, l.Size)
			}
			if _, err := n.apply(owner, l, "owner-1"); err != nil {
				t.Fatalf("owner: apply: %v", err)
			}
			asked := n.asked.Load()
			if asked == 0 {
				t.Fatal("the registry was not asked")
			}

			// It knows the digest, and nothing else.
			thief := namespaces.WithNamespace(t.Context(), "thief")
			n.prepare(thief, t, "thief-1", map[string]string{snapshotters.TargetRefLabel: ref})
			if isolated {
				if got := n.fetched(thief, t); got != 0 {
					t.Errorf("thief: gantry offers %d bytes of another namespace's blob", got)
				}
				if _, err := n.apply(thief, l, "thief-1"); !errdefs.IsNotFound(err) {
					t.Errorf("thief: apply: got %v, want not found", err)
				}
			}
			// It imported the manifest, forged labels with it; no source is recorded.
			n.resolve(thief, t, "thief-2", nil, ref)
			if isolated {
				if got := n.fetched(thief, t); got != 0 {
					t.Errorf("thief with the manifest: gantry offers %d bytes", got)
				}
				if _, err := n.apply(thief, l, "thief-2"); !errdefs.IsNotFound(err) {
					t.Errorf("thief with the manifest: apply: got %v, want not found", err)
				}
			}
			if n.asked.Load() != asked {
				t.Error("a forged image-ref made gantry ask the registry")
			}

			// It pulled from the registry, which may refuse it: that must be asked.
			guest := namespaces.WithNamespace(t.Context(), "guest")
			n.resolve(guest, t, "guest-1", source, ref)
			if got := n.fetched(guest, t); got != l.Size {
				t.Errorf("guest: gantry offers %d of %d bytes", got, l.Size)
			}
			if again := n.asked.Load() > asked; again != isolated {
				t.Errorf("the registry was asked on behalf of the second namespace: %t, want %t", again, isolated)
			}
			if _, err := n.apply(guest, l, "guest-1"); err != nil {
				t.Errorf("guest: apply: %v", err)
			}
		})
	}
}

// containerd opens a stream for every layer of every pull over one connection, and
// each may wait for its transfer: none may hold up another, or a short call.
func TestManyStreamsAtOnce(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	run(t, c)
	client := contentapi.NewContentClient(dial(t, c.Address))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for i := range 300 {
		stream, err := client.Write(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Ref: fmt.Sprint("ref-", i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatalf("stream %d beside %d others: %v", i, i, err)
		}
	}
	reply, err := client.ListStatuses(ctx, &contentapi.ListStatusesRequest{})
	if err != nil || len(reply.GetStatuses()) != 300 {
		t.Errorf("%d ingests, %v, want 300", len(reply.GetStatuses()), err)
	}
}

// A message may have 16 MiB, far more than gRPC takes by itself.
func TestLargeMessage(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	run(t, c)
	client := contentapi.NewContentClient(dial(t, c.Address))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := client.Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const size = maxMessage - 1<<10
	req := &contentapi.WriteContentRequest{Action: contentapi.WriteAction_WRITE, Ref: "large", Data: make([]byte, size)}
	if err := stream.Send(req); err != nil {
		t.Fatal(err)
	}
	if reply, err := stream.Recv(); err != nil || reply.GetOffset() != size {
		t.Errorf("a WRITE of %d bytes: offset %d, %v", size, reply.GetOffset(), err)
	}
}
