package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/gantryd/gantry/integration/harness"
)

// snapshotter is what the tests run against. GANTRY_SNAPSHOTTER=overlayfs tries
// the harness, and what a test says of containerd, without gantryd; tests of
// gantry alone are skipped then, and only then.
var snapshotter = harness.Gantry

// helper is the path of the program that test images run.
var helper string

// registries is where the registries of tests have what they store: in memory. That they would keep it through the loss
// of power says nothing about gantry, and costs dozens of fsyncs an image.
var registries string

// started tells files that a test unpacked from files that an image dates.
var started = time.Now()

func TestMain(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if v := os.Getenv("GANTRY_SNAPSHOTTER"); v != "" {
		snapshotter = v
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "integration tests mount and run containers: run them as root")
		return 1
	}
	folder, err := harness.NewPrivateFolder()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer folder.Close()
	registries = filepath.Join(folder.Path, "registries")
	if err := harness.MountTmpfs(registries); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if helper, err = harness.BuildHelper(ctx, folder.Path); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if code := m.Run(); code != 0 {
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// needGantry skips a test of what only gantryd does when the run is without it.
func needGantry(t *testing.T) {
	t.Helper()
	if snapshotter != harness.Gantry {
		t.Skip("GANTRY_SNAPSHOTTER=" + snapshotter)
	}
}

// newNode starts a node that ends with the test, which fails when something was left behind.
func newNode(t *testing.T, o harness.Options) *harness.Node {
	t.Helper()
	if o.Snapshotter == "" {
		o.Snapshotter = snapshotter
	}
	o.NoSync = true // what is killed here is processes, never the machine
	n, err := harness.StartNode(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			logTails(t, n)
		}
		if err := n.Close(); err != nil {
			t.Errorf("close node: %v", err)
		}
	})
	return n
}

// logTails shows what the daemons said last, before their folder goes.
func logTails(t *testing.T, n *harness.Node) {
	for _, p := range []*harness.Process{n.Gantryd(), n.Containerd()} {
		if p != nil {
			t.Log(p.Tail())
		}
	}
}

// newRegistry starts a registry that ends with the test.
func newRegistry(t *testing.T) *harness.Registry {
	t.Helper()
	dir, err := os.MkdirTemp(registries, "")
	if err != nil {
		t.Fatal(err)
	}
	r, err := harness.StartRegistry(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(r.Close(), os.RemoveAll(dir)); err != nil {
			t.Errorf("close registry: %v", err)
		}
	})
	return r
}

// newProxy starts a proxy before the registry that ends with the test.
func newProxy(t *testing.T, r *harness.Registry) *harness.Proxy {
	t.Helper()
	p, err := harness.StartProxy(t.Context(), r.Host())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Errorf("close proxy: %v", err)
		}
	})
	return p
}

// push builds an image and pushes it to the registry. The reference it returns
// names host instead of the registry, for images that are pulled through a proxy.
func push(t *testing.T, r *harness.Registry, host, repository string, spec harness.ImageSpec) (*harness.Image, string) {
	t.Helper()
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), spec)
	if err != nil {
		t.Fatal(err)
	}
	return im, pushAs(t, im, r, host, repository)
}

// pushAs is push for an image that is there.
func pushAs(t *testing.T, im *harness.Image, r *harness.Registry, host, repository string) string {
	t.Helper()
	ref, err := im.Push(t.Context(), r.Host(), repository, "test")
	if err != nil {
		t.Fatal(err)
	}
	return host + strings.TrimPrefix(ref, r.Host())
}

// setup is what most tests need: a registry behind a proxy, and a node that knows it speaks plain HTTP.
func setup(t *testing.T, o harness.Options) (*harness.Node, *harness.Registry, *harness.Proxy) {
	t.Helper()
	r := newRegistry(t)
	p := newProxy(t, r)
	n := newNode(t, o)
	if err := n.AddRegistry("http", p.Host()); err != nil {
		t.Fatal(err)
	}
	return n, r, p
}

// small is an image of three layers that runs: the helper program, some files, and noise that differs by seed.
func small(seed uint64, noise int64) harness.ImageSpec {
	return harness.ImageSpec{
		Layers: []harness.LayerSpec{
			{Tar: harness.HelperTar(helper)},
			{Tar: harness.Entries(
				harness.Folder("etc", 0o755), harness.File("etc/seed", fmt.Sprint(seed)),
				harness.Folder("tmp", 0o1777), harness.Symlink("etc/link", "seed"),
			)},
			{Tar: harness.Noise("noise", seed, noise, 20)},
		},
		Config: ocispec.ImageConfig{Cmd: []string{"/helper", "cat", "/etc/seed"}},
	}
}

// mustPull pulls, and fails the test when that fails.
func mustPull(t *testing.T, n *harness.Node, namespace, ref string, args ...string) {
	t.Helper()
	if _, err := n.Pull(t.Context(), namespace, ref, args...); err != nil {
		t.Fatalf("pull: %v", err)
	}
}

// mustExport exports an image and returns the archive's path. `ctr image export` ends without waiting until it has written
// what containerd sent, so that one archive in thirty lacks its end (containerd 2.4.2, with any snapshotter).
func mustExport(t *testing.T, n *harness.Node, namespace, ref string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	for range 20 {
		if _, err := n.Ctr(t.Context(), namespace, "image", "export", path, ref); err != nil {
			t.Fatalf("export: %v", err)
		}
		archive, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.HasSuffix(archive, make([]byte, 1024)) {
			return path
		}
	}
	t.Fatal("no archive is whole")
	return ""
}

// mustRun runs the helper in a container and compares what it prints.
func mustRun(t *testing.T, n *harness.Node, namespace, ref, want string, args ...string) {
	t.Helper()
	got, err := n.Run(t.Context(), namespace, ref, "c-"+fmt.Sprint(time.Now().UnixNano()), args...)
	if err != nil {
		t.Fatalf("run: %v", err)
	}
	if strings.TrimSpace(got) != want {
		t.Fatalf("container printed %q, want %q", got, want)
	}
}
