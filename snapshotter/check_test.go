package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

func (r *rig) mustCheck(t *testing.T) []Flaw {
	t.Helper()
	found, err := r.Check(t.Context(), time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// chained names two layers as containerd does.
func chained(t *testing.T, r *rig) (names []string, diffIDs []digest.Digest) {
	t.Helper()
	layers := image(t)[:2]
	for _, l := range layers {
		diffIDs = append(diffIDs, r.store(t, l))
	}
	names = []string{"1/default/" + diffIDs[0].String(), "2/default/" + digest.FromString(diffIDs[0].String()+" "+diffIDs[1].String()).String()}
	parent := ""
	for i, name := range names {
		mounts, err := r.Prepare(t.Context(), "extract-"+name, parent)
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Adopt(t.Context(), mounts, diffIDs[i]); err != nil {
			t.Fatal(err)
		}
		r.commit(t, name, "extract-"+name, "")
		parent = name
	}
	return names, diffIDs
}

// Each flaw is found by itself, is cured, and then the snapshot shows what it showed.
func TestCheckFindsAndMends(t *testing.T) {
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			names, diffIDs := chained(t, r)
			top, below := r.id(t, names[1]), r.id(t, names[0])
			want := r.show(t, names[1])
			if _, err := r.Prepare(t.Context(), "container", names[1]); err != nil {
				t.Fatal(err)
			}
			active := r.id(t, "container")
			if found := r.mustCheck(t); len(found) > 0 {
				t.Fatalf("sound: %+v", found)
			}
			cases := map[string]struct {
				path string
				part Part
			}{
				"folder of the top":     {r.dir(top), PartFolder},
				"folder of the lowest":  {r.dir(below), PartFolder},
				"upper of a container":  {r.upper(active), PartFolder},
				"folder of a container": {r.dir(active), PartFolder},
			}
			if mode != ModeDirectory {
				cases["link"] = struct {
					path string
					part Part
				}{r.layer(top), PartLayer}
			}
			for name, tc := range cases {
				t.Run(name, func(t *testing.T) {
					if err := os.RemoveAll(tc.path); err != nil {
						t.Fatal(err)
					}
					found := r.mustCheck(t)
					if len(found) != 1 || found[0].Part != tc.part || found[0].Path != tc.path {
						t.Fatalf("found %+v, want %s at %s", found, tc.part, tc.path)
					}
					if found[0].Kind == snapshots.KindActive {
						if _, err := r.Mend(t.Context(), found[0]); err != nil {
							t.Fatal(err)
						}
					} else {
						d, err := r.Identify(t.Context(), found[0].ID, diffIDs)
						if err != nil || d == "" {
							t.Fatalf("it is %q, %v", d, err)
						}
						if err := r.Renew(t.Context(), found[0].ID, d); err != nil {
							t.Fatal(err)
						}
					}
					if found := r.mustCheck(t); len(found) > 0 {
						t.Errorf("mended: %+v", found)
					}
					sameTree(t, r.show(t, names[1]), want)
				})
			}
		})
	}
}

