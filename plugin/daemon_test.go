package plugin

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	ccontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testConfig is a configuration within a folder of the test's own.
func testConfig(t *testing.T, extra string) *config.Config {
	t.Helper()
	// The socket's address is short of room, so not t.TempDir.
	dir, err := os.MkdirTemp("", "gantry")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "config.toml")
	text := "root = \"" + dir + "/root\"\nstate = \"" + dir + "/state\"\ncontainerd.address = \"" + dir + "/containerd.sock\"\n" + extra
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// run starts a daemon and waits until it listens. The returned function drains
// and closes it, once.
func run(t *testing.T, c *config.Config) (*Daemon, func() error) {
	t.Helper()
	d, err := New(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	stopped := false
	stop := func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return errors.Join(<-ended, d.Close())
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	waitFor(t, "the socket", func() bool {
		_, err := os.Stat(c.Address)
		return err == nil
	})
	return d, stop
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for !done() {
		select {
		case <-t.Context().Done():
			t.Fatalf("waiting for %s: %v", what, context.Cause(t.Context()))
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func dial(t *testing.T, address string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func TestDaemonServes(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	_, stop := run(t, c)
	info, err := os.Stat(c.Address)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != os.ModeSocket|0o600 {
		t.Errorf("the socket's mode is %v, want 0600", info.Mode())
	}
	entries, err := os.ReadDir(c.State)
	if err != nil || len(entries) != 1 {
		t.Errorf("%s holds %v (%v), want the socket alone", c.State, entries, err)
	}

	conn := dial(t, c.Address)
	report, err := status.Get(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	if report.PID != os.Getpid() || report.Root != c.Root || report.Mount.Mode == "" || report.Version != config.Version {
		t.Errorf("status: %+v", report)
	}
	if err := probe(t.Context(), c.Address, time.Minute); err != nil {
		t.Errorf("the daemon does not answer itself: %v", err)
	}

	// Content written through containerd's own proxy comes back, in one message of 8 MiB.
	ctx := namespaces.WithNamespace(t.Context(), "test")
	store := contentproxy.NewContentStore(conn)
	data := strings.Repeat("gantry ", 8<<20/7)
	desc := ocispec.Descriptor{Digest: digest.FromString(data), Size: int64(len(data))}
	if err := ccontent.WriteBlob(ctx, store, "ref", strings.NewReader(data), desc); err != nil {
		t.Fatal(err)
	}
	got, err := ccontent.ReadBlob(ctx, store, desc)
	if err != nil || string(got) != data {
		t.Errorf("read back %d bytes, %v", len(got), err)
	}

	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(c.Address); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is still there after the stop: %v", err)
	}
	if err := probe(t.Context(), c.Address, time.Second); err == nil {
		t.Error("a daemon that was stopped still answers")
	}
	// Nothing stands in the way of the next one.
	_, _ = run(t, c)
}

func TestDaemonRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		second func(t *testing.T, first *config.Config) *config.Config
		want   string
	}{
		"the same root": {func(_ *testing.T, c *config.Config) *config.Config { return c }, "in use by another gantryd"},
		"the same blobs": {func(t *testing.T, c *config.Config) *config.Config {
			return testConfig(t, "content.root = \""+c.Content.Root+"\"\n")
		}, "in use by another gantryd"},
		"the same address": {func(t *testing.T, c *config.Config) *config.Config {
			return testConfig(t, "address = \""+c.Address+"\"\n")
		}, "another process answers there"},
		"a file in the socket's place": {func(t *testing.T, _ *config.Config) *config.Config {
			c := testConfig(t, "")
			if err := errors.Join(os.MkdirAll(c.State, 0o700), os.WriteFile(c.Address, nil, 0o600)); err != nil {
				t.Fatal(err)
			}
			return c
		}, "not a socket"},
		"transfers on another file system": {func(t *testing.T, _ *config.Config) *config.Config {
			other, err := os.MkdirTemp("/dev/shm", "gantry")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(other) })
			return testConfig(t, "transfer.root = \""+other+"\"\n")
		}, "not on one file system"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			first := testConfig(t, "")
			_, _ = run(t, first)
			second := tc.second(t, first)
			d, err := New(t.Context(), second)
			if err == nil {
				err = errors.Join(d.Run(t.Context()), d.Close())
			}
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
			if err := probe(t.Context(), first.Address, time.Minute); err != nil {
				t.Errorf("the first daemon suffered: %v", err)
			}
		})
	}
}

