package snapshotter

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

func (s *Snapshotter) loadKeys(ctx context.Context) (ids map[string]string, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err = storage.IDMap(ctx)
		return ignoreNotFound(err)
	})
	return ids, err
}

func TestAdoptShowsWhatContainerdUnpacks(t *testing.T) {
	layers := image(t)
	for _, mode := range mountModes {
		for _, how := range unpacks {
			t.Run(string(mode)+"/"+how.name, func(t *testing.T) {
				r := newRig(t, mode)
				for n := 1; n <= len(layers); n++ {
					top := r.pull(t, how, strings.Repeat("x", n), "", layers[:n]...)
					sameTree(t, r.show(t, top), reference(t, nil, layers[:n]...))
				}
				st := r.Status()
				if mode == ModeDirectory && st.TarLayers != 0 {
					t.Errorf("directory mode left tar layers: %+v", st)
				}
				if mode != ModeDirectory && (st.TarLayers != 15 || st.Mounted != 15) {
					t.Errorf("got %+v, want 15 mounted tar layers", st)
				}
			})
		}
	}
}

func TestAdoptOntoContainersChanges(t *testing.T) {
	base := makeTar(t, dir("m", 0o700, 5), reg("m/a", "a"), dir("n", 0o755, 0), reg("f", "f"))
	top := makeTar(t, reg("m/new", "new"), reg("n/new", "new"), reg("k/l/m", "implied by nobody"))
	for _, mode := range mountModes {
		for _, how := range unpacks {
			t.Run(string(mode)+"/"+how.name, func(t *testing.T) {
				r := newRig(t, mode)
				parent := r.pull(t, how, "base", "", base)
				mounts, err := r.Prepare(t.Context(), "container", parent)
				if err != nil {
					t.Fatal(err)
				}
				change := func(root string) error {
					m := filepath.Join(root, "m")
					if err := os.Chmod(m, 0o1755); err != nil {
						return err
					}
					if err := os.Remove(filepath.Join(root, "f")); err != nil {
						return err
					}
					return os.Chown(m, 11, 12)
				}
				if err := mount.WithTempMount(t.Context(), mounts, change); err != nil {
					t.Fatal(err)
				}
				r.commit(t, "changed", "container", "")
				upper := r.upper(r.id(t, "changed"))
				name := r.pull(t, how, "top", "changed", top)

				below := t.TempDir()
				if _, err := archive.Apply(t.Context(), below, bytes.NewReader(base)); err != nil {
					t.Fatal(err)
				}
				sameTree(t, r.show(t, name), reference(t, []string{upper, below}, top))
			})
		}
	}
}

// A label may name any parent; only Commit's counts.
func TestAdoptTakesParentFromCommit(t *testing.T) {
	r := newRig(t, ModeFile)
	seq := unpacks[0]
	good := makeTar(t, dir("m", 0o700, 5))
	bad := makeTar(t, dir("m", 0o777, 6))
	top := makeTar(t, reg("m/new", "new"))
	r.pull(t, seq, "good", "", good)
	r.pull(t, seq, "bad", "", bad)
	mounts, err := r.Prepare(t.Context(), "extract", "", snapshots.WithLabels(map[string]string{"containerd.io/snapshot/parent": "bad-0"}))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Adopt(t.Context(), mounts, r.store(t, top)); err != nil {
		t.Fatal(err)
	}
	r.commit(t, "top", "extract", "good-0")
	sameTree(t, r.show(t, "top"), reference(t, nil, good, top))
}

// Commit comes while Apply waits for the snapshot: what is committed is final, and
// the answer is none after which the differ writes to the mounts by itself.
func TestAdoptComesAfterCommit(t *testing.T) {
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			d := r.store(t, makeTar(t, reg("f", "f")))
			mounts, err := r.Prepare(t.Context(), "k", "")
			if err != nil {
				t.Fatal(err)
			}
			id := r.id(t, "k")
			unlock, err := r.locks.lock(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			adopted := make(chan error, 1)
			go func() { adopted <- r.Adopt(t.Context(), mounts, d) }()
			for waiting := false; !waiting; time.Sleep(time.Millisecond) {
				r.locks.mu.Lock()
				waiting = r.locks.held[id].users == 2
				r.locks.mu.Unlock()
			}
			// What Commit does under the lock.
			err = r.ms.WithTransaction(t.Context(), true, func(ctx context.Context) error {
				_, err := storage.CommitActive(ctx, "k", "name", snapshots.Usage{})
				return err
			})
			unlock()
			if err != nil {
				t.Fatal(err)
			}
			for try, err := range []error{<-adopted, r.Adopt(t.Context(), mounts, d)} {
				if !errdefs.IsInvalidArgument(err) {
					t.Errorf("try %d: got %v, want an invalid argument", try, err)
				}
			}
			if r.isTar(id) || exists(r.pending(id)) || exists(filepath.Join(r.upper(id), "f")) {
				t.Error("a committed snapshot took a layer")
			}
		})
	}
}