func TestCheckFiles(t *testing.T) {
	r := newRig(t, ModeAuto)
	names, diffIDs := chained(t, r)
	id := r.id(t, names[1])
	want := r.show(t, names[1])
	other := r.store(t, image(t)[2])
	old := time.Now().Add(-time.Hour)
	write := func(path string) {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		damage func() error
		part   Part
		mend   bool // else Renew
	}{
		"index":      {func() error { return flipByte(r.index(id)) }, PartIndex, true},
		"usage":      {func() error { write(r.usage(id)); return nil }, PartUsage, true},
		"temporary":  {func() error { write(r.index(id) + ".tmp"); return nil }, PartLeftover, true},
		"extracting": {func() error { write(r.extracting(id)); return nil }, PartLeftover, true},
		"record":     {func() error { return os.WriteFile(r.record(id), []byte("junk"), 0o600) }, PartRecord, false},
		"other file": {func() error {
			if err := os.Remove(r.layer(id)); err != nil {
				return err
			}
			if err := r.cache.Link(other, r.layer(id)); err != nil {
				return err
			}
			fi, err := os.Stat(r.layer(id))
			if err != nil {
				return err
			}
			return r.writeRecord(id, adopted{diffIDs[1], fi.Size()})
		}, PartLayer, false},
		"mount point of nobody": {func() error { return os.Mkdir(r.mountpoint("999"), 0o700) }, PartMount, true},
		"folder of nobody": {func() error {
			if err := os.Mkdir(r.dir("998"), 0o700); err != nil {
				return err
			}
			return os.Chtimes(r.dir("998"), old, old)
		}, PartLeftover, true},
		"wrong mount": {func() error {
			return mountTar(t.Context(), r.mode, r.index(r.id(t, names[0])), r.layer(r.id(t, names[0])), r.mountpoint(id))
		}, PartMount, true},
	} {
		t.Run(name, func(t *testing.T) {
			if err := tc.damage(); err != nil {
				t.Fatal(err)
			}
			found := r.mustCheck(t)
			if len(found) != 1 || found[0].Part != tc.part {
				t.Fatalf("found %+v, want %s", found, tc.part)
			}
			// What somebody is about to change is not judged.
			if found[0].ID != "" {
				unlock, err := r.locks.lock(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				if found := r.mustCheck(t); len(found) > 0 {
					t.Errorf("while it is being changed: %+v", found)
				}
				unlock()
			}
			var err error
			if tc.mend {
				_, err = r.Mend(t.Context(), found[0])
			} else {
				err = r.Renew(t.Context(), id, diffIDs[1])
			}
			if err != nil {
				t.Fatal(err)
			}
			if found := r.mustCheck(t); len(found) > 0 {
				t.Errorf("mended: %+v", found)
			}
			sameTree(t, r.show(t, names[1]), want)
		})
	}
}

// What a container shows while its layer is renewed below it does not change.
func TestRenewUnderAContainer(t *testing.T) {
	r := newRig(t, ModeAuto)
	names, diffIDs := chained(t, r)
	mounts, err := r.View(t.Context(), "view", names[1])
	if err != nil {
		t.Fatal(err)
	}
	want := look(t, mounts)
	device := func() uint64 {
		var st unix.Stat_t
		if err := unix.Stat(r.mountpoint(r.id(t, names[1])), &st); err != nil {
			t.Fatal(err)
		}
		return st.Dev
	}
	before := device()
	if err := r.cache.Drop(diffIDs[1]); err != nil {
		t.Fatal(err)
	}
	if d := r.store(t, image(t)[1]); d != diffIDs[1] {
		t.Fatal("another layer")
	}
	if err := r.Renew(t.Context(), r.id(t, names[1]), diffIDs[1]); err != nil {
		t.Fatal(err)
	}
	if device() == before {
		t.Error("the old file is still shown")
	}
	sameTree(t, look(t, mounts), want)
	sameTree(t, r.show(t, names[1]), want)
	if found := r.mustCheck(t); len(found) > 0 {
		t.Errorf("found %+v", found)
	}
}

// The copy brings back all that was there when it was saved; what came later is set aside, whole.
func TestRestoreDatabase(t *testing.T) {
	r := newRig(t, ModeAuto)
	names, _ := chained(t, r)
	want := r.show(t, names[1])
	var lost string
	for name, damage := range map[string]func() error{
		"garbage":   func() error { return os.WriteFile(r.database(), make([]byte, 100_000), 0o600) },
		"cut short": func() error { return os.Truncate(r.database(), 3*4096) },
		"gone":      func() error { return os.Remove(r.database()) },
		"empty":     func() error { return os.Truncate(r.database(), 0) },
	} {
		t.Run(name, func(t *testing.T) {
			if err := r.Close(); err != nil { // saves
				t.Fatal(err)
			}
			if err := VerifyDatabase(r.Snapshotter.root); err != nil {
				t.Fatalf("sound: %v", err)
			}
			saved, err := os.ReadFile(r.saved())
			if err != nil {
				t.Fatal(err)
			}
			r.open(t)
			if _, err := r.Prepare(t.Context(), "late-"+name, names[1]); err != nil {
				t.Fatal(err)
			}
			id := r.id(t, "late-"+name)
			if err := os.WriteFile(filepath.Join(r.upper(id), "precious"), []byte("data"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(r.saved(), saved, 0o600); err != nil { // as if it had been killed
				t.Fatal(err)
			}
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			if err := VerifyDatabase(r.Snapshotter.root); !errdefs.IsDataLoss(err) {
				t.Errorf("broken: %v", err)
			}
			if s, err := New(t.Context(), r.root, r.cache, r.opts); !errdefs.IsDataLoss(err) {
				t.Fatalf("it opens: %v, %v", s, err)
			}
			when, n, err := RestoreDatabase(t.Context(), r.Snapshotter.root)
			if err != nil || when.IsZero() || n != 1 {
				t.Fatalf("restored from %v, %d lost, %v", when, n, err)
			}
			r.open(t)
			sameTree(t, r.show(t, names[1]), want)
			if found := r.mustCheck(t); len(found) > 0 {
				t.Errorf("found %+v", found)
			}
			found, err := filepath.Glob(filepath.Join(r.Snapshotter.root, lostFolder, "*", "*", "upper", "precious"))
			if err != nil || len(found) == 0 || slices.Contains(found, lost) && len(found) == 1 {
				t.Errorf("what was written is gone: %v, %v", found, err)
			}
			lost = found[0]
			if err := r.CheckDatabase(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

// Without a good copy everything is set aside.
func TestRestoreWithoutCopy(t *testing.T) {
	r := newRig(t, ModeAuto)
	names, _ := chained(t, r)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{r.database(), r.saved()} {
		if err := os.WriteFile(path, []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	when, n, err := RestoreDatabase(t.Context(), r.Snapshotter.root)
	if err != nil || !when.IsZero() || n != len(names) {
		t.Fatalf("restored from %v, %d lost, %v", when, n, err)
	}
	r.open(t)
	if left := entries(t, r.mountsDir()); len(left) > 0 {
		t.Errorf("mounts are left: %v", left)
	}
}

// A restoration that is cut short leaves a root on which gantryd does not start: it would take what the copy does not know
// for leftovers.
func TestRestoreCutShort(t *testing.T) {
	r := newRig(t, ModeAuto)
	names, _ := chained(t, r)
	if err := r.Close(); err != nil { // saves
		t.Fatal(err)
	}
	saved, err := os.ReadFile(r.saved())
	if err != nil {
		t.Fatal(err)
	}
	r.open(t)
	if _, err := r.Prepare(t.Context(), "late", names[1]); err != nil {
		t.Fatal(err)
	}
	late := r.id(t, "late")
	if err := os.WriteFile(filepath.Join(r.upper(late), "precious"), []byte("data"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(r.saved(), saved, 0o600), os.Truncate(r.database(), 4096)); err != nil {
		t.Fatal(err)
	}
	// A mount point cannot be moved.
	if err := unix.Mount(r.dir(late), r.dir(late), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted && unix.Unmount(r.dir(late), 0) == nil {
			mounted = false
		}
	}
	t.Cleanup(unmount)
	if _, _, err := RestoreDatabase(t.Context(), r.Snapshotter.root); !errors.Is(err, unix.EBUSY) {
		t.Fatalf("restored: %v", err)
	}
	unmount()
	if err := VerifyDatabase(r.Snapshotter.root); !errdefs.IsDataLoss(err) {
		t.Errorf("gantryd starts on half a restoration: %v", err)
	}
	if _, n, err := RestoreDatabase(t.Context(), r.Snapshotter.root); err != nil || n != 1 {
		t.Fatalf("%d lost, %v", n, err)
	}
	r.open(t)
	if found, err := filepath.Glob(filepath.Join(r.Snapshotter.root, lostFolder, "*", late, "upper", "precious")); err != nil || len(found) != 1 {
		t.Errorf("what was written is gone: %v, %v", found, err)
	}
}

// A process that is killed before it has written the copy leaves that to the next one.
func TestCopyAfterKill(t *testing.T) {
	r := newRig(t, ModeAuto)
	names, _ := chained(t, r)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	saved, err := os.ReadFile(r.saved())
	if err != nil {
		t.Fatal(err)
	}
	r.open(t)
	if _, err := r.Prepare(t.Context(), "late", names[1]); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(r.saved(), saved, 0o600); err != nil { // as if it had been killed
		t.Fatal(err)
	}
	r.open(t) // in which nothing changes
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(r.database()); err != nil {
		t.Fatal(err)
	}
	if _, n, err := RestoreDatabase(t.Context(), r.Snapshotter.root); err != nil || n != 0 {
		t.Errorf("%d snapshots are lost, %v", n, err)
	}
	r.open(t)
}
