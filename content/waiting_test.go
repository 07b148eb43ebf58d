package content

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func ingestFolders(t *testing.T, s *Store) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.root, ingestFolder))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// containerd's database waits for the first STAT, so that makes no file: the disk may be slow.
func TestOpenLeavesTheDiskAlone(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	s := newStore(t, root, Options{})
	w := open(t, s, layerRef(d), 5000)
	if n := ingestFolders(t, s); n != 0 {
		t.Fatalf("%d folders after Open, wanted none", n)
	}
	if st, err := s.Status(t.Context(), layerRef(d)); err != nil || st.Total != 5000 || st.StartedAt.IsZero() {
		t.Fatalf("status of an ingest without a folder: %+v, %v", st, err)
	}
	mustWrite(t, w, 0, data[:1000], 1000)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	// A restart finds all of it.
	s = newStore(t, root, Options{})
	st, err := s.Status(t.Context(), layerRef(d))
	if err != nil || st.Offset != 1000 || st.Total != 5000 {
		t.Fatalf("status after a restart: %+v, %v, wanted 1000 of 5000 bytes", st, err)
	}
	w = open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 1000)
	mustWrite(t, w, 1000, data[1000:], 5000)
	mustCommit(t, w, 5000, 5000, d)
	wantNoIngests(t, s)
}

// An ingest that nobody wrote is known until it is aborted, and is gone after a restart.
func TestIngestWithoutAFolder(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	s := newStore(t, root, Options{})
	if err := open(t, s, "default/1/a", 10).Close(); err != nil {
		t.Fatal(err)
	}
	if st, err := s.ListStatuses(t.Context()); err != nil || len(st) != 1 {
		t.Fatalf("statuses %v, %v, wanted one", st, err)
	}
	wantNoIngests(t, newStore(t, root, Options{}))
	if err := s.Abort(t.Context(), "default/1/a"); err != nil {
		t.Fatal(err)
	}
	wantNoIngests(t, s)
}

// Neither containerd's database nor its garbage collection waits for files to be removed, and a ref can be used again
// meanwhile.
func TestNobodyWaitsForTheFolder(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	for name, end := range map[string]func(*testing.T, *Store, *Session){
		"COMMIT": func(t *testing.T, _ *Store, w *Session) { mustCommit(t, w, 5000, 5000, d) },
		"Abort": func(t *testing.T, s *Store, w *Session) {
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if err := s.Abort(t.Context(), layerRef(d)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{})
			began, release := make(chan struct{}), make(chan struct{})
			s.onClear = func(string) {
				began <- struct{}{}
				<-release
			}
			w := open(t, s, layerRef(d), 5000)
			mustWrite(t, w, 0, data, 5000)
			end(t, s, w)
			<-began // the removal is under way, and end has returned
			if _, err := s.Status(t.Context(), layerRef(d)); !errdefs.IsNotFound(err) {
				t.Fatalf("status: %v, wanted not found", err)
			}
			w = open(t, s, layerRef(d), 0)
			wrote := make(chan error, 1)
			go func() {
				_, err := w.Write(testContext(t), 0, data[:10])
				wrote <- err
			}()
			select {
			case err := <-wrote:
				t.Fatalf("a WRITE into a folder that is being removed: %v", err)
			case <-time.After(20 * time.Millisecond):
			}
			close(release)
			if err := <-wrote; err != nil {
				t.Fatal(err)
			}
			s.onClear = nil
			if st, err := s.Status(t.Context(), layerRef(d)); err != nil || st.Offset != 10 {
				t.Fatalf("status of the ref's next ingest: %+v, %v", st, err)
			}
			if n := ingestFolders(t, s); n != 1 {
				t.Fatalf("%d folders, wanted the new one", n)
			}
		})
	}
}

// What a session waits for the disk is told apart from what it does.
func TestSynced(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	s := newStore(t, t.TempDir(), Options{})
	s.onSync = func(string) { time.Sleep(time.Millisecond) }
	w := open(t, s, layerRef(d), 5000)
	mustWrite(t, w, 0, data, 5000)
	if synced := w.Synced(); synced < 2*time.Millisecond { // the file and its folder
		t.Fatalf("synced for %s, wanted 2ms at least", synced)
	}
	s.onSync = func(path string) { t.Errorf("COMMIT syncs %s", path) }
	mustCommit(t, w, 5000, 5000, d)
}
