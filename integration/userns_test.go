package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/rootfs"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// owned is an image whose files belong to several users, the root directory included.
func owned() harness.ImageSpec {
	spec := small(1, 1<<20)
	spec.Layers = append(spec.Layers,
		harness.LayerSpec{Tar: harness.Entries(
			ownedBy(harness.Folder("home", 0o755), 0, 0), ownedBy(harness.Folder("home/user", 0o700), 1000, 1000),
			ownedBy(harness.File("home/user/file", "mine"), 1000, 50), ownedBy(harness.File("etc/of-last", "l"), 65534, 65534),
			ownedBy(harness.Symlink("home/link", "user/file"), 1000, 0),
		)},
		harness.LayerSpec{Tar: harness.Entries(ownedBy(harness.File("home/user/.wh.file", ""), 0, 0), ownedBy(harness.File("home/user/second", "2"), 1000, 1000))},
	)
	return spec
}

func ownedBy(e harness.Entry, uid, gid int) harness.Entry {
	e.Uid, e.Gid = uid, gid
	return e
}

// inNamespace are the flags of ctr run for a user namespace.
var inNamespace = []string{"--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"}

// userNamespaceUse is what a container in a user namespace saw and left.
type userNamespaceUse struct {
	seen, written, usage string
	diff                 []string // entries of what it changed, as an image layer
}

