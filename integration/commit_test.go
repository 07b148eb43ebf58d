package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/rootfs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

// TestClientCommit commits what a container changed as nerdctl does, and pulls the new image elsewhere: all nodes show
// what the container had. The second commit is of a container of the first one's image.
func TestClientCommit(t *testing.T) {
	for name, retain := range map[string]string{"all": "", "none": discarding} {
		t.Run("retain "+name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{GantryExtra: retain})
			other := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
			_, ref := push(t, r, p.Host(), "base", committable(80))
			ctx, client := clientOf(t, n, "default")
			im := clientPull(ctx, t, client, ref, containerd.WithPullUnpack)
			for i := range 2 {
				key := fmt.Sprint("c", i)
				c := newContainer(ctx, t, n, client, im, key, "/helper", "write", fmt.Sprint("/tmp/by-", key), "the container")
				runTask(ctx, t, c)
				inRootfs(ctx, t, n, client, key, func(root string) error { return change(root, i) })
				want := treeOf(ctx, t, n, client, key)

				target := fmt.Sprintf("%s/committed%d:test", r.Host(), i)
				im = commit(ctx, t, n, client, im, key, target)
				removeContainer(ctx, t, c)
				c = newContainer(ctx, t, n, client, im, "again"+key, "/helper", "cat", fmt.Sprint("/tmp/by-", key))
				wantSame(t, "the committed image's snapshot", want, treeOf(ctx, t, n, client, "again"+key))
				if got := runTask(ctx, t, c); got != "the container" {
					t.Errorf("printed %q", got)
				}
				removeContainer(ctx, t, c)

				if err := client.Push(ctx, target, im.Target(), containerd.WithResolver(plain())); err != nil {
					t.Fatalf("push: %v", err)
				}
				checkPulledTree(t, other, target, want)
				if err := n.AddRegistry("http", r.Host()); err != nil {
					t.Fatal(err)
				}
				checkPulledTree(t, n, target, want)
			}
		})
	}
}

// checkPulledTree pulls the image into a namespace of its own and compares.
func checkPulledTree(t *testing.T, n *harness.Node, ref string, want harness.FileTree) {
	t.Helper()
	mustPull(t, n, "elsewhere", ref)
	ctx, client := clientOf(t, n, "elsewhere")
	im, err := client.GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	c := newContainer(ctx, t, n, client, im, "pulled")
	wantSame(t, n.Snapshotter, want, treeOf(ctx, t, n, client, "pulled"))
	removeContainer(ctx, t, c)
}

func wantSame(t *testing.T, what string, want, got harness.FileTree) {
	t.Helper()
	// The root of an image is made by who unpacks it. Archives of containerd have whole seconds.
	for path, e := range want {
		e.Mtime = e.Mtime.Truncate(time.Second)
		want[path] = e
		if g, ok := got[path]; ok {
			g.Mtime = g.Mtime.Truncate(time.Second)
			got[path] = g
		}
	}
	for _, line := range harness.CompareTrees(want, got, func(path string) bool { return path == "." }) {
		t.Error(what, ": ", line)
	}
}

// treeOf reads a container's file system.
func treeOf(ctx context.Context, t *testing.T, n *harness.Node, client *containerd.Client, key string) (tree harness.FileTree) {
	t.Helper()
	inRootfs(ctx, t, n, client, key, func(root string) (err error) {
		tree, err = harness.WalkTree(root)
		return err
	})
	return tree
}

// capability is what setcap cap_net_bind_service=ep writes. Of extended attributes containerd's diff carries this one alone.
const capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// committable is an image with a folder that [change] makes something else.
func committable(seed uint64) harness.ImageSpec {
	spec := small(seed, 2<<20)
	spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Entries(
		harness.Folder("app", 0o755), harness.File("app/one", "1"), harness.Folder("app/sub", 0o700), harness.File("app/sub/two", "2"))})
	return spec
}

