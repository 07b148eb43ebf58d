package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/gantryd/gantry/integration/harness"
)

// clientOf returns the node's containerd client and a context in the namespace.
func clientOf(t *testing.T, n *harness.Node, namespace string) (context.Context, *containerd.Client) {
	t.Helper()
	client, err := n.Client()
	if err != nil {
		t.Fatal(err)
	}
	return namespaces.WithNamespace(t.Context(), namespace), client
}

// plain asks all registries over plain HTTP, in the test's own process.
func plain() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))})
}

// clientPull pulls with the client.
func clientPull(ctx context.Context, t *testing.T, client *containerd.Client, ref string, opts ...containerd.RemoteOpt) containerd.Image {
	t.Helper()
	im, err := client.Pull(ctx, ref, append([]containerd.RemoteOpt{
		containerd.WithResolver(plain()), containerd.WithPullSnapshotter(snapshotter),
	}, opts...)...)
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	return im
}

// newContainer makes a container as nerdctl does: labels, a snapshot of its own, the image's configuration.
func newContainer(ctx context.Context, t *testing.T, n *harness.Node, client *containerd.Client, im containerd.Image, id string, args ...string) containerd.Container {
	t.Helper()
	spec := []oci.SpecOpts{oci.WithImageConfig(im), oci.WithHostNamespace("network")}
	if len(args) > 0 {
		spec = append(spec, oci.WithProcessArgs(args...))
	}
	c, err := client.NewContainer(ctx, id,
		containerd.WithImage(im),
		containerd.WithSnapshotter(n.Snapshotter),
		containerd.WithNewSnapshot(id, im, snapshots.WithLabels(map[string]string{"nerdctl/name": id})),
		containerd.WithContainerLabels(map[string]string{"nerdctl/name": id, "nerdctl/platform": platforms.DefaultString()}),
		containerd.WithNewSpec(spec...))
	if err != nil {
		t.Fatalf("container %s: %v", id, err)
	}
	return c
}

// runTask starts the container, waits for its end and returns what it printed.
func runTask(ctx context.Context, t *testing.T, c containerd.Container) string {
	t.Helper()
	var out, errs bytes.Buffer
	task, err := c.NewTask(ctx, cio.NewCreator(cio.WithStreams(nil, &out, &errs)))
	if err != nil {
		t.Fatalf("task of %s: %v", c.ID(), err)
	}
	ended, err := task.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(ctx); err != nil {
		t.Fatalf("start %s: %v", c.ID(), err)
	}
	status := <-ended
	task.IO().Wait() // Delete would cut off what is on its way
	if _, err := task.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	if status.ExitCode() != 0 || status.Error() != nil {
		t.Fatalf("%s: exit code %d, %v: %s", c.ID(), status.ExitCode(), status.Error(), errs.String())
	}
	return out.String()
}

func removeContainer(ctx context.Context, t *testing.T, c containerd.Container) {
	t.Helper()
	if err := c.Delete(ctx, containerd.WithSnapshotCleanup); err != nil {
		t.Errorf("delete %s: %v", c.ID(), err)
	}
}

// TestClientPull pulls with and without unpacking; what was only fetched is unpacked later, from what is on the disk.
func TestClientPull(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	for i, tc := range []struct {
		name     string
		opts     []containerd.RemoteOpt
		unpacked bool
	}{
		{"without unpack", nil, false},
		{"with unpack", []containerd.RemoteOpt{containerd.WithPullUnpack}, true},
		{"with labels, one by one", []containerd.RemoteOpt{containerd.WithPullUnpack,
			containerd.WithPullLabels(map[string]string{"who": "test"}), containerd.WithMaxConcurrentDownloads(1)}, true},
		{"to discard", []containerd.RemoteOpt{containerd.WithPullUnpack, containerd.WithChildLabelMap(images.ChildGCLabelsFilterLayers)}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, ref := push(t, r, p.Host(), fmt.Sprint("client", i), small(uint64(170+i), 4<<20))
			ctx, client := clientOf(t, n, fmt.Sprint("client", i))
			im := clientPull(ctx, t, client, ref, tc.opts...)
			unpacked, err := im.IsUnpacked(ctx, n.Snapshotter)
			if err != nil || unpacked != tc.unpacked {
				t.Fatalf("unpacked after the pull: %t, %v", unpacked, err)
			}
			p.Forget()
			if err := im.Unpack(ctx, n.Snapshotter); err != nil { // a second time is nothing
				t.Fatal(err)
			}
			if sent := p.BlobBytes(); len(sent) > 0 {
				t.Errorf("unpacking was sent %v, want nothing", sent)
			}
			if unpacked, err := im.IsUnpacked(ctx, n.Snapshotter); err != nil || !unpacked {
				t.Fatalf("unpacked: %t, %v", unpacked, err)
			}
			c := newContainer(ctx, t, n, client, im, "c")
			if got, want := runTask(ctx, t, c), fmt.Sprint(170+i); got != want {
				t.Errorf("printed %q, want %s", got, want)
			}
			removeContainer(ctx, t, c)
		})
	}
}