// A root with somebody else's things in it must not be cleaned up as gantry's own.
func TestForeignRootIsRefused(t *testing.T) {
	t.Parallel()
	for _, name := range rootNames {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := testConfig(t, "")
			theirs := filepath.Join(c.Root, name, "theirs")
			if err := os.MkdirAll(theirs, 0o700); err != nil {
				t.Fatal(err)
			}
			d, err := New(t.Context(), c)
			if err == nil {
				err = d.Close()
			}
			if want := "was not made by gantryd"; !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q in it", err, want)
			}
			if _, err := os.Stat(theirs); err != nil {
				t.Errorf("what was there is gone: %v", err)
			}
			if _, err := os.Stat(filepath.Join(c.Root, lockName)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a refused root was claimed: %v", err)
			}
		})
	}
}

// Every name that a daemon makes in a fresh root is known as its own.
func TestRootNamesAreComplete(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	_, _ = run(t, c)
	entries, err := os.ReadDir(c.Root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		switch e.Name() {
		case lockName, filepath.Base(c.Content.Root), filepath.Base(c.Transfer.Root):
		default:
			if !slices.Contains(rootNames, e.Name()) {
				t.Errorf("%s is made in root and missing from rootNames", e.Name())
			}
		}
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	if err := os.MkdirAll(c.State, 0o711); err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Address)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // as after a SIGKILL
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	_, _ = run(t, c)
	waitFor(t, "an answer", func() bool { return probe(t.Context(), c.Address, time.Second) == nil })
}

func TestIsolatedTransfers(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "containerd.content_sharing_policy = \"isolated\"\n")
	open := func() *transfers {
		ts, err := openTransfers(c)
		if err != nil {
			t.Fatal(err)
		}
		return ts
	}
	get := func(ts *transfers, ns string) *transfer.Manager {
		m, err := ts.of(ns)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	ts := open()
	if first := get(ts, "a"); first != get(ts, "a") {
		t.Error("a namespace has two managers")
	}
	get(ts, "b")
	if n := len(ts.all()); n != 2 {
		t.Errorf("two namespaces have %d managers", n)
	}
	for _, ns := range []string{"", "..", "a/b"} {
		if _, err := ts.of(ns); !errdefs.IsInvalidArgument(err) {
			t.Errorf("namespace %q: got %v, want an invalid argument", ns, err)
		}
	}
	if err := ts.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := ts.of("a"); !errdefs.IsUnavailable(err) {
		t.Errorf("after Close: got %v, want unavailable", err)
	}
	// What was left behind is swept after a restart.
	ts = open()
	if n := len(ts.all()); n != 2 {
		t.Errorf("after a restart there are %d managers, want 2", n)
	}
	if err := ts.Close(); err != nil {
		t.Fatal(err)
	}
}

// infoServer answers Info as containerd does for one namespace.
type infoServer struct {
	contentapi.UnimplementedContentServer
}

func (infoServer) Info(ctx context.Context, _ *contentapi.InfoRequest) (*contentapi.InfoResponse, error) {
	if ns, _ := namespaces.Namespace(ctx); ns != "good" {
		return nil, errdefs.ErrNotFound
	}
	return &contentapi.InfoResponse{Info: &contentapi.Info{Labels: map[string]string{"k": "v"}}}, nil
}

func TestContainerdComesLater(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	client, err := dialContainerd(c.Containerd.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := client.Labels(ctx, "good", digest.FromString("x")); err == nil {
		t.Error("an absent containerd answered")
	}

	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Containerd.Address)
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := newServer(testLogger())
	contentapi.RegisterContentServer(srv, infoServer{})
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	defer func() {
		srv.Stop()
		<-served //nolint:errcheck // only its end counts
	}()
	labels, err := client.Labels(t.Context(), "good", digest.FromString("x"))
	if err != nil || labels["k"] != "v" {
		t.Errorf("got %v, %v", labels, err)
	}
	// The namespace of the question counts, not the one of the call it arose in.
	other := namespaces.WithNamespace(t.Context(), "good")
	if _, err := client.Labels(other, "bad", digest.FromString("x")); !errdefs.IsNotFound(err) {
		t.Errorf("got %v, want not found", err)
	}
}
