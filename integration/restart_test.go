package integration

import (
	"fmt"
	"os"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

// readers is how many containers read while gantryd comes and goes.
const readers = 50

// TestReadersOutliveGantryd kills and stops gantryd under fifty containers that read their files from the disk all
// the time: none of them ever fails, with gantryd there or not, and a new one starts beside them.
func TestReadersOutliveGantryd(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "readers", small(30, 256<<10))
	mustPull(t, n, "default", ref)
	sum, err := n.Run(t.Context(), "default", ref, "first", "/helper", "sum", "/noise")
	if err != nil {
		t.Fatal(err)
	}
	each := func(do func(id string) error) {
		t.Helper()
		var g errgroup.Group
		g.SetLimit(8)
		for i := range readers {
			g.Go(func() error { return do(fmt.Sprint("reader", i)) })
		}
		if err := g.Wait(); err != nil {
			t.Error(err)
		}
	}
	each(func(id string) error {
		return n.RunDetached(t.Context(), "default", ref, id, "/helper", "watch", "/noise", strings.TrimSpace(sum))
	})
	n.KillGantryd()
	dropCaches(t)
	wantTasks(t, n, readers)
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	if err := n.Gantryd().Stop(); err != nil { // as an upgrade does
		t.Fatal(err)
	}
	dropCaches(t)
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a container starts after the upgrade", func() error { // once containerd has found gantryd again
		_, err := n.Run(t.Context(), "default", ref, "late", "/helper", "check", "/noise", strings.TrimSpace(sum))
		return err
	})
	dropCaches(t)
	wantTasks(t, n, readers)
	client, err := n.Client()
	if err != nil {
		t.Fatal(err)
	}
	ctx := namespaces.WithNamespace(t.Context(), "default")
	each(func(id string) error {
		c, err := client.LoadContainer(ctx, id)
		if err != nil {
			return err
		}
		task, err := c.Task(ctx, nil)
		if err != nil {
			return err
		}
		if _, err := task.Delete(ctx, containerd.WithProcessKill); err != nil {
			return err
		}
		return c.Delete(ctx, containerd.WithSnapshotCleanup)
	})
}

// dropCaches has the next reads come from the disk.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0o200); err != nil {
		t.Fatal(err)
	}
}

// wantTasks wants so many containers to run: a reader that failed has ended.
func wantTasks(t *testing.T, n *harness.Node, want int) {
	t.Helper()
	out, err := n.Ctr(t.Context(), "default", "task", "ls")
	if got := strings.Count(out, "RUNNING"); err != nil || got != want {
		t.Errorf("%d containers run, want %d (%v)\n%s", got, want, err, out)
	}
}

// hostModes are the ways layers are mounted, and what shows them.
var hostModes = []struct {
	name, extra string
	root        string // the file system of gantryd's root
	mode        string
	reason      string // in the status and in the log
	mounts      int    // a layer
	loops       int    // a layer
}{
	{name: "file", extra: "mount = 'file'", mode: "file", reason: "configured", mounts: 1},
	{name: "loop", extra: "mount = 'loop'", mode: "loop", reason: "configured", mounts: 1, loops: 2},
	{name: "directory", extra: "mount = 'directory'", mode: "directory", reason: "configured"},
	{name: "tmpfs", root: harness.Tmpfs, mode: "loop", reason: "EROFS mounts from loop devices, but not from files", mounts: 1, loops: 2},
	{
		name: "overlayfs", root: harness.Overlay, extra: "upper = 'file'", mode: "loop",
		reason: "EROFS mounts from loop devices, but not from files", mounts: 1, loops: 2,
	},
	{ // layers are upper files
		name: "directory on overlayfs", root: harness.Overlay, extra: "mount = 'directory'\nupper = 'file'", mode: "directory",
		reason: "configured", mounts: 1, loops: 1,
	},
}

// TestHosts runs an image in each way layers are mounted, also after a reboot that left no mount, takes it away, and
// wants nothing to be left. What was chosen, and why, is in the status and in the log.
func TestHosts(t *testing.T) {
	needGantry(t)
	for _, h := range hostModes {
		t.Run(h.name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{GantryExtra: "\n[snapshotter]\n" + h.extra + "\n", Root: h.root})
			im, ref := push(t, r, p.Host(), "hosts", small(31, 2<<20))
			status, err := n.GantryCLI(t.Context(), "status")
			if err != nil || !strings.Contains(status, "mount mode "+h.mode+": "+h.reason) {
				t.Errorf("status says %s, %v", status, err)
			}
			if log := readFile(t, n.Gantryd().Log()); !strings.Contains(log, "how layers are mounted") || !strings.Contains(log, h.reason) {
				t.Errorf("the log does not say that layers are mounted by %s: %s", h.mode, h.reason)
			}
			mustPull(t, n, "default", ref)
			mustRun(t, n, "default", ref, "31", "/helper", "cat", "/etc/link")
			tree, err := n.Tree(t.Context(), "default", im)
			if err != nil {
				t.Fatal(err)
			}
			wantMounts(t, n, len(im.Layers)*h.mounts, len(im.Layers)*h.loops)

			reboot(t, n)
			mustRun(t, n, "default", ref, "31", "/helper", "cat", "/etc/link") // nothing but this asks for the mounts
			again, err := n.Tree(t.Context(), "default", im)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range harness.CompareTrees(tree, again, nil) {
				t.Error("after the reboot:", d)
			}
			wantMounts(t, n, len(im.Layers)*h.mounts, len(im.Layers)*h.loops)
			if err := n.RemoveImage(t.Context(), "default", ref); err != nil {
				t.Fatal(err)
			}
			checkEmpty(t, n)
		})
	}
}

// wantMounts wants so many mounts and loop devices, once those of containers are gone.
func wantMounts(t *testing.T, n *harness.Node, mounted, attached int) {
	t.Helper()
	eventually(t, "layers mounted", func() error {
		mounts, err := harness.MountsBelow(n.Dir + "/gantry/mnt")
		if err != nil {
			return err
		}
		devices, err := harness.LoopsOf(n.Dir)
		if err != nil {
			return err
		}
		if len(mounts) != mounted || len(devices) != attached {
			return fmt.Errorf("%d mounts and %d loop devices, want %d and %d", len(mounts), len(devices), mounted, attached)
		}
		return nil
	})
}

// reboot ends both daemons, gantryd as a power failure does, and takes away what no reboot leaves: mounts and loop devices.
func reboot(t *testing.T, n *harness.Node) {
	t.Helper()
	n.KillGantryd()
	if err := n.Containerd().Stop(); err != nil {
		t.Fatal(err)
	}
	mounts, err := harness.MountsBelow(n.Dir + "/gantry/mnt")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if err := unix.Unmount(m, 0); err != nil {
			t.Errorf("unmount %s: %v", m, err)
		}
	}
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
