package snapshotter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// configure restarts the snapshotter with other keys, as an administrator may at any time.
func (r *rig) configure(t *testing.T, mode Mode, upper Upper, between func()) {
	t.Helper()
	r.opts.Mount, r.opts.Upper, r.opts.UpperSize = mode, upper, testUpperSize
	r.restart(t, between)
}

// TestMixedChain has layers of every kind in one chain: pulled, committed in a directory, committed in a file, and pulled
// over these; in every mode, over a reboot, and with each other mode after that.
func TestMixedChain(t *testing.T) {
	layers := image(t)
	build := func(t *testing.T, mode Mode, uppers []Upper) (*rig, map[string]string) {
		r := newRigIn(t, t.TempDir(), Options{Mount: mode, Upper: uppers[0], UpperSize: testUpperSize})
		top := r.pull(t, unpacks[0], "x", "", layers[:2]...)
		for i, upper := range uppers {
			r.configure(t, mode, upper, nil)
			key := fmt.Sprint("c", i)
			r.container(t, key, top)
			r.inside(t, key, func(root string) error {
				return errors.Join(write(key, []byte(key))(root), untimed(filepath.Join(root, key)), os.RemoveAll(filepath.Join(root, "m", "new")))
			})
			r.commit(t, "committed-"+key, key, "")
			top = r.pull(t, unpacks[i%2], key+"-above", "committed-"+key, layers[2+i])
		}
		r.container(t, "last", top)
		r.inside(t, "last", func(root string) error { return os.Remove(filepath.Join(root, "c0")) })
		return r, look(t, mountsOf(t, r, "last"))
	}
	_, want := build(t, ModeDirectory, []Upper{UpperDirectory, UpperDirectory})
	if want["c0"] != "" || want["c1"] == "" || want["m/new"] != "" {
		t.Fatalf("%v", want)
	}
	for mode, uppers := range map[Mode][]Upper{
		ModeFile: {UpperDirectory, UpperFile}, ModeLoop: {UpperFile, UpperDirectory}, ModeDirectory: {UpperFile, UpperFile},
	} {
		t.Run(fmt.Sprint(mode, " ", uppers), func(t *testing.T) {
			r, got := build(t, mode, uppers)
			sameTree(t, got, want)
			if found := r.mustCheck(t); len(found) > 0 {
				t.Errorf("check: %+v", found)
			}
			for _, next := range mountModes { // the last one for good
				r.configure(t, next, UpperDirectory, func() { r.unmountLayers(t) })
				sameTree(t, look(t, mountsOf(t, r, "last")), want)
			}
		})
	}
}

// TestIDMappedUpperFiles: a container in a user namespace that writes to a file sees, writes and commits what one that
// writes to a directory does, also where files of other containers are mounted beside its layers.
func TestIDMappedUpperFiles(t *testing.T) {
	layers := image(t)
	reference, top := overlaySnapshotter(t, "x", layers...)
	want := useIDMapped(t, reference, top)
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRigIn(t, t.TempDir(), Options{Mount: mode, Upper: UpperFile, UpperSize: testUpperSize})
			// A commit in a file below, which holds nothing.
			base := r.pull(t, unpacks[0], "x", "", layers...)
			r.container(t, "neighbour", base)
			r.container(t, "below", base)
			r.commit(t, "empty", "below", "")
			got := useIDMapped(t, r, "empty")
			for what, tree := range want.trees {
				t.Run(what, func(t *testing.T) { sameTree(t, got.trees[what], tree) })
			}
			id := r.id(t, "committed")
			if !r.hasUpperFile(id) || !exists(r.shifted(id)) {
				t.Errorf("in a file: %v, marked: %v", r.hasUpperFile(id), exists(r.shifted(id)))
			}
			r.restart(t, func() { r.unmountLayers(t) })
			sameTree(t, r.show(t, "committed"), want.trees["view of the commit"])
			r.inside(t, "neighbour", write("f", nil))
		})
	}
}

