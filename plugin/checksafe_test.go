package plugin

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	ccontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	cplugin "github.com/containerd/plugin"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/plugin/check"
	"github.com/gantryd/gantry/plugin/config"
)

// fakeContainerd has one namespace, and content on record that came from nowhere.
type fakeContainerd struct {
	uses string // the address of its content store; "" for its own

	mu        sync.Mutex
	has       map[digest.Digest]int64
	forgotten []string
}

// Each service has methods of the same names.
type (
	fakeNamespaces struct {
		namespacesapi.UnimplementedNamespacesServer
	}
	fakeImages struct {
		imagesapi.UnimplementedImagesServer
	}
	fakePlugins struct {
		introspectionapi.UnimplementedIntrospectionServer
		*fakeContainerd
	}
	fakeContent struct {
		contentapi.UnimplementedContentServer
		*fakeContainerd
	}
)

func (f fakePlugins) Plugins(context.Context, *introspectionapi.PluginsRequest) (*introspectionapi.PluginsResponse, error) {
	p := &introspectionapi.Plugin{Type: string(plugins.ContentPlugin), ID: "content"}
	if f.uses != "" {
		p.ID, p.Exports = "gantry-content", map[string]string{"address": f.uses}
	}
	return &introspectionapi.PluginsResponse{Plugins: []*introspectionapi.Plugin{p}}, nil
}

func (fakeNamespaces) List(context.Context, *namespacesapi.ListNamespacesRequest) (*namespacesapi.ListNamespacesResponse, error) {
	return &namespacesapi.ListNamespacesResponse{Namespaces: []*namespacesapi.Namespace{{Name: "default"}}}, nil
}

func (fakeImages) List(context.Context, *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	return &imagesapi.ListImagesResponse{}, nil
}

func (f fakeContent) List(_ *contentapi.ListContentRequest, s contentapi.Content_ListServer) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	reply := &contentapi.ListContentResponse{}
	for d, size := range f.has {
		reply.Info = append(reply.Info, &contentapi.Info{Digest: d.String(), Size: size})
	}
	return s.Send(reply)
}

func (f fakeContent) Info(_ context.Context, r *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	size, ok := f.has[digest.Digest(r.GetDigest())]
	if !ok {
		return nil, status.Error(codes.NotFound, "not found")
	}
	return &contentapi.InfoResponse{Info: &contentapi.Info{Digest: r.GetDigest(), Size: size}}, nil
}

func (f fakeContent) Delete(_ context.Context, r *contentapi.DeleteContentRequest) (*emptypb.Empty, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.forgotten = append(f.forgotten, r.GetDigest())
	return &emptypb.Empty{}, nil
}

func (f *fakeContainerd) serve(t *testing.T, c *config.Config) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Containerd.Address)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	introspectionapi.RegisterIntrospectionServer(s, fakePlugins{fakeContainerd: f})
	namespacesapi.RegisterNamespacesServer(s, fakeNamespaces{})
	imagesapi.RegisterImagesServer(s, fakeImages{})
	contentapi.RegisterContentServer(s, fakeContent{fakeContainerd: f})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// oneLayer writes an image of one layer to a gantryd's store, but for the layer.
func oneLayer(t *testing.T, c *config.Config, layer ocispec.Descriptor) (manifest, config ocispec.Descriptor, store ccontent.Store) {
	t.Helper()
	store = contentproxy.NewContentStore(contentapi.NewContentClient(dial(t, c.Address)))
	put := func(mediaType string, v any) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		ctx := namespaces.WithNamespace(t.Context(), "default")
		if err := ccontent.WriteBlob(ctx, store, d.Digest.String(), bytes.NewReader(data), d); err != nil {
			t.Fatal(err)
		}
		return d
	}
	config = put(ocispec.MediaTypeImageConfig, ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.Digest}}})
	manifest = put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{layer},
	})
	return manifest, config, store
}

