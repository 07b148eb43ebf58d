package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/short"
)

func TestViewMounts(t *testing.T) {
	bindOf := func(source, access string) []mount.Mount {
		return []mount.Mount{{Type: "bind", Source: source, Options: []string{access, "rbind"}}}
	}
	overlayOf := func(options ...string) []mount.Mount {
		return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
	}
	tests := []struct {
		name   string
		kind   snapshots.Kind
		lowers []string
		want   []mount.Mount
	}{
		{"active without parent", snapshots.KindActive, nil, bindOf("/u", "rw")},
		{"view without parent", snapshots.KindView, nil, bindOf("/u", "ro")},
		{"view of one layer", snapshots.KindView, []string{"/a"}, bindOf("/a", "ro")},
		{"view of two layers", snapshots.KindView, []string{"/a", "/b"}, overlayOf("lowerdir=/a:/b", "o")},
		{"active on one layer", snapshots.KindActive, []string{"/a"}, overlayOf("workdir=/w", "upperdir=/u", "lowerdir=/a", "o")},
		{"active on two layers", snapshots.KindActive, []string{"/a", "/b"}, overlayOf("workdir=/w", "upperdir=/u", "lowerdir=/a:/b", "o")},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := view{kind: tt.kind, upper: "/u", work: "/w", lowers: tt.lowers, options: []string{"o"}}
			got := v.mounts()
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
			if ro := got[0].ReadOnly(); ro != (tt.kind == snapshots.KindView) {
				t.Errorf("ReadOnly is %v", ro)
			}
		})
	}
}

func Test128TarLayers(t *testing.T) {
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			var layers [][]byte
			n := short.Size(128, 24)
			for i := range n {
				layers = append(layers, makeTar(t, reg(fmt.Sprintf("m/f%d", i), fmt.Sprint(i)), reg("last", fmt.Sprint(i))))
			}
			top := r.pull(t, unpacks[0], "x", "", layers...)
			got := r.show(t, top)
			if len(got) != 1+1+1+n {
				t.Errorf("%d entries, want %d", len(got), 1+1+1+n)
			}
			mounts, err := r.Prepare(t.Context(), "container", top)
			if err != nil {
				t.Fatal(err)
			}
			err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
				b, err := os.ReadFile(filepath.Join(root, "last"))
				if string(b) != fmt.Sprint(n-1) {
					t.Errorf("last is %q", b)
				}
				return errors.Join(err, os.WriteFile(filepath.Join(root, "m", "w"), nil, 0o600))
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCleanup(t *testing.T) {
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRigIn(t, t.TempDir(), Options{Mount: mode, KeepLayers: time.Nanosecond})
			layers := image(t)[:3]
			top := r.pull(t, unpacks[0], "x", "", layers...)
			mounts, err := r.Prepare(t.Context(), "container", top)
			if err != nil {
				t.Fatal(err)
			}
			err = r.Remove(t.Context(), "x-1")
			if !errdefs.IsFailedPrecondition(err) {
				t.Errorf("remove a parent: got %v, want ErrFailedPrecondition", err)
			}
			// Containers go on when a layer they use is removed and unmounted.
			err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
				open, err := os.Open(filepath.Join(r.lower(r.id(t, "x-0")), "big")) // keeps the mount busy
				if err != nil {
					return err
				}
				defer open.Close()
				for _, key := range []string{"container", "x-2", "x-1", "x-0"} {
					if err := r.Remove(t.Context(), key); err != nil {
						return err
					}
				}
				if err := r.Cleanup(t.Context()); err != nil {
					return err
				}
				if mode == ModeDirectory {
					return nil
				}
				_, err = os.ReadFile(filepath.Join(root, "big"))
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{r.snapshotsDir(), r.mountsDir(), filepath.Join(filepath.Dir(r.root), "layers", "sha256")} {
				if left := entries(t, dir); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			}
			if err := r.Cleanup(t.Context()); err != nil {
				t.Error(err)
			}
			if err := r.Remove(t.Context(), top); !errdefs.IsNotFound(err) {
				t.Errorf("remove twice: got %v, want ErrNotFound", err)
			}
		})
	}
}