// TestUserNamespace runs a container in a user namespace and compares what it
// sees, what it writes and what a commit of it holds with overlayfs: through
// id-mapped mounts, through the copy that clients make by themselves, and
// through the copy of a containerd that was not told of remap-ids.
func TestUserNamespace(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	p := newProxy(t, r)
	im, ref := push(t, r, p.Host(), "owned", owned())
	reference := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	node := newNode(t, harness.Options{})
	for _, n := range []*harness.Node{reference, node} {
		if err := n.AddRegistry("http", p.Host()); err != nil {
			t.Fatal(err)
		}
		mustPull(t, n, "default", ref)
		// The namespace's root is nobody to the host, and looks for its root file system in there.
		if err := os.Chmod(n.Dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	mapped := append(slices.Clone(inNamespace), "--remap-labels")
	want := map[string]userNamespaceUse{"id-mapped": useUserNamespace(t, reference, ref, "mapped", mapped), "copied": useUserNamespace(t, reference, ref, "copied", inNamespace)}
	for line := range strings.Lines(want["id-mapped"].seen) {
		if !strings.Contains(line, " 0:0 ") && !strings.Contains(line, "/home") && !strings.Contains(line, "/etc/") {
			t.Errorf("overlayfs shows %q, want root's", line)
		}
	}
	checkUse(t, "id-mapped", useUserNamespace(t, node, ref, "mapped", mapped), want["id-mapped"])
	if n := committed(t, node); n != len(im.Layers) {
		t.Errorf("%d committed snapshots of %d layers: the image was copied", n, len(im.Layers))
	}
	checkUse(t, "copied", useUserNamespace(t, node, ref, "copied", inNamespace), want["copied"])
	withoutRemapIDs(t, node)
	checkUse(t, "copied without remap-ids", useUserNamespace(t, node, ref, "told", mapped), want["copied"])
}

func committed(t *testing.T, n *harness.Node) (count int) {
	t.Helper()
	client, err := n.Client()
	if err != nil {
		t.Fatal(err)
	}
	err = client.SnapshotService(n.Snapshotter).Walk(namespaces.WithNamespace(t.Context(), "default"), func(context.Context, snapshots.Info) error {
		count++
		return nil
	}, "kind==committed")
	if err != nil {
		t.Fatal(err)
	}
	return count
}

// useUserNamespace runs a container that looks around and writes.
func useUserNamespace(t *testing.T, n *harness.Node, ref, id string, flags []string) (use userNamespaceUse) {
	t.Helper()
	args := append([]string{"run", "--snapshotter", n.Snapshotter, "--runc-root", filepath.Join(n.Dir, "runc"), "--detach", "--null-io"}, flags...)
	if _, err := n.Ctr(t.Context(), "default", append(args, ref, id, "/helper", "sleep", "600")...); err != nil {
		t.Fatalf("run: %v", err)
	}
	exec := func(args ...string) string {
		t.Helper()
		out, err := n.Exec(t.Context(), "default", id, args...)
		if err != nil {
			t.Fatalf("exec %q: %v", args, err)
		}
		return out
	}
	use.seen = exec("/helper", "owners", "/")
	exec("/helper", "write", "/etc/new", "written")
	exec("/helper", "write", "/etc/seed", "changed")
	exec("/helper", "write", "/home/user/second", "changed")
	use.written = exec("/helper", "owners", "/")
	out, err := n.Ctr(t.Context(), "default", "snapshot", "--snapshotter", n.Snapshotter, "usage", "-b", id)
	if err != nil {
		t.Fatal(err)
	}
	use.usage = strings.TrimPrefix(strings.Join(strings.Fields(out), " "), "KEY SIZE INODES "+id)
	use.diff = changes(t, n, id)
	if _, err := n.Ctr(t.Context(), "default", "task", "rm", "-f", id); err != nil {
		t.Error(err)
	}
	if _, err := n.Ctr(t.Context(), "default", "container", "rm", id); err != nil {
		t.Error(err)
	}
	return use
}

// changes lists the entries of the layer that a commit of the container is.
func changes(t *testing.T, n *harness.Node, id string) (entries []string) {
	t.Helper()
	client, err := n.Client()
	if err != nil {
		t.Fatal(err)
	}
	ctx, done, err := client.WithLease(namespaces.WithNamespace(t.Context(), "default"), leases.WithRandomID())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	err = eachChange(ctx, client, n.Snapshotter, id, func(h *tar.Header) {
		entries = append(entries, fmt.Sprintf("%c %o %d:%d %d %s", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size, h.Name))
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(entries)
	return entries
}

func eachChange(ctx context.Context, client *containerd.Client, snapshotter, id string, fn func(*tar.Header)) error {
	layer, err := rootfs.CreateDiff(ctx, id, client.SnapshotService(snapshotter), client.DiffService())
	if err != nil {
		return err
	}
	blob, err := content.ReadBlob(ctx, client.ContentStore(), layer)
	if err != nil {
		return err
	}
	plain, err := compression.DecompressStream(bytes.NewReader(blob))
	if err != nil {
		return err
	}
	defer plain.Close()
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		fn(h)
	}
}

func checkUse(t *testing.T, what string, got, want userNamespaceUse) {
	t.Helper()
	if got.seen != want.seen {
		t.Errorf("%s: the container sees\n%swith overlayfs\n%s", what, got.seen, want.seen)
	}
	if got.written != want.written {
		t.Errorf("%s: after writing the container sees\n%swith overlayfs\n%s", what, got.written, want.written)
	}
	if got.usage != want.usage {
		t.Errorf("%s: usage %q, with overlayfs %q", what, got.usage, want.usage)
	}
	if !slices.Equal(got.diff, want.diff) {
		t.Errorf("%s: a commit holds\n%s\nwith overlayfs\n%s", what, strings.Join(got.diff, "\n"), strings.Join(want.diff, "\n"))
	}
}

// withoutRemapIDs restarts containerd with a drop-in from before gantry had the capability.
func withoutRemapIDs(t *testing.T, n *harness.Node) {
	t.Helper()
	file := filepath.Join(n.Dir, "gantry-dropin.toml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	older := bytes.Replace(text, []byte(`["rebase", "remap-ids"]`), []byte(`["rebase"]`), 1)
	if bytes.Equal(older, text) {
		t.Fatalf("remap-ids is not declared, so id-mapped mounts do not work here:\n%s", text)
	}
	if err := os.WriteFile(file, older, 0o600); err != nil {
		t.Fatal(err)
	}
	n.Containerd().Kill()
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestCRIUserNamespace runs a pod of CRI in a user namespace, as the kubelet does for hostUsers: false.
func TestCRIUserNamespace(t *testing.T) {
	needGantry(t)
	n := newCRI(t, "", harness.Options{})
	if err := os.Chmod(n.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	_, ref := push(t, n.registry, n.proxy.Host(), "owned", owned())
	n.criPull(t, ref)
	ids := func(host uint32) []*cri.IDMapping { return []*cri.IDMapping{{HostId: host, Length: 65536}} }
	config := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "mapped", Uid: "uid-mapped", Namespace: "tests"},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{
			Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER,
			UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: ids(100000), Gids: ids(200000)},
		}}},
	}
	resp, err := n.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	id := n.container(t, resp.PodSandboxId, config, "mapped", ref)
	n.exec(t, id, "/helper", "write", "/etc/new", "text")
	seen := n.exec(t, id, "/helper", "owners", "/")
	for _, want := range []string{" 1000:1000 1 /home/user/second\n", " 65534:65534 1 /etc/of-last\n", " 0:0 4 /etc/new\n", " 0:0 1 /etc/seed\n", " 0:0 0 /\n"} {
		if !strings.Contains(seen, want) {
			t.Errorf("the container sees\n%swant %q in it", seen, want)
		}
	}
	if got := n.exec(t, id, "/helper", "cat", "/proc/self/uid_map"); !strings.Contains(got, "100000") {
		t.Errorf("not in a user namespace: %q", got)
	}
	n.exec(t, id, "/helper", "write", "/home/user/second", "changed")
	n.removePod(t, resp.PodSandboxId)
}
