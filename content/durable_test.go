package content

import (
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// syncs writes down what a store makes durable, and whether the blob had its
// place in blobs/ then.
type syncs struct {
	store *Store
	blob  string
	log   []string
}

func watchSyncs(s *Store, d digest.Digest) *syncs {
	w := &syncs{store: s, blob: s.blobPath(d)}
	s.onSync = func(path string) {
		what := "file"
		if fi, err := os.Stat(path); err == nil && fi.IsDir() {
			what = "folder"
		}
		if _, err := os.Stat(w.blob); err == nil {
			what += " after it got its name"
		}
		if what[:4] == "fold" && path != filepath.Dir(w.blob) {
			what = "another " + what
		}
		w.log = append(w.log, what)
	}
	return w
}

func (w *syncs) want(t *testing.T, when string, want ...string) {
	t.Helper()
	if !slices.Equal(w.log, want) {
		t.Errorf("%s: made durable %q, wanted %q", when, w.log, want)
	}
	w.log = nil
}

const placed = "folder after it got its name"

// Data, then name, then folder, all before the answer after which containerd
// commits; COMMIT runs in containerd's transaction and syncs nothing.
func TestOrderOfDurability(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)

	t.Run("taken over", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).finish()}})
		w, log := open(t, s, layerRef(d), 5000), watchSyncs(s, d)
		log.want(t, "first STAT")
		mustStatus(t, w, 5000)
		log.want(t, "waiting STAT", placed) // the transfer has synced the data
		mustCommit(t, w, 0, 5000, d)
		log.want(t, "COMMIT")
	})
	t.Run("written by the client", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, t.TempDir(), Options{})
		w, log := open(t, s, layerRef(d), 5000), watchSyncs(s, d)
		mustStatus(t, w, 0)
		mustWrite(t, w, 0, data[:4000], 4000)
		log.want(t, "first WRITE")
		mustWrite(t, w, 4000, data[4000:], 5000)
		log.want(t, "last WRITE", "file", placed)
		mustStatus(t, w, 5000)
		mustCommit(t, w, 5000, 5000, d)
		log.want(t, "COMMIT")
	})
	t.Run("second namespace", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).finish()}})
		first := open(t, s, layerRef(d), 5000)
		mustStatus(t, first, 5000)
		mustCommit(t, first, 0, 5000, d)
		w, log := open(t, s, "other/1/layer-"+d.String(), 5000), watchSyncs(s, d)
		mustStatus(t, w, 5000)
		log.want(t, "waiting STAT")
	})
	t.Run("no size", func(t *testing.T) {
		t.Parallel()
		s := newStore(t, t.TempDir(), Options{})
		w, log := open(t, s, "import", 0), watchSyncs(s, d)
		mustWrite(t, w, 0, data, 5000)
		log.want(t, "WRITE")
		mustCommit(t, w, 5000, 5000, d)
		log.want(t, "COMMIT", "file", placed)
	})
}

// Nobody is told that a blob is there before the name of its folder is durable,
// whoever has made that folder.
func TestOneFolderForTwo(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{})
	var once sync.Once
	var durable atomic.Bool
	making, second := make(chan struct{}), make(chan struct{})
	s.onSync = func(path string) {
		if path != filepath.Join(s.root, blobFolder) {
			return
		}
		once.Do(func() {
			close(making)
			select {
			case <-second:
			case <-time.After(50 * time.Millisecond): // it waits, as it should
			}
			durable.Store(true)
		})
	}
	commit := func(data string) {
		d := digest.SHA512.FromString(data)
		w, err := s.Open(testContext(t), "default/1/layer-"+d.String(), int64(len(data)), "")
		if err == nil {
			_, err = w.Write(testContext(t), 0, []byte(data))
		}
		if err != nil {
			t.Error(err)
		}
		if !durable.Load() {
			t.Errorf("%q was answered before the folder was durable", data)
		}
		_ = w.Close()
	}
	var wg sync.WaitGroup
	wg.Go(func() { commit("first") })
	<-making
	wg.Go(func() { commit("other"); close(second) })
	wg.Wait()
}

// What a power loss has left of an ingest may be anything. A client whose ref
// names no digest finds out at COMMIT, and must not find the same there for ever.
func TestSpoiledByPowerLoss(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	s := newStore(t, root, Options{})
	w := open(t, s, "import", 0)
	mustWrite(t, w, 0, data, 5000)
	path := w.ing.path(dataFile)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, 5000), 0o644); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, root, Options{})
	w = open(t, s, "import", 0)
	mustStatus(t, w, 5000)
	_, err := w.Commit(testContext(t), 5000, 5000, d, nil)
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	w = open(t, s, "import", 0)
	mustStatus(t, w, 0)
	mustWrite(t, w, 0, data, 5000)
	mustCommit(t, w, 5000, 5000, d)
	wantBlob(t, s, data, true)
}
