package content

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

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