func TestAdoptRefusesForeignMounts(t *testing.T) {
	r := newRig(t, ModeFile)
	d := r.store(t, makeTar(t, reg("f", "f")))
	if _, err := r.Prepare(t.Context(), "k", ""); err != nil {
		t.Fatal(err)
	}
	id := r.id(t, "k")
	upper := r.upper(id)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(upper, link); err != nil {
		t.Fatal(err)
	}
	rw := []string{"rw", "rbind"}
	tests := map[string][]mount.Mount{
		"none":             nil,
		"two":              {{Type: "bind", Source: upper, Options: rw}, {Type: "bind", Source: upper, Options: rw}},
		"another folder":   {{Type: "bind", Source: t.TempDir(), Options: rw}},
		"symlink":          {{Type: "bind", Source: link, Options: rw}},
		"dots":             {{Type: "bind", Source: filepath.Dir(upper) + "/../" + id + "/upper", Options: rw}},
		"slash":            {{Type: "bind", Source: upper + "/", Options: rw}},
		"work":             {{Type: "bind", Source: r.workdir(id), Options: rw}},
		"below":            {{Type: "bind", Source: upper + "/upper", Options: rw}},
		"no number":        {{Type: "bind", Source: r.upper("x"), Options: rw}},
		"leading zero":     {{Type: "bind", Source: r.upper("0" + id), Options: rw}},
		"unknown snapshot": {{Type: "bind", Source: r.upper("999"), Options: rw}},
		"read-only":        {{Type: "bind", Source: upper, Options: []string{"ro"}}},
		"target":           {{Type: "bind", Source: upper, Target: "sub", Options: rw}},
		"type":             {{Type: "ext4", Source: upper, Options: rw}},
		"two uppers":       {{Type: "overlay", Options: []string{"upperdir=" + upper, "upperdir=/x"}}},
		"joined":           {{Type: "overlay", Options: []string{"upperdir=" + upper + ",workdir=/x"}}},
		"relative":         {{Type: "bind", Source: "snapshots/" + id + "/upper", Options: rw}},
		"empty":            {{}},
	}
	for name, mounts := range tests {
		t.Run(name, func(t *testing.T) {
			if err := r.Adopt(t.Context(), mounts, d); !errdefs.IsNotFound(err) {
				t.Errorf("got %v, want ErrNotFound", err)
			}
		})
	}
	if empty, err := isEmpty(upper); !empty || err != nil || r.isTar(id) {
		t.Errorf("the snapshot was touched (%v)", err)
	}
	// What containerd 2.4 makes of a bind mount.
	if err := r.Adopt(t.Context(), []mount.Mount{{Type: "overlay", Options: []string{"rw", "upperdir=" + upper}}}, d); err != nil {
		t.Error(err)
	}
}

func TestAdoptNeedsTheLayerFile(t *testing.T) {
	r := newRig(t, ModeFile)
	mounts, err := r.Prepare(t.Context(), "k", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Adopt(t.Context(), mounts, digest.FromString("nothing")); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v, want ErrUnavailable", err)
	}
}

func TestAdoptOverContent(t *testing.T) {
	first := makeTar(t, dir("m", 0o700, 5), reg("m/a", "a"))
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			mounts, err := r.Prepare(t.Context(), "k", "")
			if err != nil {
				t.Fatal(err)
			}
			d := r.store(t, first)
			if err := r.Adopt(t.Context(), mounts, d); err != nil {
				t.Fatal(err)
			}
			if err := r.Adopt(t.Context(), mounts, d); !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("second layer: got %v, want ErrFailedPrecondition", err)
			}
			// The first layer lies in the folder now, for the next to be unpacked over it.
			sameTree(t, look(t, mounts), reference(t, nil, first))
			r.commit(t, "both", "k", "")
			sameTree(t, r.show(t, "both"), reference(t, nil, first))
		})
	}
}

