package content

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// put commits a blob and returns it as Files lists it.
func put(t *testing.T, s *Store, data []byte, ref string) File {
	t.Helper()
	sess := open(t, s, ref, int64(len(data)))
	mustWrite(t, sess, 0, data, int64(len(data)))
	mustCommit(t, sess, int64(len(data)), int64(len(data)), sess.digest())
	for _, f := range s.Files() {
		if fi, err := os.Stat(f.Path); err == nil && fi.Size() == int64(len(data)) {
			return f
		}
	}
	t.Fatal("the blob is not listed")
	return File{}
}

func TestUses(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{})
	data, _ := randomBytes(t, 1000)
	f := put(t, s, data, "default/1/a")
	fi, err := os.Lstat(f.Path)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Uses(f, fi) || s.Uses(f, nil) {
		t.Error("a file that is there")
	}
	// Another file of the same name is not the one that was read.
	if err := os.Rename(f.Path, f.Path+"x"); err != nil {
		t.Fatal(err)
	}
	if !s.Uses(f, nil) || s.Uses(f, fi) {
		t.Error("a file that is gone")
	}
	if err := os.WriteFile(f.Path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if s.Uses(f, fi) {
		t.Error("a file that was replaced")
	}
	if err := s.Delete(t.Context(), f.Digest); err != nil {
		t.Fatal(err)
	}
	if s.Uses(f, nil) {
		t.Error("a blob that was deleted is missed")
	}
}

// A blob that lost its file, one whose bytes rotted, one of which only a damaged record is left, and one that the store
// does not know at all: each is as good as new, also after a restart.
func TestReplace(t *testing.T) {
	t.Parallel()
	for name, lose := range map[string]func(t *testing.T, root string, data []byte) (*Store, File){
		"gone": func(t *testing.T, root string, data []byte) (*Store, File) {
			s := newStore(t, root, Options{})
			f := put(t, s, data, "default/1/a")
			return s, File{Digest: f.Digest, Path: f.Path}
		},
		"rotten": func(t *testing.T, root string, data []byte) (*Store, File) {
			s := newStore(t, root, Options{})
			f := put(t, s, data, "default/1/a")
			if err := os.Chmod(f.Path, 0o600); err != nil {
				t.Fatal(err)
			}
			return s, f
		},
		"record": func(t *testing.T, root string, data []byte) (*Store, File) {
			s := discardingStore(t, root, data, Options{})
			f := s.Files()[0]
			if !f.Discarded || s.CheckRecord(f) != nil {
				t.Fatalf("%+v, %v", f, s.CheckRecord(f))
			}
			return s, f
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := t.TempDir()
			data, d := randomBytes(t, 3<<20)
			s, f := lose(t, root, data)
			if name == "gone" {
				if err := os.Remove(f.Path); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(f.Path, []byte("rotten"), 0o600); err != nil {
				if err := os.Remove(f.Path); err != nil {
					t.Fatal(err)
				}
			}
			if f.Discarded && !errdefs.IsDataLoss(s.CheckRecord(f)) {
				t.Errorf("the record: %v", s.CheckRecord(f))
			}
			good := filepath.Join(t.TempDir(), "good")
			if err := os.WriteFile(good, data, 0o444); err != nil {
				t.Fatal(err)
			}
			if err := s.Replace("default", d, int64(len(data)), func(path string) error { return os.Link(good, path) }); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				got, err := ccontent.ReadBlob(t.Context(), s, ocispec.Descriptor{Digest: d, Size: int64(len(data))})
				if err != nil || !slices.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
				if left, err := filepath.Glob(filepath.Join(root, discardedFolder, "new-*")); err != nil || len(left) > 0 || s.Discarded(d) {
					t.Errorf("left: %v, %v, discarded: %t", left, err, s.Discarded(d))
				}
				s = newStore(t, root, Options{})
			}
		})
	}
}

func TestStrays(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s := newStore(t, root, Options{})
	data, _ := randomBytes(t, 1000)
	put(t, s, data, "default/1/a")
	half := open(t, s, "default/1/half", 2000)
	mustWrite(t, half, 0, data, 1000)
	want := []string{filepath.Join(root, "blobs", "sha256", "junk"), filepath.Join(root, "ingest", "junk")}
	for _, name := range want {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := s.Strays(time.Hour); err != nil || len(got) > 0 {
		t.Errorf("young ones: %v, %v", got, err)
	}
	got, err := s.Strays(0)
	if slices.Sort(got); err != nil || !slices.Equal(got, want) {
		t.Errorf("got %v, want %v, %v", got, want, err)
	}
	for _, name := range got {
		if _, err := s.Quarantine(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.Quarantine(t.Context(), s.Files()[0].Path); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a blob in use: %v", err)
	}
	if got, err := s.Strays(0); err != nil || len(got) > 0 {
		t.Errorf("afterwards: %v, %v", got, err)
	}
}
