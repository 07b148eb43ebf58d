package snapshotter

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const testUpperSize = 32 << 20

func newFileRig(t *testing.T) *rig {
	t.Helper()
	return newRigIn(t, t.TempDir(), Options{Upper: UpperFile, UpperSize: testUpperSize})
}

// container prepares one over parent and returns its id.
func (r *rig) container(t *testing.T, key, parent string, opts ...snapshots.Opt) string {
	t.Helper()
	if _, err := r.Prepare(t.Context(), key, parent, opts...); err != nil {
		t.Fatal(err)
	}
	return r.id(t, key)
}

// inside mounts an active snapshot, as a container has it.
func (r *rig) inside(t *testing.T, key string, f func(root string) error) {
	t.Helper()
	mounts, err := r.Mounts(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := mount.WithTempMount(t.Context(), mounts, f); err != nil {
		t.Fatal(err)
	}
}

func write(key string, data []byte) func(string) error {
	return func(root string) error { return os.WriteFile(filepath.Join(root, key), data, 0o600) }
}

func (r *rig) read(t *testing.T, key, name string) (got string) {
	t.Helper()
	r.inside(t, key, func(root string) error {
		b, err := os.ReadFile(filepath.Join(root, name))
		got = string(b)
		return err
	})
	return got
}

// fill writes until the disk of the container is full.
func fill(root string) (written int64, err error) {
	f, err := os.Create(filepath.Join(root, "full"))
	if err != nil {
		return 0, err
	}
	block := bytes.Repeat([]byte("x"), 64<<10)
	for err == nil {
		var n int
		n, err = f.Write(block)
		written += int64(n)
	}
	return written, errors.Join(err, f.Close())
}

// remove removes a snapshot and checks that nothing of it stays.
func (r *rig) remove(t *testing.T, key string) {
	t.Helper()
	id := r.id(t, key)
	if err := r.Remove(t.Context(), key); err != nil {
		t.Fatal(err)
	}
	if err := r.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if exists(r.dir(id)) || exists(r.upperMount(id)) {
		t.Errorf("a removed snapshot left folder %v, mount point %v", exists(r.dir(id)), exists(r.upperMount(id)))
	}
	for range 200 { // the worker may still hold the device to sync it
		if len(loopsUnder(r.dir(id))) == 0 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("a removed snapshot left %s", loopsUnder(r.dir(id)))
}

func diskBlocks(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(name, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// TestUpperFile fills a container's disk, by upper_size and by label.
func TestUpperFile(t *testing.T) {
	r := newFileRig(t)
	top := r.pull(t, unpacks[0], "x", "", image(t)[:3]...)
	for name, tt := range map[string]struct {
		labels map[string]string
		size   int64
	}{
		"upper_size": {nil, testUpperSize},
		"max-size":   {map[string]string{snapshots.LabelSnapshotMaxSize: "67108864"}, 64 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			id := r.container(t, "c", top, snapshots.WithLabels(tt.labels))
			if fi, err := os.Stat(r.upperFile(id)); err != nil || fi.Size() != tt.size {
				t.Fatalf("the file is %v, %v; want %d bytes", fi, err, tt.size)
			}
			empty, err := r.Usage(t.Context(), "c")
			if err != nil || empty.Size > 256<<10 || empty.Inodes != 1 {
				t.Errorf("empty: usage %+v, %v", empty, err)
			}
			r.inside(t, "c", func(root string) error {
				written, err := fill(root)
				if !errors.Is(err, unix.ENOSPC) {
					t.Errorf("a full disk gives %v, want ENOSPC", err)
				}
				if written > tt.size || written < tt.size*2/3 {
					t.Errorf("%d bytes fit into a file of %d", written, tt.size)
				}
				u, err := r.Usage(t.Context(), "c")
				if err != nil || u.Size < written || u.Size > tt.size || u.Inodes != 2 {
					t.Errorf("full: usage %+v, %v; %d bytes are written", u, err, written)
				}
				// What a container deletes goes back to the disk.
				if err := os.Remove(filepath.Join(root, "full")); err != nil {
					return err
				}
				return settled(root, r.upper(id), func() bool { return diskBlocks(t, r.upperFile(id)) < 1<<20 })
			})
			if n := diskBlocks(t, r.upperFile(id)); n > 1<<20 {
				t.Errorf("an emptied file has %d bytes on the disk", n)
			}
			r.remove(t, "c")
		})
	}
}

// settled syncs until ok, for a few seconds.
func settled(root, upper string, ok func() bool) error {
	for range 100 {
		f, err := os.Open(upper)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Syncfs(int(f.Fd())), f.Close()); err != nil {
			return err
		}
		if ok() {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil
}

// TestUpperFileUsage holds Usage against du, before and after Commit.
func TestUpperFileUsage(t *testing.T) {
	r := newFileRig(t)
	id := r.container(t, "c", "")
	r.inside(t, "c", func(root string) error {
		for i := range 20 {
			if err := write(strconv.Itoa(i), bytes.Repeat([]byte("x"), 100_000))(root); err != nil {
				return err
			}
		}
		return nil
	})
	if err := settled("", r.upper(id), func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	check := func(key string) {
		t.Helper()
		var got snapshots.Usage
		var du int64
		for range 100 { // it is synced meanwhile
			if got, du = usageAndDu(t, r, key, id); got.Size == du {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if got.Size != du || du < 20*100_000 || got.Inodes != 21 {
			t.Errorf("%s: usage %+v; du says %d", key, got, du)
		}
	}
	check("c")
	r.commit(t, "committed", "c", "")
	check("committed")
	r.restart(t, func() { r.unmountLayers(t) })
	if err := r.ready(t.Context(), []string{id}); err != nil {
		t.Fatal(err)
	}
	check("committed")
}

func usageAndDu(t *testing.T, r *rig, key, id string) (snapshots.Usage, int64) {
	t.Helper()
	got, err := r.Usage(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "du", "-s", "-B1", r.upperFile(id)).Output()
	if err != nil {
		t.Fatal(err)
	}
	du, err := strconv.ParseInt(strings.Fields(string(out))[0], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return got, du
}

// TestUpperFileCommit builds a chain of what containers wrote, as buildkit does.
func TestUpperFileCommit(t *testing.T) {
	layers := image(t)[:2]
	r := newFileRig(t)
	top := r.pull(t, unpacks[0], "x", "", layers...)
	r.container(t, "a", top)
	r.inside(t, "a", func(root string) error {
		return errors.Join(os.Remove(filepath.Join(root, "big")), os.Lchown(root, 7, 8), write("a", []byte("a"))(root))
	})
	r.commit(t, "A", "a", "")
	r.container(t, "b", "A")
	r.inside(t, "b", func(root string) error {
		return errors.Join(os.RemoveAll(filepath.Join(root, "m")), os.Mkdir(filepath.Join(root, "m"), 0o700), write("m/b", []byte("b"))(root))
	})
	r.commit(t, "B", "b", "")
	want := r.show(t, "B")
	for _, gone := range []string{"big", "m/new"} {
		if want[gone] != "" {
			t.Errorf("%s is not deleted", gone)
		}
	}
	for _, path := range []string{"a", "m/b", "etc/x"} {
		if want[path] == "" {
			t.Errorf("%s is missing", path)
		}
	}
	if root := want["."]; !strings.Contains(root, "uid=7 gid=8") {
		t.Errorf("root is %s: the owner is not inherited", root)
	}
	// A layer over it, with attributes of a directory that only the file has.
	above := r.pull(t, unpacks[0], "y", "B", makeTar(t, reg("m/above", "")))
	if got := r.show(t, above)["m"]; got != want["m"] {
		t.Errorf("implied directory %s, want %s", got, want["m"])
	}
	for name, between := range map[string]func(){
		"restart": nil,
		"reboot":  func() { r.unmountLayers(t) },
		// Snapshots that are there do not care what new ones get.
		"directories from now on": func() { r.unmountLayers(t); r.opts.Upper = UpperDirectory },
		"mounts gone while it ran": func() {
			r.open(t)
			r.unmountLayers(t)
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			r.restart(t, between)
			sameTree(t, r.show(t, "B"), want)
			r.container(t, "c", "B")
			r.inside(t, "c", write("c", nil))
			r.remove(t, "c")
		})
	}
	for _, key := range []string{above, "B", "A"} {
		r.remove(t, key)
	}
}

// TestUpperFileModes has containers of either kind outlive a change of the
// configuration, and a reboot.
func TestUpperFileModes(t *testing.T) {
	r := newFileRig(t)
	top := r.pull(t, unpacks[0], "x", "", image(t)[0])
	r.container(t, "file", top)
	r.inside(t, "file", write("f", []byte("in a file")))
	for _, upper := range []Upper{UpperDirectory, UpperFile} {
		r.restart(t, func() {
			r.unmountLayers(t)
			r.opts.Upper = upper
		})
		id := r.container(t, string(upper), top)
		if r.hasUpperFile(id) != (upper == UpperFile) {
			t.Errorf("upper %s: upper file %v", upper, r.hasUpperFile(id))
		}
		r.inside(t, string(upper), write("f", []byte(upper)))
		if got := r.read(t, "file", "f"); got != "in a file" && got != "file" {
			t.Errorf("the container reads %q", got)
		}
		if upper == UpperDirectory {
			r.remove(t, "file")
		}
	}
	if got := r.read(t, "directory", "f"); got != "directory" {
		t.Errorf("the container reads %q", got)
	}
	st := r.Status()
	if st.Upper != UpperFile || st.UpperSize != testUpperSize || st.UpperFiles != 1 || st.Directories != 2 {
		t.Errorf("status %+v", st)
	}
}

// TestUpperFileAdopts: a client whose keys do not tell that it unpacks gets a file,
// and its layer comes as a tar all the same.
func TestUpperFileAdopts(t *testing.T) {
	layers := image(t)
	want := reference(t, nil, layers...)
	for _, mode := range mountModes {
		for _, how := range unpacks {
			t.Run(string(mode)+" "+how.name, func(t *testing.T) {
				r := newRigIn(t, t.TempDir(), Options{Mount: mode, Upper: UpperFile, UpperSize: testUpperSize})
				top := r.pull(t, how, "x", "", layers...)
				sameTree(t, r.show(t, top), want)
				r.restart(t, func() { r.unmountLayers(t) })
				sameTree(t, r.show(t, top), want)
				if mode != ModeDirectory {
					if err := r.Close(); err != nil { // waits for the worker
						t.Fatal(err)
					}
					if files, _ := filepath.Glob(filepath.Join(r.snapshotsDir(), "*", "upper.ext4")); len(files) > 0 {
						t.Errorf("layers keep %v", files)
					}
				}
			})
		}
	}
}

// TestUpperFileApply unpacks as containerd's own differ does, through mounts.
func TestUpperFileApply(t *testing.T) {
	layers := image(t)
	r := newFileRig(t)
	parent := ""
	var below []string
	for i, blob := range layers {
		key, name := "layer-"+strconv.Itoa(i), "done-"+strconv.Itoa(i)
		id := r.container(t, key, parent)
		opts := []archive.ApplyOpt{archive.WithParents(below)}
		if parent != "" {
			opts = append(opts, archive.WithConvertWhiteout(archive.OverlayConvertWhiteout))
		}
		if _, err := archive.Apply(t.Context(), r.upper(id), bytes.NewReader(blob), opts...); err != nil {
			t.Fatal(err)
		}
		r.commit(t, name, key, "")
		parent, below = name, append([]string{r.upper(id)}, below...)
	}
	sameTree(t, r.show(t, parent), reference(t, nil, layers...))
}

// TestUpperFileInUse removes snapshots whose file somebody else has mounted.
func TestUpperFileInUse(t *testing.T) {
	r := newFileRig(t)
	top := r.pull(t, unpacks[0], "x", "", image(t)[0])
	id := r.container(t, "c", top)
	r.inside(t, "c", func(root string) error {
		// Another mount namespace holds a copy like this one.
		elsewhere := t.TempDir()
		if err := unix.Mount(r.upperMount(id), elsewhere, "", unix.MS_BIND, ""); err != nil {
			return err
		}
		defer func() {
			if err := unmountAll(elsewhere); err != nil {
				t.Error(err)
			}
		}()
		if err := write("data", make([]byte, 8<<20))(root); err != nil {
			return err
		}
		// Somebody takes the mount point away: the next mount is of the same
		// loop device, or the two would destroy each other's work.
		if err := unmountAll(r.upperMount(id)); err != nil {
			return err
		}
		if got := r.read(t, "c", "data"); len(got) != 8<<20 {
			t.Errorf("read %d bytes", len(got))
		}
		if l := loopsUnder(r.dir(id)); len(l) != 1 {
			t.Errorf("loop devices %v, want one", l)
		}
		if err := r.Remove(t.Context(), "c"); err != nil {
			return err
		}
		if err := r.Cleanup(t.Context()); err != nil {
			return err
		}
		if exists(r.dir(id)) || exists(r.upperMount(id)) {
			t.Error("the folder or the mount point is left")
		}
		// The space is free although the file cannot go yet.
		if left := entries(t, filepath.Join(elsewhere, "upper")); len(left) > 0 {
			t.Errorf("left in a removed snapshot: %v", left)
		}
		return nil
	})
}

// TestUpperFileAfterCrash looks at what a power failure or a SIGKILL leaves in
// the middle of Prepare.
func TestUpperFileAfterCrash(t *testing.T) {
	for name, crash := range map[string]func(t *testing.T, r *rig, id string) error{
		"before the file": func(_ *testing.T, r *rig, id string) error {
			return errors.Join(os.Remove(r.upperFile(id)), os.Remove(r.upperMount(id)))
		},
		"half a file": func(_ *testing.T, r *rig, id string) error {
			return errors.Join(os.Rename(r.upperFile(id), r.upperFile(id)+".tmp"), os.Truncate(r.upperFile(id)+".tmp", 1<<20), os.Remove(r.upperMount(id)))
		},
		"folder lost":             func(_ *testing.T, r *rig, id string) error { return os.RemoveAll(r.dir(id)) },
		"file without its blocks": func(_ *testing.T, r *rig, id string) error { return punch(r.upperFile(id)) },
		"file without its length": func(_ *testing.T, r *rig, id string) error { return os.Truncate(r.upperFile(id), 0) },
		"not mounted":             func(_ *testing.T, r *rig, id string) error { return os.Remove(r.upperMount(id)) },
		"mounted without folders": removeInside("upper", "work"),
		"mounted without upper":   removeInside("upper"),
	} {
		t.Run(name, func(t *testing.T) {
			r := newFileRig(t)
			top := r.pull(t, unpacks[0], "x", "", image(t)[0])
			id := r.container(t, "c", top)
			r.restart(t, func() {
				r.unmountLayers(t)
				if err := os.Remove(r.upperSynced(id)); err != nil { // it had not come to that
					t.Fatal(err)
				}
				if err := crash(t, r, id); err != nil {
					t.Fatal(err)
				}
			})
			if _, err := r.Usage(t.Context(), "c"); err != nil {
				t.Error(err)
			}
			r.inside(t, "c", write("f", []byte("x")))
			if fi, err := os.Stat(r.upperFile(id)); err != nil || fi.Size() != testUpperSize {
				t.Errorf("the file is %v, %v", fi, err)
			}
			if exists(r.upperFile(id) + ".tmp") {
				t.Error("half a file is left")
			}
			r.remove(t, "c")
		})
	}
}

func punch(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, testUpperSize), f.Close())
}

func removeInside(names ...string) func(*testing.T, *rig, string) error {
	return func(t *testing.T, r *rig, id string) error {
		dev, err := mountUpperFile(t.Context(), r.upperFile(id), r.upperMount(id))
		if err != nil {
			return err
		}
		for _, n := range names {
			err = errors.Join(err, os.RemoveAll(filepath.Join(r.upperMount(id), n)))
		}
		return errors.Join(err, unmountAll(r.upperMount(id)), dev.Close())
	}
}

// TestUpperFileKeepsWrites: Commit of a snapshot that adopted a layer and was
// written to is refused, also when its file has to be mounted to see that.
func TestUpperFileKeepsWrites(t *testing.T) {
	r := newFileRig(t)
	mounts, err := r.Prepare(t.Context(), "c", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Adopt(t.Context(), mounts, r.store(t, image(t)[0])); err != nil {
		t.Fatal(err)
	}
	id := r.id(t, "c")
	if err := write("late", nil)(r.upper(id)); err != nil {
		t.Fatal(err)
	}
	r.restart(t, func() { r.unmountLayers(t) })
	if err := r.Commit(t.Context(), "done", "c"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("Commit: %v, want ErrFailedPrecondition", err)
	}
}

// TestDamagedUpperFile: nothing that somebody wrote is replaced by an empty file.
func TestDamagedUpperFile(t *testing.T) {
	r := newFileRig(t)
	id := r.container(t, "c", "")
	r.restart(t, func() {
		r.unmountLayers(t)
		f, err := os.OpenFile(r.upperFile(id), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteAt(bytes.Repeat([]byte{0xff}, 16), ext4Super+ext4MagicAt+ext4IDSize)
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	})
	if _, err := r.Mounts(t.Context(), "c"); err == nil || !strings.Contains(err.Error(), r.upperFile(id)) {
		t.Errorf("got %v, want an error that names the file", err)
	}
	if l := loopsUnder(r.dir(id)); len(l) > 0 {
		t.Errorf("left %v", l)
	}
	r.remove(t, "c")
}

// TestUpperFileOnFullDisk has a disk that is smaller than the file on it.
func TestUpperFileOnFullDisk(t *testing.T) {
	dir := smallDisk(t, 48<<20)
	r := newRigIn(t, dir, Options{Upper: UpperFile, UpperSize: 256 << 20})
	top := r.pull(t, unpacks[0], "x", "", image(t)[0])
	id := r.container(t, "c", top)
	r.inside(t, "c", func(root string) error {
		_, err := fill(root)
		f, e := os.Open(root)
		if e != nil {
			return e
		}
		if err = errors.Join(err, unix.Syncfs(int(f.Fd())), f.Close()); err == nil {
			t.Error("256 MiB were written to a disk of 48")
		}
		t.Logf("the container sees %v", err)
		return nil
	})
	if _, err := r.Usage(t.Context(), "c"); err != nil {
		t.Error(err)
	}
	// The database still works once there is some room, and all of it comes back.
	if err := os.Truncate(r.upperFile(id), 1<<20); err != nil {
		t.Fatal(err)
	}
	r.remove(t, "c")
	r.container(t, "c", top)
	r.inside(t, "c", write("f", make([]byte, 1<<20)))
	r.remove(t, "c")
}

// smallDisk mounts an ext4 file system of size bytes.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	u := &uppers{}
	var err error
	if u.templates, err = newTemplates(mkfsPlaces); err != nil {
		t.Fatal(err)
	}
	file, dir := filepath.Join(t.TempDir(), "disk"), t.TempDir()
	if err := u.make(t.Context(), file, size); err != nil {
		t.Fatal(err)
	}
	dev, err := mountUpperFile(t.Context(), file, dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unmountAll(dir), dev.Close()); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestUpperFileOnOtherFileSystems says where roots may lie.
func TestUpperFileOnOtherFileSystems(t *testing.T) {
	onTmpfs := func(t *testing.T) string {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unmountAll(dir); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	for fs, mounted := range map[string]func(*testing.T) string{"tmpfs": onTmpfs, "overlay": onOverlay} {
		t.Run(fs, func(t *testing.T) {
			r := newRigIn(t, mounted(t), Options{Upper: UpperFile, UpperSize: testUpperSize})
			r.container(t, "c", r.pull(t, unpacks[0], "x", "", image(t)[0]))
			r.inside(t, "c", write("f", []byte("x")))
			r.remove(t, "c")
		})
	}
}

// What a container wrote to an upper file that a restored database does not know is kept, too.
func TestRestoreKeepsUpperFiles(t *testing.T) {
	r := newFileRig(t)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r.open(t)
	if _, err := r.Prepare(t.Context(), "late", ""); err != nil {
		t.Fatal(err)
	}
	late := r.id(t, "late")
	if err := os.WriteFile(filepath.Join(r.upper(late), "precious"), []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(r.saved()), os.Remove(r.database())); err != nil {
		t.Fatal(err)
	}
	if _, n, err := RestoreDatabase(t.Context(), r.Snapshotter.root); err != nil || n != 1 {
		t.Fatalf("%d lost, %v", n, err)
	}
	r.open(t)
	found, err := filepath.Glob(filepath.Join(r.Snapshotter.root, lostFolder, "*", late, "upper.ext4"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v, %v", found, err)
	}
	at := t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "mount", "-o", "loop,ro", found[0], at).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(at, "upper", "precious"))
	if uerr := unix.Unmount(at, 0); err != nil || uerr != nil || string(got) != "data" {
		t.Errorf("it holds %q, %v, %v", got, err, uerr)
	}
}