func TestMountsOfAdoptedSnapshot(t *testing.T) {
	layers := image(t)
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			parent := r.pull(t, unpacks[0], "base", "", layers[0])
			mounts, err := r.Prepare(t.Context(), "k", parent)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Adopt(t.Context(), mounts, r.store(t, layers[1])); err != nil {
				t.Fatal(err)
			}
			if mounts, err = r.Mounts(t.Context(), "k"); err != nil {
				t.Fatal(err)
			}
			want := reference(t, nil, layers[:2]...)
			sameTree(t, look(t, mounts), want)
			err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
				return os.WriteFile(filepath.Join(root, "written"), nil, 0o600)
			})
			if err != nil {
				t.Fatal(err)
			}
			r.commit(t, "top", "k", "")
			got := r.show(t, "top")
			if got["written"] == "" {
				t.Error("what was written is lost")
			}
			delete(got, "written")
			sameTree(t, got, want)
		})
	}
}

func TestCommitRefusesToLoseWrites(t *testing.T) {
	r := newRig(t, ModeFile)
	mounts, err := r.Prepare(t.Context(), "k", "")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Adopt(t.Context(), mounts, r.store(t, makeTar(t, reg("f", "f")))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(mounts[0].Source, "late"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(t.Context(), "c", "k"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want ErrFailedPrecondition", err)
	}
}

func TestAdoptOddTars(t *testing.T) {
	unpadded := makeTar(t, reg("a", "a"), reg("b", strings.Repeat("b", 700)))
	tars := map[string][]byte{
		"nothing at all":          {},
		"end marker only":         make([]byte, 1024),
		"neither padding nor end": unpadded[:512+512+512+700],
		"directories only":        makeTar(t, dir("a", 0o700, 1)),
		"trailing zeros":          append(makeTar(t, reg("a", "a")), make([]byte, 1<<16)...),
	}
	for _, mode := range mountModes {
		for name, blob := range tars {
			t.Run(string(mode)+"/"+name, func(t *testing.T) {
				r := newRig(t, mode)
				top := r.pull(t, unpacks[0], "x", "", blob)
				sameTree(t, r.show(t, top), reference(t, nil, blob))
				r.unmountLayers(t)
				sameTree(t, r.show(t, top), reference(t, nil, blob))
			})
		}
	}
}

// Only Commit says whether a layer is the lowest. Both of its indexes are right,
// and the one that was made ahead is used where it fits.
func TestIndexMadeAhead(t *testing.T) {
	below := makeTar(t, dir("m", 0o2750, 7), reg("m/old", "old"))
	blob := makeTar(t, reg("m/new", "new"), reg(".wh.gone", ""))
	for name, lower := range map[string][][]byte{"lowest": nil, "rebased": {below}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, ModeFile)
			parent := ""
			if lower != nil {
				parent = r.pull(t, unpacks[0], "below", "", below)
			}
			mounts, err := r.Prepare(t.Context(), "k", "")
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Adopt(t.Context(), mounts, r.store(t, blob)); err != nil {
				t.Fatal(err)
			}
			ahead, err := os.Stat(r.lowestIndex(r.id(t, "k")))
			if err != nil {
				t.Fatal(err)
			}
			r.commit(t, "top", "k", parent)
			sameTree(t, r.show(t, "top"), reference(t, nil, append(lower, blob)...))
			used, err := os.Stat(r.index(r.id(t, "top")))
			if err != nil {
				t.Fatal(err)
			}
			if os.SameFile(ahead, used) != (lower == nil) {
				t.Errorf("the index made ahead is used: %v, want %v", os.SameFile(ahead, used), lower == nil)
			}
			// The mount is there before its job has ended.
			for begin := time.Now(); exists(r.lowestIndex(r.id(t, "top"))); time.Sleep(time.Millisecond) {
				if time.Since(begin) > 10*time.Second {
					t.Fatal("the index made ahead is still there")
				}
			}
		})
	}
}