// change does to a file system what a diff has to carry.
func change(root string, round int) error {
	in := func(path ...string) string { return filepath.Join(append([]string{root}, path...)...) }
	file := fmt.Sprint("file", round)
	past := time.Date(2001, 2, 3, 4, 5, 6, 0, time.UTC)
	errs := []error{
		os.WriteFile(in(file), bytes.Repeat([]byte("changed\n"), 5000), 0o640),
		os.Chown(in(file), 1234, 70000),
		os.Chmod(in(file), 0o750|os.ModeSetuid),
		unix.Setxattr(in(file), "security.capability", []byte(capability), 0),
		os.Chtimes(in(file), past, past),
		os.Link(in(file), in("hard"+file)),
		os.Symlink("../"+file, in("etc", "to-"+file)),
		unix.Mkfifo(in("fifo"+file), 0o600),
		unix.Mknod(in("null"+file), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		os.WriteFile(in("sparse"+file), nil, 0o644),
		os.Truncate(in("sparse"+file), 5<<20),
		os.Remove(in("noise", fmt.Sprintf("%03d", round))),                               // a whiteout
		os.Chmod(in("noise", fmt.Sprintf("%03d", 5+round)), 0o600),                       // copied up
		os.Rename(in("noise", fmt.Sprintf("%03d", 10+round)), in("noise", "moved"+file)), // both
	}
	if round == 0 {
		errs = append(errs, // a folder made anew is opaque; a folder becomes a file
			os.RemoveAll(in("etc")), os.Mkdir(in("etc"), 0o711), os.WriteFile(in("etc", "new"), []byte("new"), 0o600),
			os.RemoveAll(in("app")), os.WriteFile(in("app"), []byte("a file"), 0o600))
	} else {
		errs = append(errs, // and back
			os.Remove(in("app")), os.Mkdir(in("app"), 0o755), os.RemoveAll(in("etc")), os.Mkdir(in("etc"), 0o700))
	}
	return errors.Join(errs...)
}

// commit makes an image of what the container changed.
func commit(ctx context.Context, t *testing.T, n *harness.Node, client *containerd.Client, base containerd.Image, key, target string) containerd.Image {
	t.Helper()
	ctx, done, err := client.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	layer, err := rootfs.CreateDiff(ctx, key, client.SnapshotService(n.Snapshotter), client.DiffService(),
		diff.WithMediaType(ocispec.MediaTypeImageLayerGzip))
	if err != nil {
		t.Fatalf("diff: %v", err)
	}
	info, err := client.ContentStore().Info(ctx, layer.Digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := base.Spec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.Digest(info.Labels["containerd.io/uncompressed"]))
	manifest, err := images.Manifest(ctx, client.ContentStore(), base.Target(), base.Platform())
	if err != nil {
		t.Fatal(err)
	}
	manifest.Layers = append(manifest.Layers, layer)
	manifest.Config = writeJSON(ctx, t, client, manifest.Config.MediaType, config, map[string]string{
		"containerd.io/gc.ref.snapshot." + n.Snapshotter: "",
	})
	labels := map[string]string{"containerd.io/gc.ref.content.0": manifest.Config.Digest.String()}
	for i, l := range manifest.Layers {
		labels[fmt.Sprint("containerd.io/gc.ref.content.", i+1)] = l.Digest.String()
	}
	created, err := client.ImageService().Create(ctx, images.Image{
		Name: target, Target: writeJSON(ctx, t, client, ocispec.MediaTypeImageManifest, manifest, labels),
	})
	if err != nil {
		t.Fatal(err)
	}
	im := containerd.NewImage(client, created)
	if err := im.Unpack(ctx, n.Snapshotter); err != nil {
		t.Fatalf("unpack what was committed: %v", err)
	}
	return im
}

func writeJSON(ctx context.Context, t *testing.T, client *containerd.Client, mediaType string, v any, labels map[string]string) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	delete(labels, "containerd.io/gc.ref.snapshot."+snapshotter) // Unpack sets it
	if err := content.WriteBlob(ctx, client.ContentStore(), "json-"+desc.Digest.String(), bytes.NewReader(data), desc, content.WithLabels(labels)); err != nil {
		t.Fatal(err)
	}
	return desc
}