// onOverlay mounts an overlay for a root.
func onOverlay(t *testing.T) string {
	t.Helper()
	parts, dir := t.TempDir(), t.TempDir()
	for _, p := range []string{"l", "u", "w"} {
		if err := os.Mkdir(filepath.Join(parts, p), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+parts+"/l,upperdir="+parts+"/u,workdir="+parts+"/w"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmountAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// TestRootOnOverlay: what auto takes there and why, each mode that works, and what containers need.
func TestRootOnOverlay(t *testing.T) {
	layers := image(t)
	want := reference(t, nil, layers...)
	noLoops := func(t *testing.T) {
		old := loopControl
		loopControl = "/nowhere/loop-control"
		t.Cleanup(func() { loopControl = old })
	}
	for name, tt := range map[string]struct {
		mount   Mode
		mode    Mode
		prepare func(*testing.T)
		reasons []string
	}{
		"auto":               {ModeAuto, ModeLoop, func(*testing.T) {}, []string{"not from files"}},
		"auto without loops": {ModeAuto, ModeDirectory, noLoops, []string{"neither from files", "nor from loop devices", "/nowhere/loop-control"}},
		"loop":               {ModeLoop, ModeLoop, func(*testing.T) {}, []string{"configured"}},
		"directory":          {ModeDirectory, ModeDirectory, func(*testing.T) {}, []string{"configured"}},
	} {
		t.Run(name, func(t *testing.T) {
			tt.prepare(t)
			r := newRigIn(t, onOverlay(t), Options{Mount: tt.mount})
			st := r.Status()
			if st.Mode != tt.mode {
				t.Errorf("mode %s, want %s", st.Mode, tt.mode)
			}
			for _, reason := range append(tt.reasons, `snapshotter.upper = "file"`) {
				if !strings.Contains(st.Reason, reason) {
					t.Errorf("reason %q, want %q in it", st.Reason, reason)
				}
			}
			some, wantSome := layers, want
			if tt.mode == ModeDirectory {
				some, wantSome = layers[2:4], reference(t, nil, layers[2:4]...)
				mounts, err := r.Prepare(t.Context(), "whiteouts", "")
				if err != nil {
					t.Fatal(err)
				}
				if err := r.Adopt(t.Context(), mounts, r.store(t, layers[4])); err == nil || !strings.Contains(err.Error(), `snapshotter.mount = "loop"`) {
					t.Errorf("a layer with whiteouts: %v", err)
				}
			}
			for _, how := range unpacks {
				sameTree(t, r.show(t, r.pull(t, how, how.name, "", some...)), wantSome)
			}
			// The kernel takes no upper directory there. If this works some day the reason has to change.
			mounts, err := r.Prepare(t.Context(), "c", "rebase-0")
			if err != nil {
				t.Fatal(err)
			}
			if err := mount.WithTempMount(t.Context(), mounts, func(string) error { return nil }); err == nil {
				t.Error("an upper directory on overlayfs works")
			}
		})
	}
	t.Run("forced file", func(t *testing.T) {
		if _, err := New(t.Context(), filepath.Join(onOverlay(t), "root"), nil, Options{Mount: ModeFile}); !errors.Is(err, unix.ENOTBLK) {
			t.Errorf("got %v, want ENOTBLK", err)
		}
	})
	t.Run("upper files", func(t *testing.T) {
		r := newRigIn(t, onOverlay(t), Options{Mount: ModeDirectory, Upper: UpperFile, UpperSize: testUpperSize})
		if reason := r.Status().Reason; reason != "configured" {
			t.Errorf("reason %q", reason)
		}
		// With the keys of an unpack, which elsewhere gets no upper file: these layers delete.
		var top string
		for i, blob := range layers {
			key := fmt.Sprintf("default/%d/"+snapshots.UnpackKeyFormat, i, "1234-", digest.FromBytes(blob))
			mounts, err := r.Prepare(t.Context(), key, top)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Adopt(t.Context(), mounts, r.store(t, blob)); err != nil {
				t.Fatalf("layer %d: %v", i, err)
			}
			top = fmt.Sprint("x-", i)
			r.commit(t, top, key, "")
		}
		sameTree(t, r.show(t, top), want)
		r.container(t, "c", top)
		r.inside(t, "c", write("f", bytes.Repeat([]byte("x"), 1<<20)))
		r.remove(t, "c")
	})
}
