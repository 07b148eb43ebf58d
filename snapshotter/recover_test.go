package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// unmountLayers does to the mounts what a reboot does.
func (r *rig) unmountLayers(t *testing.T) {
	t.Helper()
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(r.mountsDir()))
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range infos {
		if err := unmountAll(i.Mountpoint); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRestart(t *testing.T) {
	layers := image(t)[:3]
	tests := map[string]func(t *testing.T, r *rig){
		"nothing happened": func(*testing.T, *rig) {},
		"reboot":           func(t *testing.T, r *rig) { r.unmountLayers(t) },
		"indexes gone": func(t *testing.T, r *rig) {
			r.unmountLayers(t)
			eachIndex(t, r, os.Remove)
		},
		"indexes cut": func(t *testing.T, r *rig) {
			r.unmountLayers(t)
			eachIndex(t, r, func(name string) error { return os.Truncate(name, 1024) })
		},
		"indexes damaged": func(t *testing.T, r *rig) {
			r.unmountLayers(t)
			eachIndex(t, r, flipByte)
		},
		"layer cache gone": func(t *testing.T, r *rig) {
			r.unmountLayers(t)
			eachIndex(t, r, os.Remove)
			for _, e := range entries(t, filepath.Join(filepath.Dir(r.root), "layers", "sha256")) {
				if err := os.Remove(e); err != nil {
					t.Fatal(err)
				}
			}
		},
		"no EROFS any more": func(t *testing.T, r *rig) {
			r.unmountLayers(t)
			r.opts.Mount = ModeDirectory
		},
		"no EROFS and killed while extracting": func(t *testing.T, r *rig) {
			r.unmountLayers(t)
			r.opts.Mount = ModeDirectory
			for _, dir := range entries(t, r.snapshotsDir()) {
				writeTestFile(t, filepath.Join(dir, "extracting"))
				if err := os.MkdirAll(filepath.Join(dir, "upper"), 0o755); err != nil {
					t.Fatal(err)
				}
				writeTestFile(t, filepath.Join(dir, "upper", "half"))
			}
		},
		"leftovers": func(t *testing.T, r *rig) {
			for _, dir := range []string{"4711", "9.stale1", "lost+found"} {
				if err := os.MkdirAll(filepath.Join(r.dir(dir), "upper", "x"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Mkdir(r.mountpoint("4712"), 0o700); err != nil {
				t.Fatal(err)
			}
			id := r.id(t, "rebase-1")
			if err := mountTar(t.Context(), ModeFile, r.index(id), r.layer(id), r.mountpoint("4712")); err != nil {
				t.Fatal(err)
			}
			writeTestFile(t, r.index(id)+".tmp")
			probe := filepath.Join(r.root, "probe")
			if err := errors.Join(os.MkdirAll(filepath.Join(probe, "mnt", "0"), 0o700), os.Mkdir(filepath.Join(probe, "mapped"), 0o700)); err != nil {
				t.Fatal(err)
			}
			if err := mountTar(t.Context(), ModeFile, r.index(id), r.layer(id), filepath.Join(probe, "mnt", "0")); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(filepath.Join(probe, "mnt"), filepath.Join(probe, "mapped"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
				t.Fatal(err)
			}
		},
	}
	want := reference(t, nil, layers...)
	for name, between := range tests {
		restarts(t, name, Options{Mount: ModeFile}, layers, want, between)
		restarts(t, name+" and upper files", Options{Mount: ModeFile, Upper: UpperFile, UpperSize: testUpperSize}, layers, want, between)
	}
}

func restarts(t *testing.T, name string, o Options, layers [][]byte, want map[string]string, between func(*testing.T, *rig)) {
	t.Run(name, func(t *testing.T) {
		r := newRigIn(t, t.TempDir(), o)
		var tops []string
		for _, how := range unpacks {
			tops = append(tops, r.pull(t, how, how.name, "", layers...))
		}
		for _, top := range tops {
			sameTree(t, r.show(t, top), want)
		}
		r.container(t, "container", tops[0])
		r.inside(t, "container", write("written", []byte("x")))
		r.restart(t, nil) // the worker may still be tidying
		between(t, r)
		r.restart(t, nil)
		for _, top := range tops {
			sameTree(t, r.show(t, top), want)
		}
		if got := r.read(t, "container", "written"); got != "x" {
			t.Errorf("the container reads %q", got)
		}
		r.remove(t, "container")
		if err := r.Close(); err != nil { // the worker tidies
			t.Fatal(err)
		}
		if got := len(entries(t, r.snapshotsDir())); got != 6 {
			t.Errorf("%d folders in snapshots, want 6", got)
		}
		if n := len(entries(t, r.mountsDir())); r.opts.Mount == ModeFile && n != 6 {
			t.Errorf("%d mount points, want 6", n)
		}
		for _, dir := range entries(t, r.snapshotsDir()) {
			for _, e := range entries(t, dir) {
				if strings.HasSuffix(e, ".tmp") || strings.HasSuffix(e, "extracting") {
					t.Errorf("%s is left", e)
				}
			}
		}
		if exists(filepath.Join(r.root, "probe")) {
			t.Error("probe is left")
		}
	})
}

// A mount that somebody takes away while gantryd runs must not show as an empty
// layer.
func TestMissingMountIsMadeAgain(t *testing.T) {
	layers := image(t)[:3]
	want := reference(t, nil, layers...)
	r := newRig(t, ModeFile)
	top := r.pull(t, unpacks[0], "x", "", layers...)
	if _, err := r.View(t.Context(), "view", top); err != nil {
		t.Fatal(err)
	}
	if !r.tars.has(r.id(t, top)) {
		t.Error("a layer that was shown is not remembered")
	}
	r.unmountLayers(t)
	mounts, err := r.Mounts(t.Context(), "view")
	if err != nil {
		t.Fatal(err)
	}
	sameTree(t, look(t, mounts), want)
	r.unmountLayers(t)
	sameTree(t, r.show(t, top), want)
}

// A layer that is remembered as a tar, and whose mount somebody takes away, may become a directory.
func TestRememberedLayerBecomesDirectory(t *testing.T) {
	layers := image(t)[:3]
	want := reference(t, nil, layers...)
	r := newRig(t, ModeFile)
	top := r.pull(t, unpacks[0], "x", "", layers...)
	r.restart(t, func() { r.opts.Mount = ModeDirectory })
	sameTree(t, r.show(t, top), want) // still from the mounts
	id := r.id(t, top)
	if !r.tars.has(id) || !r.isTar(id) {
		t.Fatal("the layer is no tar, or not remembered")
	}
	r.unmountLayers(t)
	sameTree(t, r.show(t, top), want)
	if r.tars.has(id) || r.isTar(id) {
		t.Error("the layer is still a tar, or remembered as one")
	}
	sameTree(t, r.show(t, top), want)
}

func TestRemovedLayersAreForgotten(t *testing.T) {
	r := newRig(t, ModeFile)
	layers := image(t)[:3]
	r.show(t, r.pull(t, unpacks[0], "x", "", layers...))
	for i := len(layers) - 1; i >= 0; i-- {
		r.remove(t, fmt.Sprintf("x-%d", i))
	}
	r.tars.ids.Range(func(id, _ any) bool {
		t.Errorf("%s is remembered", id)
		return true
	})
}

func TestCutLayerIsNotMounted(t *testing.T) {
	r := newRig(t, ModeFile)
	top := r.pull(t, unpacks[0], "x", "", image(t)[0])
	id := r.id(t, top)
	r.restart(t, func() {
		r.unmountLayers(t)
		if err := os.Truncate(r.layer(id), 4096); err != nil {
			t.Fatal(err)
		}
	})
	_, err := r.View(t.Context(), "view", top)
	if !errdefs.IsDataLoss(err) {
		t.Errorf("got %v, want ErrDataLoss", err)
	}
	// The failed View is gone, so the name can be used again.
	if _, err := r.Stat(t.Context(), "view"); !errdefs.IsNotFound(err) {
		t.Errorf("Stat: got %v, want ErrNotFound", err)
	}
}

func TestLostFolders(t *testing.T) {
	r := newRig(t, ModeFile)
	for _, key := range []string{"active", "a"} {
		if _, err := r.Prepare(t.Context(), key, ""); err != nil {
			t.Fatal(err)
		}
	}
	r.commit(t, "committed", "a", "")
	active, committed := r.id(t, "active"), r.id(t, "committed")
	r.restart(t, func() {
		for _, id := range []string{active, committed} {
			if err := os.RemoveAll(r.dir(id)); err != nil {
				t.Fatal(err)
			}
		}
	})
	mounts, err := r.Mounts(t.Context(), "active")
	if err != nil {
		t.Fatal(err)
	}
	look(t, mounts)
	if _, err := r.Prepare(t.Context(), "child", "committed"); err == nil {
		t.Error("a lost directory layer was used as a parent")
	}
}

// TestKilled kills a process that pulls, over and over, and looks at what the
// next one makes of it.
func TestKilled(t *testing.T) {
	for name, o := range map[string]Options{
		"file": {Mount: ModeFile}, "loop": {Mount: ModeLoop}, "directory": {Mount: ModeDirectory},
		"upper files": {Mount: ModeFile, Upper: UpperFile, UpperSize: MinUpperSize},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			t.Cleanup(func() { mountsUnder(dir) })
			for round := range 6 {
				cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestKilledChild$")
				cmd.Env = append(os.Environ(), "GANTRY_KILLED="+dir, "GANTRY_MODE="+string(o.Mount), "GANTRY_UPPER="+string(o.Upper))
				out, err := cmd.StdoutPipe()
				if err != nil {
					t.Fatal(err)
				}
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				// The first byte says that it works; then it gets a little time.
				if _, err := io.ReadFull(out, make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
				select {
				case <-time.After(time.Duration(3+round*17) * time.Millisecond):
				case <-t.Context().Done():
				}
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
				_ = cmd.Wait()
				afterKill(t, dir, o)
			}
		})
	}
}

func afterKill(t *testing.T, dir string, o Options) {
	t.Helper()
	cache, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{root: filepath.Join(dir, "root"), cache: cache, opts: o}
	r.open(t)
	defer func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}()
	keys, err := r.loadKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	layers := image(t)
	wants := map[string]map[string]string{}
	for n := range layers {
		wants[fmt.Sprint(n)] = reference(t, nil, layers[:n+1]...)
	}
	for _, key := range keys {
		if strings.HasPrefix(key, "extract-container-") {
			mounts, err := r.Mounts(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			look(t, mounts)
		}
		if strings.HasPrefix(key, "extract-") {
			continue
		}
		sameTree(t, r.show(t, key), wants[key[strings.LastIndex(key, "-")+1:]])
	}
	for _, dir := range append(entries(t, r.snapshotsDir()), entries(t, r.mountsDir())...) {
		if _, ok := keys[strings.TrimSuffix(filepath.Base(dir), upperMountSuffix)]; !ok {
			t.Errorf("%s is left", dir)
		}
	}
	for _, loop := range loopsUnder(dir) {
		if o.Upper == UpperFile && strings.Contains(loop, "(deleted)") {
			t.Errorf("%s is left", loop)
		}
	}
}

// TestKilledChild is the process that TestKilled kills.
func TestKilledChild(t *testing.T) {
	dir := os.Getenv("GANTRY_KILLED")
	if dir == "" {
		return
	}
	cache, err := layer.Open(filepath.Join(dir, "layers"), layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{root: filepath.Join(dir, "root"), cache: cache, opts: Options{
		Mount: Mode(os.Getenv("GANTRY_MODE")), Upper: Upper(os.Getenv("GANTRY_UPPER")), UpperSize: MinUpperSize,
	}}
	r.open(t)
	layers := image(t)
	if _, err := os.Stdout.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		top := r.pull(t, unpacks[i%2], fmt.Sprintf("p%d-%d", os.Getpid(), i), "", layers...)
		key := fmt.Sprintf("extract-container-%d-%d", os.Getpid(), i)
		if _, err := r.Prepare(t.Context(), key, top); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 {
			continue
		}
		if err := errors.Join(r.Remove(t.Context(), key), r.Cleanup(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
}

func eachIndex(t *testing.T, r *rig, change func(string) error) {
	t.Helper()
	changed := 0
	for _, dir := range entries(t, r.snapshotsDir()) {
		index := filepath.Join(dir, "index")
		if !exists(index) {
			continue // of the container
		}
		if err := change(index); err != nil {
			t.Fatal(err)
		}
		changed++
	}
	if changed == 0 {
		t.Fatal("there are no indexes")
	}
}

func flipByte(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, 1500); err != nil {
		return err
	}
	b[0] ^= 4
	_, err = f.WriteAt(b, 1500)
	return err
}

func entries(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, e := range list {
		paths = append(paths, filepath.Join(dir, e.Name()))
	}
	return paths
}

func writeTestFile(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// The worker's job found the layer mounted; somebody unmounts it before the job
// ends. Who waits for that job must not see an empty layer.
func TestReadyLooksAgain(t *testing.T) {
	r := newRig(t, ModeFile)
	blob := makeTar(t, reg("a", "a"))
	top := r.pull(t, unpacks[0], "x", "", blob)
	id := r.id(t, top)
	r.show(t, top)
	release := make(chan struct{})
	r.work.once(id, func(context.Context) error { <-release; return nil })
	r.unmountLayers(t)
	time.AfterFunc(20*time.Millisecond, func() { close(release) })
	sameTree(t, r.show(t, top), reference(t, nil, blob))
}

// A crash in Prepare, after the database has the snapshot, leaves its folders half made: nothing that check reports.
func TestPrepareWasInterrupted(t *testing.T) {
	for name, undo := range map[string]func(r *rig, id string) error{
		"before its folder": func(r *rig, id string) error { return os.RemoveAll(r.dir(id)) },
		"before work":       func(r *rig, id string) error { return errors.Join(os.Remove(r.upper(id)), os.RemoveAll(r.workdir(id))) },
		"before upper":      func(r *rig, id string) error { return os.Remove(r.upper(id)) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, ModeDirectory)
			if _, err := r.Prepare(t.Context(), "container", ""); err != nil {
				t.Fatal(err)
			}
			if _, err := r.View(t.Context(), "view", ""); err != nil {
				t.Fatal(err)
			}
			ids := []string{r.id(t, "container"), r.id(t, "view")}
			r.restart(t, func() {
				for _, id := range ids {
					if err := undo(r, id); err != nil {
						t.Fatal(err)
					}
				}
			})
			flaws, err := r.Check(t.Context(), time.Millisecond)
			if err != nil || len(flaws) > 0 {
				t.Errorf("check found %v, %v", flaws, err)
			}
			for _, key := range []string{"container", "view"} {
				mounts, err := r.Mounts(t.Context(), key)
				if err != nil {
					t.Fatal(err)
				}
				if tree := look(t, mounts); len(tree) > 1 {
					t.Errorf("%s: got %v, want nothing in it", key, tree)
				}
			}
		})
	}
}