// TestCommitSnapshot commits a container's snapshot itself, as buildkit does after each RUN, twice over, and makes layers of
// both afterwards: the result equals what is mounted, also with another snapshotter.
func TestCommitSnapshot(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "built", committable(81))
	ctx, client := clientOf(t, n, "default")
	im := clientPull(ctx, t, client, ref, containerd.WithPullUnpack)
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	s := client.SnapshotService(n.Snapshotter)
	parent := chainOf(ctx, t, im)
	var layers []ocispec.Descriptor
	var want harness.FileTree
	for i := range 2 {
		active, name := fmt.Sprint("run", i), fmt.Sprint("ran", i)
		if _, err := s.Prepare(ctx, active, parent); err != nil {
			t.Fatal(err)
		}
		inRootfs(ctx, t, n, client, active, func(root string) error { return change(root, i) })
		want = treeOf(ctx, t, n, client, active)
		if err := s.Commit(ctx, name, active); err != nil {
			t.Fatal(err)
		}
		usage, err := s.Usage(ctx, name)
		if err != nil || usage.Size < 40000 || usage.Inodes < 10 {
			t.Errorf("%s uses %+v, %v", name, usage, err)
		}
		layer, err := rootfs.CreateDiff(ctx, name, s, client.DiffService())
		if err != nil {
			t.Fatal(err)
		}
		layers, parent = append(layers, layer), name
	}
	if _, err := s.Prepare(ctx, "result", parent); err != nil {
		t.Fatal(err)
	}
	wantSame(t, "after the commits", want, treeOf(ctx, t, n, client, "result"))

	// The same from the layers, by containerd's own snapshotter.
	over := client.SnapshotService(harness.Overlayfs)
	if err := im.Unpack(ctx, harness.Overlayfs); err != nil {
		t.Fatal(err)
	}
	parent = chainOf(ctx, t, im)
	for i, l := range layers {
		active, name := fmt.Sprint("layer", i), fmt.Sprint("layered", i)
		mounts, err := over.Prepare(ctx, active, parent)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.DiffService().Apply(ctx, l, mounts); err != nil {
			t.Fatal(err)
		}
		if err := over.Commit(ctx, name, active); err != nil {
			t.Fatal(err)
		}
		parent = name
	}
	mounts, err := over.View(ctx, "over", parent)
	if err != nil {
		t.Fatal(err)
	}
	err = mount.WithTempMount(ctx, mounts, func(root string) error {
		got, err := harness.WalkTree(root)
		wantSame(t, "from the layers", want, got)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// None of them can go before its child.
	if err := s.Remove(ctx, "ran0"); err == nil || !strings.Contains(err.Error(), "child") {
		t.Errorf("removal of a parent: %v", err)
	}
	for _, key := range []string{"result", "ran1", "ran0"} {
		if err := s.Remove(ctx, key); err != nil {
			t.Errorf("removal of %s: %v", key, err)
		}
	}
}

// TestCommitRunning commits a container while it runs and writes, as `nerdctl commit` does, to each compression. Nothing of
// that disturbs the container.
func TestCommitRunning(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "running", small(82, 1<<20))
	ctx, client := clientOf(t, n, "default")
	clientPull(ctx, t, client, ref, containerd.WithPullUnpack)
	if err := n.RunDetached(t.Context(), "default", ref, "running", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	for i, mediaType := range []string{ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayer} {
		file := fmt.Sprint("/tmp/", i)
		if _, err := n.Exec(t.Context(), "default", "running", "/helper", "write", file, "while it runs"); err != nil {
			t.Fatal(err)
		}
		s := client.SnapshotService(n.Snapshotter)
		layer, err := rootfs.CreateDiff(ctx, "running", s, client.DiffService(), diff.WithMediaType(mediaType))
		if err != nil || layer.MediaType != mediaType {
			t.Fatalf("%s: %+v, %v", mediaType, layer, err)
		}
		im, err := client.GetImage(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		key := fmt.Sprint("applied", i)
		mounts, err := s.Prepare(ctx, key, chainOf(ctx, t, im))
		if err != nil {
			t.Fatal(err)
		}
		applied, err := client.DiffService().Apply(ctx, layer, mounts)
		if err != nil {
			t.Fatal(err)
		}
		info, err := client.ContentStore().Info(ctx, layer.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if want := info.Labels["containerd.io/uncompressed"]; mediaType != ocispec.MediaTypeImageLayer && applied.Digest.String() != want {
			t.Errorf("%s: its DiffID is %s, Apply says %s", mediaType, want, applied.Digest)
		}
		if err := s.Commit(ctx, key+"-committed", key); err != nil {
			t.Fatal(err)
		}
		if _, err := s.View(ctx, key+"-view", key+"-committed"); err != nil {
			t.Fatal(err)
		}
		inRootfs(ctx, t, n, client, key+"-view", func(root string) error {
			got, err := os.ReadFile(filepath.Join(root, file))
			if string(got) != "while it runs" {
				t.Errorf("%s: the file says %q", mediaType, got)
			}
			return err
		})
	}
	if out, err := n.Exec(t.Context(), "default", "running", "/helper", "cat", "/etc/link", "/tmp/0"); err != nil || out != "82while it runs" {
		t.Errorf("the container says %q, %v", out, err)
	}
}