func plainLayer(data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// What a containerd has that keeps its content elsewhere is not missing here, and is not taken from it.
func TestCheckBesideAnotherContainerd(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	layer := plainLayer(bytes.Repeat([]byte("layer"), 1000))
	other := &fakeContainerd{has: map[digest.Digest]int64{layer.Digest: layer.Size}}
	other.serve(t, c)
	_, stop := run(t, c)
	conn := dial(t, c.Address)
	manifest, config, _ := oneLayer(t, c, layer)
	other.has[manifest.Digest], other.has[config.Digest] = manifest.Size, config.Size
	faults, notes, _, err := gather(func(send func(check.Event) error) error {
		return check.Call(t.Context(), conn, check.Request{Repair: true}, send)
	})
	if err != nil || len(faults) > 0 || notes != 1 {
		t.Errorf("%v, %d notes, %v", faults, notes, err)
	}
	if len(other.forgotten) > 0 {
		t.Errorf("it was made to forget %v", other.forgotten)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// checkerOf makes a checker of the daemon's parts, as the daemon's own service has.
func checkerOf(t *testing.T, d *Daemon) *checker {
	t.Helper()
	set := cplugin.NewPluginSet()
	for _, p := range d.parts {
		if err := set.Add(p); err != nil {
			t.Fatal(err)
		}
	}
	ic := cplugin.NewContext(t.Context(), set, nil)
	ic.Config = &settings{d.config, d.edge.calls}
	c, err := newChecker(ic)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A disk that reads a blob wrong twice and then right has it still.
func TestRepairLooksOnceMore(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	data := bytes.Repeat([]byte("layer"), 1000)
	layer := plainLayer(data)
	node := &fakeContainerd{uses: "unix://" + c.Address, has: map[digest.Digest]int64{layer.Digest: layer.Size}}
	node.serve(t, c)
	d, stop := run(t, c)
	manifest, config, store := oneLayer(t, c, layer)
	node.has[manifest.Digest], node.has[config.Digest] = manifest.Size, config.Size
	ctx := namespaces.WithNamespace(t.Context(), "default")
	if err := ccontent.WriteBlob(ctx, store, "layer", bytes.NewReader(data), layer); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(c.Content.Root, "blobs", "sha256", layer.Digest.Encoded())
	write := func(p []byte) {
		if err := os.WriteFile(path, p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(bytes.Repeat([]byte("wrong"), 1000))
	var events []string
	checker := checkerOf(t, d) // it waits while an event is dealt with, and not for a client
	err := checker.Run(t.Context(), check.Request{Repair: true}, func(e check.Event) error {
		if e.Fault != nil {
			events = append(events, e.State+" "+e.Fault.Cure)
		}
		if e.State == check.Found {
			write(data)
		}
		return nil
	})
	if err != nil || len(events) != 2 || !strings.HasPrefix(events[1], check.Repaired+" nothing was done") {
		t.Errorf("%q, %v", events, err)
	}
	if _, err := store.Info(ctx, layer.Digest); err != nil || len(node.forgotten) > 0 {
		t.Errorf("a good blob was removed: %v, forgotten %v", err, node.forgotten)
	}
	// One that stays wrong and is nowhere to be had goes, with containerd's record.
	write(bytes.Repeat([]byte("wrong"), 1000))
	faults, _, _, err := gather(func(send func(check.Event) error) error {
		return checker.Run(t.Context(), check.Request{Repair: true}, send)
	})
	if err != nil || len(faults) != 2 || len(node.forgotten) != 1 {
		t.Errorf("%v, forgotten %v, %v", faults, node.forgotten, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// Where most is missing, content.root may be another folder: containerd forgets none of it.
func TestRepairOfAnotherRoot(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	node := &fakeContainerd{uses: c.Address, has: map[digest.Digest]int64{}}
	node.serve(t, c)
	_, stop := run(t, c)
	conn := dial(t, c.Address)
	layer := plainLayer([]byte("one layer"))
	manifest, config, _ := oneLayer(t, c, layer)
	for _, d := range []ocispec.Descriptor{layer, manifest, config} {
		node.has[d.Digest] = d.Size
	}
	for _, s := range []string{"a", "b", "c"} {
		node.has[digest.FromString(s)] = 1
	}
	faults, _, _, err := gather(func(send func(check.Event) error) error {
		return check.Call(t.Context(), conn, check.Request{Repair: true}, send)
	})
	failed := 0
	for _, f := range faults {
		if strings.HasPrefix(f, check.Failed) {
			failed++
		}
	}
	if err != nil || failed != 4 || len(node.forgotten) > 0 {
		t.Errorf("%v, forgotten %v, %v", faults, node.forgotten, err)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
}

// A stop does not wait for a check, which may take hours.
func TestStopEndsACheck(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	path := filepath.Join(c.Content.Root, "blobs", "sha256", digest.FromString("endless").Encoded())
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Truncate(8 << 40); err != nil { // a hole
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	_, stop := run(t, c)
	stopped := make(chan error, 1)
	var once sync.Once
	err = check.Call(t.Context(), dial(t, c.Address), check.Request{}, func(e check.Event) error {
		if e.DoneBytes > 0 {
			once.Do(func() { go func() { stopped <- stop() }() })
		}
		return nil
	})
	if err == nil || !strings.Contains(err.Error(), errStopping.Error()) {
		t.Errorf("the check ended with %v", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// A disk that went read-only after errors can be checked, with a gantryd on it and without; nothing is repaired there.
func TestCheckReadOnly(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	_, stop := run(t, c)
	conn := dial(t, c.Address)
	data := bytes.Repeat([]byte("blob"), 1<<18)
	d := plainLayer(data)
	store := contentproxy.NewContentStore(contentapi.NewContentClient(conn))
	if err := ccontent.WriteBlob(namespaces.WithNamespace(t.Context(), "default"), store, "a", bytes.NewReader(data), d); err != nil {
		t.Fatal(err)
	}
	remount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("", c.Root, "", unix.MS_BIND|unix.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount(c.Root, c.Root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(c.Root, unix.MNT_DETACH) })
	want := []string{"found blob " + d.Digest.Encoded()}
	looks := func(name string, run func(send func(check.Event) error) error) {
		t.Helper()
		if faults, _, _, err := gather(run); err != nil || len(faults) != 1 || faults[0] != want[0] {
			t.Errorf("%s: %v, %v", name, faults, err)
		}
	}
	if err := os.WriteFile(filepath.Join(c.Content.Root, "blobs", "sha256", d.Digest.Encoded()), []byte("rot"), 0o600); err != nil {
		t.Fatal(err)
	}
	remount(unix.MS_RDONLY)
	looks("running", func(send func(check.Event) error) error { return check.Call(t.Context(), conn, check.Request{}, send) })
	remount(0)
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(c.Root, "layers", "tmp", "half")
	if err := os.WriteFile(half, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	stopped := func(repair bool) func(send func(check.Event) error) error {
		return func(send func(check.Event) error) error {
			return Check(t.Context(), c, check.Request{Repair: repair}, send)
		}
	}
	looks("stopped", stopped(false))
	if _, err := os.Stat(half); err != nil {
		t.Errorf("a check without --repair changes something: %v", err)
	}
	remount(unix.MS_RDONLY)
	looks("stopped, read-only", stopped(false))
	if _, _, _, err := gather(stopped(true)); err == nil || !strings.Contains(err.Error(), "nothing can be repaired") {
		t.Errorf("repair: %v", err)
	}
}

func TestSnapshotName(t *testing.T) {
	t.Parallel()
	for key, want := range map[string][2]string{
		"k8s.io/12/sha256:abc": {"k8s.io", "sha256:abc"}, "default/3/extract-1 a/b": {"default", "extract-1 a/b"}, "odd": {"", "odd"},
	} {
		if ns, name := snapshotName(key); ns != want[0] || name != want[1] {
			t.Errorf("%s: %q in %q, want %q", key, name, ns, want)
		}
	}
}

// What says nothing about a file is no fault of it.
func TestOwnTrouble(t *testing.T) {
	t.Parallel()
	for err, want := range map[error]bool{unix.EMFILE: true, unix.ENFILE: true, unix.ENOMEM: true, unix.EIO: false, unix.ENOENT: false, unix.EACCES: false} {
		if got := ownTrouble(&os.PathError{Op: "open", Path: "x", Err: err}); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

func TestCheckOfNoRoot(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	for range 2 { // no folder, and one of somebody else
		for _, repair := range []bool{false, true} {
			_, _, _, err := gather(func(send func(check.Event) error) error {
				return Check(t.Context(), c, check.Request{Repair: repair}, send)
			})
			if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "right configuration") {
				t.Errorf("%v", err)
			}
		}
		if err := os.MkdirAll(filepath.Join(c.Root, "snapshots"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
}