func TestUsage(t *testing.T) {
	r := newRig(t, ModeFile)
	blob := makeTar(t, reg("data", strings.Repeat("x", 100_000)), reg("zeros", strings.Repeat("\x00", 1<<20)))
	top := r.pull(t, unpacks[0], "x", "", blob)
	got, err := r.Usage(t.Context(), top)
	if err != nil {
		t.Fatal(err)
	}
	if got.Inodes != 2 || got.Size < 100_000 || got.Size > 400_000 {
		t.Errorf("tar layer: got %+v, want 2 inodes and the blocks that are not holes", got)
	}
	mounts, err := r.Prepare(t.Context(), "container", top)
	if err != nil {
		t.Fatal(err)
	}
	err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "f"), make([]byte, 40_960), 0o600)
	})
	if err != nil {
		t.Fatal(err)
	}
	active, err := r.Usage(t.Context(), "container")
	if err != nil || active.Size < 40_960 || active.Inodes != 2 {
		t.Errorf("active: got %+v, %v", active, err)
	}
	id := r.id(t, "container")
	r.commit(t, "changes", "container", "")
	if got, err := r.Usage(t.Context(), "changes"); err != nil || got != active {
		t.Errorf("committed: got %+v, %v, want %+v", got, err, active)
	}
	r.measure(t.Context(), id)
	if got, err := r.directoryUsage(t.Context(), id); err != nil || got != active || !exists(r.usage(id)) {
		t.Errorf("measured: got %+v, %v, want %+v", got, err, active)
	}
}

func TestModes(t *testing.T) {
	t.Run("auto on this kernel", func(t *testing.T) {
		if st := newRig(t, ModeAuto).Status(); st.Mode != ModeFile || st.Reason == "" {
			t.Errorf("got %+v, want file and a reason", st)
		}
	})
	t.Run("auto where files cannot be mounted", func(t *testing.T) {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		r := newRigIn(t, dir, Options{})
		st := r.Status()
		if st.Mode != ModeLoop || !strings.Contains(st.Reason, "not from files") {
			t.Errorf("got %+v, want loop and why", st)
		}
		layers := image(t)[:2]
		sameTree(t, r.show(t, r.pull(t, unpacks[0], "x", "", layers...)), reference(t, nil, layers...))
		if _, err := New(t.Context(), filepath.Join(dir, "other"), r.cache, Options{Mount: ModeFile}); !errors.Is(err, unix.ENOTBLK) {
			t.Errorf("forced file: got %v, want ENOTBLK", err)
		}
	})
	t.Run("unknown", func(t *testing.T) {
		if _, err := New(t.Context(), t.TempDir(), nil, Options{Mount: "nfs"}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v, want ErrInvalidArgument", err)
		}
	})
	t.Run("bad root", func(t *testing.T) {
		if _, err := New(t.Context(), filepath.Join(t.TempDir(), "a:b"), nil, Options{}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v, want ErrInvalidArgument", err)
		}
	})
	t.Run("root in use", func(t *testing.T) {
		r := newRig(t, ModeDirectory)
		if _, err := New(t.Context(), r.root, r.cache, Options{}); err == nil || !strings.Contains(err.Error(), "another gantryd") {
			t.Errorf("got %v, want an error that names the other process", err)
		}
	})
}

type recorder struct {
	mu   sync.Mutex
	seen []string
}

func (r *recorder) Prepared(namespace, key string, labels map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, fmt.Sprintf("%s %s %v", namespace, key, labels))
}

func (r *recorder) SnapshotCommitted(namespace, name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, fmt.Sprintf("%s committed %s", namespace, name))
}

func (r *recorder) Adopted(id string, diffID digest.Digest, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if took <= 0 {
		r.seen = append(r.seen, "in no time")
	}
	r.seen = append(r.seen, fmt.Sprintf("%s adopted %s", id, diffID))
}

func TestObserver(t *testing.T) {
	var rec recorder
	r := newRigIn(t, t.TempDir(), Options{Mount: ModeDirectory, Observer: &rec})
	ctx := inNamespace(t)
	if _, err := r.Prepare(ctx, "k", "", snapshots.WithLabels(map[string]string{"a": "b"})); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Prepare(ctx, "k", ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("got %v, want ErrAlreadyExists", err)
	}
	if err := r.Commit(ctx, "c", "k"); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(ctx, "d", "k"); !errdefs.IsNotFound(err) {
		t.Errorf("got %v, want ErrNotFound", err)
	}
	if want := []string{"test k map[a:b]", "test committed c"}; !reflect.DeepEqual(rec.seen, want) {
		t.Errorf("got %q, want %q", rec.seen, want)
	}
}

