package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

const upperFiles = "[snapshotter]\nupper = 'file'\nupper_size = '64MiB'\n"

// TestUpperFiles has containers fill their disks, and takes gantryd and all mounts away under them.
func TestUpperFiles(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{GantryExtra: upperFiles, DiskMiB: 512})
	_, ref := push(t, r, p.Host(), "upper", small(60, 2<<20))
	mustPull(t, n, "default", ref)
	if files := upperFilesOf(t, n); len(files) > 0 {
		t.Errorf("layers have upper files: %v", files)
	}
	before := freeSpace(t, n)

	if err := n.RunDetached(t.Context(), "default", ref, "c", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	mustExec(t, n, "c", "/helper", "write", "/kept", "before")
	checkFull(t, n, "c", 256<<20, 64<<20)
	if taken := before - freeSpace(t, n); taken > 66<<20 {
		t.Errorf("a full container takes %d bytes of the node's disk", taken)
	}
	status, err := n.GantryCLI(t.Context(), "status")
	if err != nil || !strings.Contains(status, "new containers write to files of 64.0 MiB; 1 snapshots have one") {
		t.Errorf("gantry status: %v\n%s", err, status)
	}

	// The node's disk has room for others, with another size too.
	small := []string{"run", "--snapshotter", n.Snapshotter, "--net-host", "--runc-root", filepath.Join(n.Dir, "runc"), "--detach", "--null-io",
		"--snapshotter-label", "containerd.io/snapshot/max-size=20971520", ref, "labelled", "/helper", "sleep", "600"}
	if _, err := n.Ctr(t.Context(), "default", small...); err != nil {
		t.Fatal(err)
	}
	checkFull(t, n, "labelled", 64<<20, 20<<20)

	// Containers go on while gantryd is killed and started again, and their usage is known to the new one.
	n.KillGantryd()
	mustExec(t, n, "c", "/helper", "rm", "/full")
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := mustExec(t, n, "c", "/helper", "cat", "/kept"); got != "before" {
		t.Errorf("read %q after gantryd was killed", got)
	}
	eventually(t, "what a container deletes is free", func() error {
		if taken := before - freeSpace(t, n); taken > 26<<20 {
			return fmt.Errorf("%d bytes are taken", taken)
		}
		return nil
	})

	endTask(t, n, "c")
	endTask(t, n, "labelled")
	reboot(t, n)
	if _, err := n.Ctr(t.Context(), "default", "task", "start", "--detach", "--null-io", "c"); err != nil {
		t.Fatal(err)
	}
	if got := mustExec(t, n, "c", "/helper", "cat", "/kept"); got != "before" {
		t.Errorf("read %q after a reboot", got)
	}
	checkFull(t, n, "c", 256<<20, 64<<20)

	endTask(t, n, "c")
	for _, id := range []string{"c", "labelled"} {
		if _, err := n.Ctr(t.Context(), "default", "container", "rm", id); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "removed containers are gone", func() error {
		loops, err := harness.LoopsOf(filepath.Join(n.Dir, "gantry", "snapshots"))
		if err != nil {
			return err
		}
		taken := before - freeSpace(t, n)
		if files := upperFilesOf(t, n); len(files)+len(loops) > 0 || taken > 1<<20 {
			return fmt.Errorf("left: %v, %v, %d bytes", files, loops, taken)
		}
		return nil
	})
}

// checkFull writes more than fits, and holds the usage against the file's blocks.
func checkFull(t *testing.T, n *harness.Node, id string, write, size int64) {
	t.Helper()
	_, err := n.Exec(t.Context(), "default", id, "/helper", "fill", "/full", fmt.Sprint(write))
	if err == nil || !strings.Contains(err.Error(), "no space left on device") {
		t.Fatalf("%s wrote %d bytes: %v, want ENOSPC", id, write, err)
	}
	ctx, client := clientOf(t, n, "default")
	snapshots := client.SnapshotService(n.Snapshotter)
	mounts, err := snapshots.Mounts(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	file := ""
	for _, o := range mounts[0].Options {
		if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
			key := strings.TrimSuffix(filepath.Base(filepath.Dir(upper)), ".rw")
			file = filepath.Join(n.Dir, "gantry", "snapshots", key, "upper.ext4")
		}
	}
	if fi, err := os.Stat(file); err != nil || fi.Size() != size {
		t.Errorf("the upper file of %s is %v, %v; want %d bytes", id, fi, err, size)
	}
	eventually(t, "usage is what the file takes", func() error {
		usage, err := snapshots.Usage(ctx, id)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(file, &st); err != nil {
			return err
		}
		if du := st.Blocks * 512; usage.Size != du || du < size*2/3 || du > size {
			return fmt.Errorf("usage of %s is %+v, du says %d", id, usage, du)
		}
		return nil
	})
}

func endTask(t *testing.T, n *harness.Node, id string) {
	t.Helper()
	if _, err := n.Ctr(t.Context(), "default", "task", "rm", "--force", id); err != nil {
		t.Fatal(err)
	}
}

func freeSpace(t *testing.T, n *harness.Node) int64 {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Join(n.Dir, "gantry"), &st); err != nil {
		t.Fatal(err)
	}
	return int64(st.Bfree) * st.Bsize
}

func upperFilesOf(t *testing.T, n *harness.Node) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.Dir, "gantry", "snapshots", "*", "upper.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestUpperFilesAreRefused: gantryd says at start which key is in the way.
func TestUpperFilesAreRefused(t *testing.T) {
	needGantry(t)
	for name, tt := range map[string]struct{ extra, want string }{
		"kind": {"[snapshotter]\nupper = 'xyz'\n", `snapshotter.upper: "xyz" is unknown; want "directory" or "file"`},
		"size": {"[snapshotter]\nupper = 'file'\nupper_size = '1'\n", "snapshotter.upper_size: 1B is out of range"},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := harness.StartNode(t.Context(), harness.Options{Snapshotter: harness.Gantry, GantryExtra: tt.extra})
			if err == nil {
				err = errors.Join(errors.New("the node started"), n.Close())
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