// TestClientFetch fetches all content without an image, as `ctr content fetch` and nerdctl do for other platforms.
func TestClientFetch(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "fetch", small(71, 4<<20))
	ctx, client := clientOf(t, n, "default")
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	fetched, err := client.Fetch(ctx, ref, containerd.WithResolver(plain()))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range im.Layers {
		got, err := content.ReadBlob(ctx, client.ContentStore(), l)
		if err != nil || digest.FromBytes(got) != l.Digest {
			t.Errorf("layer %s: %d bytes, %v", l.Digest, len(got), err)
		}
	}
	image := containerd.NewImage(client, fetched)
	if err := image.Unpack(ctx, n.Snapshotter); err != nil {
		t.Fatal(err)
	}
	mustRun(t, n, "default", ref, "71", "/helper", "cat", "/etc/link")
}

// TestClientLeases wants a lease to keep what was pulled under it from garbage collection, and nothing to be left after it.
func TestClientLeases(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "leased", small(72, 2<<20))
	ctx, client := clientOf(t, n, "default")
	lease, err := client.LeasesService().Create(ctx, leases.WithID("mine"))
	if err != nil {
		t.Fatal(err)
	}
	leased := leases.WithLease(ctx, lease.ID)
	im := clientPull(leased, t, client, ref, containerd.WithPullUnpack)
	chain := chainOf(ctx, t, im)
	s := client.SnapshotService(n.Snapshotter)
	if _, err := s.Prepare(leased, "working", chain); err != nil {
		t.Fatal(err)
	}
	if err := client.ImageService().Delete(ctx, ref, images.SynchronousDelete()); err != nil {
		t.Fatal(err)
	}
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, chain); err != nil {
		t.Errorf("a leased snapshot: %v", err)
	}
	mounts, err := s.Mounts(ctx, "working")
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(ctx, mounts, func(root string) error {
		got, err := os.ReadFile(filepath.Join(root, "etc", "seed"))
		if string(got) != "72" {
			t.Errorf("the file says %q, want 72", got)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if err := client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, "working"); !errdefs.IsNotFound(err) {
		t.Errorf("the lease is gone, its snapshot is not: %v", err)
	}
	checkEmpty(t, n)
}

func chainOf(ctx context.Context, t *testing.T, im containerd.Image) string {
	t.Helper()
	diffIDs, err := im.RootFS(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return identity.ChainID(diffIDs).String()
}

// TestClientNamespaces has one image in three namespaces: it is fetched once, and goes from each alone.
func TestClientNamespaces(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "shared", small(73, 4<<20))
	var contexts []context.Context
	var client *containerd.Client
	for _, ns := range []string{"one", "two", "three"} {
		var ctx context.Context
		ctx, client = clientOf(t, n, ns)
		clientPull(ctx, t, client, ref, containerd.WithPullUnpack)
		contexts = append(contexts, ctx)
	}
	if snapshotter == harness.Gantry {
		checkBlobBytes(t, p, im, 1)
	}
	for i, ctx := range contexts {
		image, err := client.GetImage(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		c := newContainer(ctx, t, n, client, image, "same-name")
		if got := runTask(ctx, t, c); got != "73" {
			t.Errorf("printed %q, want 73", got)
		}
		removeContainer(ctx, t, c)
		if err := client.ImageService().Delete(ctx, ref, images.SynchronousDelete()); err != nil {
			t.Fatal(err)
		}
		left := 0
		if err := client.SnapshotService(n.Snapshotter).Walk(ctx, func(context.Context, snapshots.Info) error { left++; return nil }); err != nil || left > 0 {
			t.Errorf("namespace %d: %d snapshots are left, %v", i, left, err)
		}
	}
	checkEmpty(t, n)
}

// TestClientCopy is `nerdctl cp` both ways: into a container that does not run, and out of one that does.
func TestClientCopy(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "copy", small(77, 1<<20))
	ctx, client := clientOf(t, n, "default")
	im := clientPull(ctx, t, client, ref, containerd.WithPullUnpack)
	c := newContainer(ctx, t, n, client, im, "c", "/helper", "cat", "/new/file", "/etc/seed")
	inRootfs(ctx, t, n, client, "c", func(root string) error {
		if err := os.Mkdir(filepath.Join(root, "new"), 0o755); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(root, "new", "file"), []byte("copied "), 0o600)
	})
	if got := runTask(ctx, t, c); got != "copied 77" {
		t.Errorf("printed %q, want what was copied in", got)
	}
	removeContainer(ctx, t, c)

	c = newContainer(ctx, t, n, client, im, "d", "/helper", "sleep", "60")
	task, err := c.NewTask(ctx, cio.NullIO)
	if err != nil {
		t.Fatal(err)
	}
	ended, err := task.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(ctx); err != nil {
		t.Fatal(err)
	}
	root := fmt.Sprintf("/proc/%d/root", task.Pid())
	if got, err := os.ReadFile(filepath.Join(root, "etc", "seed")); err != nil || string(got) != "77" {
		t.Errorf("copied out %q, %v", got, err)
	}
	if err := task.Kill(ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-ended
	if _, err := task.Delete(ctx); err != nil {
		t.Fatal(err)
	}
	removeContainer(ctx, t, c)
}

// inRootfs calls fn with the folder where a container's file system is mounted, to write in.
func inRootfs(ctx context.Context, t *testing.T, n *harness.Node, client *containerd.Client, key string, fn func(root string) error) {
	t.Helper()
	mounts, err := client.SnapshotService(n.Snapshotter).Mounts(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(ctx, mounts, fn); err != nil {
		t.Fatal(err)
	}
}