// A snapshot whose index depends on its parent tells once more when Commit has named it.
func TestObserverOfAdoption(t *testing.T) {
	tar := makeTar(t, reg("implied/f", "data"))
	for _, mode := range mountModes {
		for _, how := range unpacks {
			t.Run(string(mode)+"/"+how.name, func(t *testing.T) {
				var rec recorder
				r := newRigIn(t, t.TempDir(), Options{Mount: mode, Observer: &rec})
				r.show(t, r.pull(t, how, "image", "", makeTar(t, dir("implied", 0o700, 1)), tar))
				rec.mu.Lock()
				defer rec.mu.Unlock()
				want := map[string]int{"1": 1, "2": 1}
				if how.rebase && mode != ModeDirectory {
					want["2"] = 2
				}
				got := map[string]int{}
				for _, line := range rec.seen {
					if id, what, _ := strings.Cut(line, " "); strings.HasPrefix(what, "adopted sha256:") {
						got[id]++
					} else if line == "in no time" {
						t.Error(line)
					}
				}
				if !reflect.DeepEqual(got, want) {
					t.Errorf("got %v, want %v", got, want)
				}
			})
		}
	}
}

func TestWalkHoldsNoTransaction(t *testing.T) {
	r := newRig(t, ModeDirectory)
	if err := r.Walk(t.Context(), nil); err != nil {
		t.Errorf("empty: %v", err)
	}
	for _, key := range []string{"a", "b"} {
		if _, err := r.Prepare(t.Context(), key, ""); err != nil {
			t.Fatal(err)
		}
	}
	err := r.Walk(t.Context(), func(ctx context.Context, i snapshots.Info) error { return r.Remove(ctx, i.Name) })
	if err != nil {
		t.Error(err)
	}
}

func TestClosed(t *testing.T) {
	r := newRig(t, ModeFile)
	top := r.pull(t, unpacks[0], "x", "", image(t)[0])
	r.show(t, top) // waits for the worker
	id := r.id(t, top)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if !r.mounted(id) {
		t.Error("Close took the mount away from containers")
	}
	if j := r.schedule(id, nil); !errdefs.IsUnavailable(waitAll(t.Context(), []*job{j})) {
		t.Errorf("got %v, want ErrUnavailable", j.err)
	}
	if _, err := r.Prepare(t.Context(), "k", top); err == nil {
		t.Error("Prepare after Close worked")
	}
}

// Pulls, containers, removals and clean-ups at the same time, on shared layers.
func TestConcurrent(t *testing.T) {
	for name, o := range map[string]Options{
		"file": {Mount: ModeFile}, "loop": {Mount: ModeLoop}, "directory": {Mount: ModeDirectory},
		"upper files":                 {Mount: ModeFile, Upper: UpperFile, UpperSize: MinUpperSize},
		"loop and upper files":        {Mount: ModeLoop, Upper: UpperFile, UpperSize: MinUpperSize},
		"directories and upper files": {Mount: ModeDirectory, Upper: UpperFile, UpperSize: MinUpperSize},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRigIn(t, t.TempDir(), o)
			layers := image(t)[:3]
			want := reference(t, nil, layers...)
			r.pull(t, unpacks[0], "shared", "", layers...)
			var g errgroup.Group
			for worker := range 4 {
				g.Go(func() error {
					for round := range 4 {
						if err := r.churn(t, fmt.Sprintf("w%d-%d", worker, round), unpacks[(worker+round)%2], layers, want); err != nil {
							return err
						}
					}
					return nil
				})
			}
			g.Go(func() error {
				for range 20 {
					if err := r.Cleanup(t.Context()); err != nil {
						return err
					}
				}
				return nil
			})
			g.Go(func() error {
				for range 5 {
					found, err := r.Check(t.Context(), time.Millisecond)
					for _, f := range found {
						t.Errorf("check: %+v", f)
					}
					if err != nil {
						return err
					}
				}
				return nil
			})
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			if err := r.Cleanup(t.Context()); err != nil {
				t.Fatal(err)
			}
			if n := len(entries(t, r.snapshotsDir())); n != len(layers) {
				t.Errorf("%d folders left, want those of %d shared layers", n, len(layers))
			}
		})
	}
}

func (r *rig) churn(t *testing.T, name string, how unpack, layers [][]byte, want map[string]string) error {
	top := r.pull(t, how, name, "", layers...)
	for _, parent := range []string{top, "shared-2"} {
		key := name + "-container-" + parent
		mounts, err := r.Prepare(t.Context(), key, parent)
		if err != nil {
			return err
		}
		if got := look(t, mounts); !maps.Equal(got, want) {
			sameTree(t, got, want)
		}
		if _, err := r.Usage(t.Context(), key); err != nil {
			return err
		}
		if err := r.Remove(t.Context(), key); err != nil {
			return err
		}
	}
	for i := len(layers) - 1; i >= 0; i-- {
		if err := r.Remove(t.Context(), fmt.Sprintf("%s-%d", name, i)); err != nil {
			return err
		}
	}
	return nil
}
