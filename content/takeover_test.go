package content

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestTakeover(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	f := &fakeFetcher{transfer: newTransfer(t, data).finish()}
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Fetcher: f, Observer: o})
	o.store = s

	w := open(t, s, layerRef(d), 5000)
	if st := w.Stat(); st.Offset != 0 || st.Total != 5000 {
		t.Fatalf("first STAT: %+v", st)
	}
	wantDigest(t, w, digest.FromString(""))
	if n := len(f.asked()); n != 0 {
		t.Fatalf("the first STAT asked for a transfer %d times", n)
	}
	mustStatus(t, w, 5000)
	wantDigest(t, w, d)
	wantFile(t, s, d, true)
	wantBlob(t, s, data, false)
	if infos := s.infos(); len(infos) != 0 {
		t.Fatalf("listed before its commit: %v", infos)
	}
	mustStatus(t, w, 5000)

	mustCommit(t, w, 0, 5000, d) // the client has written nothing
	wantDigest(t, w, d)
	wantBlob(t, s, data, true)
	wantNoIngests(t, s)
	want := []FetchRequest{{Namespace: "default", Ref: "layer-" + d.String(), Digest: d, Size: 5000}}
	if got := f.asked(); !slices.Equal(got, want) {
		t.Errorf("requests %+v, wanted %+v", got, want)
	}
	if waits, closed := f.transfer.counts(); waits != 1 || closed != 1 {
		t.Errorf("%d waits, %d closes, wanted one of each", waits, closed)
	}
	if got, want := o.seen(), []string{"committed default " + d.String() + " 5000"}; !slices.Equal(got, want) {
		t.Errorf("events %q, wanted %q", got, want)
	}
	if st, err := os.Stat(f.transfer.file); err != nil || st.Size() != 5000 {
		t.Errorf("the transfer's own file: %v", err)
	}
}

// A second namespace: everything is there, COMMIT says so.
// All bytes were there when the client came back: its COMMIT says offset 0, because
// it wrote nothing, and must say what it takes them for.
func TestCommitOfWhatWasThere(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	for name, tt := range map[string]struct {
		total    int64
		expected digest.Digest
		err      error
	}{
		"right":        {5000, d, nil},
		"no digest":    {5000, "", errdefs.ErrFailedPrecondition},
		"other digest": {5000, digest.FromString("other"), errdefs.ErrFailedPrecondition},
		"other total":  {4999, d, errdefs.ErrFailedPrecondition},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).finish()}})
			w := open(t, s, layerRef(d), 5000)
			mustStatus(t, w, 5000)
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			w = open(t, s, layerRef(d), 5000)
			if st := w.Stat(); st.Offset != 5000 {
				t.Fatalf("first STAT %d, wanted 5000", st.Offset)
			}
			_, err := w.Commit(t.Context(), 0, tt.total, tt.expected, nil)
			if !is(err, tt.err) {
				t.Fatalf("commit: %v, wanted %v", err, tt.err)
			}
			wantBlob(t, s, data, tt.err == nil)
		})
	}
}

func TestTakeoverOfWhatIsShown(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	f := &fakeFetcher{transfer: newTransfer(t, data).finish()}
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Fetcher: f, Observer: o})
	for i, ref := range []string{layerRef(d), "k8s.io/1/layer-" + d.String()} {
		w := open(t, s, ref, 5000)
		mustStatus(t, w, 5000)
		n, err := w.Commit(testContext(t), 0, 5000, d, nil)
		if n != 5000 || (i == 0 && err != nil) || (i == 1 && !errdefs.IsAlreadyExists(err)) {
			t.Fatalf("commit %d: %d, %v", i, n, err)
		}
		wantDigest(t, w, d)
	}
	wantNoIngests(t, s)
	if got := o.seen(); len(got) != 2 {
		t.Errorf("events %q, wanted two commits", got)
	}
}

func TestTakeoverCommitChecks(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	other := digest.FromString("other")
	tests := map[string]struct {
		off, total int64
		expected   digest.Digest
		err        error
	}{
		"unsaid":       {0, 0, "", nil},
		"other total":  {0, 4999, d, errdefs.ErrFailedPrecondition},
		"other digest": {0, 5000, other, errdefs.ErrFailedPrecondition},
		"other offset": {5000, 5000, d, errdefs.ErrOutOfRange},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).finish()}})
			w := open(t, s, layerRef(d), 5000)
			mustStatus(t, w, 5000)
			_, err := w.Write(t.Context(), 0, []byte("more"))
			wantErr(t, err, errdefs.ErrFailedPrecondition)
			_, err = w.Commit(t.Context(), tt.off, tt.total, tt.expected, nil)
			if !is(err, tt.err) {
				t.Fatalf("commit: %v, wanted %v", err, tt.err)
			}
			wantBlob(t, s, data, tt.err == nil)
		})
	}
}

func TestNoTakeover(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	tests := map[string]struct {
		ref      string
		total    int64
		expected digest.Digest
		write    bool
	}{
		"no digest":       {"default/1/layer", 300, "", false},
		"no size":         {layerRef(d), 0, "", false},
		"negative size":   {layerRef(d), -1, "", false},
		"digest in front": {"default/1/" + d.String() + "-layer", 300, "", false},
		"after a write":   {layerRef(d), 300, "", true},
		"contradiction":   {layerRef(d), 300, digest.FromString("other"), false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &fakeFetcher{transfer: newTransfer(t, data).finish()}
			s := newStore(t, t.TempDir(), Options{Fetcher: f})
			w, err := s.Open(testContext(t), tt.ref, tt.total, tt.expected)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = w.Close() }()
			var off int64
			if tt.write {
				off = 10
				mustWrite(t, w, 0, data[:10], 10)
			}
			mustStatus(t, w, off)
			if got := f.asked(); len(got) != 0 {
				t.Fatalf("asked for %+v", got)
			}
		})
	}
}

// Only the first Status may ask, whatever it was told.
func TestAsksOncePerSession(t *testing.T) {
	t.Parallel()
	_, d := randomBytes(t, 300)
	for name, err := range map[string]error{"not found": nil, "failure": errdefs.ErrInternal} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &fakeFetcher{err: err}
			s := newStore(t, t.TempDir(), Options{Fetcher: f})
			for turn := 1; turn < 3; turn++ {
				w := open(t, s, layerRef(d), 300)
				mustStatus(t, w, 0)
				mustStatus(t, w, 0)
				if n := len(f.asked()); n != turn {
					t.Fatalf("session %d: asked %d times in all", turn, n)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// The client's own count starts at what the first STAT answered (M), the bytes
// continue at what the transfer left (N).
func TestPartialTakeover(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	tests := map[string]struct{ m, n, want int64 }{
		"from nothing":            {0, 3000, 3000},
		"nothing came":            {0, 0, 0},
		"resumed":                 {1000, 3000, 3000},
		"the ingest has more":     {3000, 1000, 3000},
		"the ingest has the same": {3000, 3000, 3000},
		"all but one":             {0, 4999, 4999},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).fail(tt.n)}})
			if tt.m > 0 {
				w := open(t, s, layerRef(d), 5000)
				mustWrite(t, w, 0, data[:tt.m], tt.m)
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			}
			w := open(t, s, layerRef(d), 5000)
			if st := w.Stat(); st.Offset != tt.m {
				t.Fatalf("first STAT %d, wanted %d", st.Offset, tt.m)
			}
			mustStatus(t, w, tt.want)
			wantDigest(t, w, digest.FromBytes(data[:tt.want]))

			half := (5000 - tt.want + 1) / 2
			mustWrite(t, w, tt.m, data[tt.want:tt.want+half], tt.m+half)
			mustStatus(t, w, tt.want+half)
			wantDigest(t, w, digest.FromBytes(data[:tt.want+half]))
			if tt.want+half < 5000 {
				mustWrite(t, w, tt.m+half, data[tt.want+half:], tt.m+5000-tt.want)
			}
			mustStatus(t, w, 5000)
			wantBlob(t, s, data, false)
			mustCommit(t, w, tt.m+5000-tt.want, 5000, d)
			wantBlob(t, s, data, true)
		})
	}
}

func TestTruncateAfterPartialTakeover(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).fail(3000)}})
	w := open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 3000)
	_, err := w.Commit(t.Context(), 0, 5000, d, nil)
	wantErr(t, err, errdefs.ErrFailedPrecondition)

	w = open(t, s, layerRef(d), 5000) // resumes; the transfer brings nothing new
	mustStatus(t, w, 3000)
	mustWrite(t, w, 3000, data[3000:4000], 4000)
	mustWrite(t, w, 0, data[:100], 100)
	mustStatus(t, w, 100)
	mustWrite(t, w, 100, data[100:], 5000)
	mustCommit(t, w, 5000, 5000, d)
}

// The transfer has all bytes but cannot hand over its file.
func TestTakeoverWithoutLink(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	tr := newTransfer(t, data).finish()
	tr.file = ""
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
	w := open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 5000)
	wantFile(t, s, d, true)
	mustCommit(t, w, 0, 5000, d)
	wantBlob(t, s, data, true)
}

// All bytes came and they are wrong: the client fetches everything itself, also
// when it had begun before.
func TestTakeoverOfWrongBytes(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	bad := slices.Clone(data)
	bad[4000] ^= 1
	for name, m := range map[string]int64{"from nothing": 0, "resumed": 1000} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, bad).fail(5000)}})
			w := open(t, s, layerRef(d), 5000)
			if m > 0 {
				mustWrite(t, w, 0, data[:m], m)
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				w = open(t, s, layerRef(d), 5000)
			}
			mustStatus(t, w, 0)
			wantDigest(t, w, digest.FromString(""))
			mustWrite(t, w, m, data, m+5000)
			mustCommit(t, w, m+5000, 5000, d)
			wantBlob(t, s, data, true)
		})
	}
}

// A failed transfer left wrong bytes at the start: the commit of what the client
// made of them fails, and the retry gets none of them again.
func TestWrongBytesOfAFailedTransferAreNotTakenTwice(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	bad := slices.Clone(data)
	bad[10] ^= 1
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, bad).fail(3000)}, Observer: o})
	w := open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 3000)
	mustWrite(t, w, 0, data[3000:], 2000)
	_, err := w.Commit(testContext(t), 2000, 5000, d, nil)
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	if want := fmt.Sprintf("mismatched default %s", d); !slices.Contains(o.seen(), want) {
		t.Errorf("events %q, wanted %q: the transfer must not keep its bytes", o.seen(), want)
	}
	w = open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 0)
	mustWrite(t, w, 0, data, 5000)
	mustCommit(t, w, 5000, 5000, d)
	wantBlob(t, s, data, true)
}

// A transfer that begins anew or ends while its bytes are taken over: what counts
// is what it says is there.
func TestTakeoverOfWhatChanged(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	for name, tt := range map[string]struct {
		err     error
		m, lost int64
		want    int64
	}{
		"began anew":            {errdefs.ErrAborted, 0, 3000, 0},
		"began anew, resumed":   {errdefs.ErrAborted, 1000, 2000, 1000},
		"unreadable in the end": {os.ErrInvalid, 1000, 500, 2500},
		"unreadable at once":    {os.ErrInvalid, 0, 3000, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tr := newTransfer(t, data).fail(3000)
			tr.cloneErr, tr.lost = tt.err, tt.lost
			s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
			w := open(t, s, layerRef(d), 5000)
			if tt.m > 0 {
				mustWrite(t, w, 0, data[:tt.m], tt.m)
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				w = open(t, s, layerRef(d), 5000)
			}
			mustStatus(t, w, tt.want)
			wantDigest(t, w, digest.FromBytes(data[:tt.want]))
			if fi, err := os.Stat(w.ing.path(dataFile)); err != nil || fi.Size() != tt.want {
				t.Errorf("the data file: %v, %v; wanted %d bytes", fi, err, tt.want)
			}
			mustWrite(t, w, tt.m, data[tt.want:], tt.m+5000-tt.want)
			mustCommit(t, w, tt.m+5000-tt.want, 5000, d)
			wantBlob(t, s, data, true)
		})
	}
}

// A full disk is not the transfer's failure: the client must hear of it.
func TestTakeoverOnAFullDisk(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	tr := newTransfer(t, data).fail(3000)
	tr.cloneErr, tr.lost = syscall.ENOSPC, 1000
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
	w := open(t, s, layerRef(d), 5000)
	_, err := w.Status(t.Context())
	wantErr(t, err, errdefs.ErrResourceExhausted)
	if st := w.Stat(); st.Offset != 2000 {
		t.Errorf("offset %d, wanted the 2000 bytes that fit", st.Offset)
	}
}

func TestTransferOfAnotherSize(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	tr := newTransfer(t, append(slices.Clone(data), 'x')).finish()
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
	w := open(t, s, layerRef(d), 5000)
	st, err := w.Status(testContext(t))
	if err != nil || st.Offset > 5000 {
		t.Fatalf("status %+v, %v", st, err)
	}
	wantBlob(t, s, data, false)
}

func TestWaiting(t *testing.T) {
	t.Parallel()
	gone := context.Canceled
	tests := map[string]struct {
		end  func(s *Store, ref string, cancel context.CancelFunc)
		want error
	}{
		"the client leaves": {func(_ *Store, _ string, cancel context.CancelFunc) { cancel() }, gone},
		"aborted":           {func(s *Store, ref string, _ context.CancelFunc) { _ = s.Abort(context.Background(), ref) }, errdefs.ErrAborted},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, d := randomBytes(t, 5000)
			tr := newTransfer(t, data)
			s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(testContext(t))
				defer cancel()
				tr.done = make(chan struct{})
				w, err := s.Open(ctx, layerRef(d), 5000, "")
				if err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() {
					_, err := w.Status(ctx)
					ended <- err
				}()
				synctest.Wait()
				for _, n := range []int64{1, 2500} {
					tr.progress(n)
					st, err := s.Status(ctx, layerRef(d))
					if err != nil || st.Offset != n || st.Total != 5000 {
						t.Fatalf("status while waiting: %+v, %v, wanted offset %d", st, err, n)
					}
					list, err := s.ListStatuses(ctx, "ref=="+layerRef(d))
					if err != nil || len(list) != 1 || list[0].Offset != n {
						t.Fatalf("statuses while waiting: %+v, %v", list, err)
					}
				}
				tt.end(s, layerRef(d), cancel)
				if err := <-ended; !is(err, tt.want) {
					t.Fatalf("status ended with %v, wanted %v", err, tt.want)
				}
				if waits, closed := tr.counts(); waits != 1 || closed != 1 {
					t.Fatalf("%d waits, %d closes, wanted one of each", waits, closed)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
			})
			// The ref can be had again.
			open(t, s, layerRef(d), 5000)
		})
	}
}

func TestAbort(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: newTransfer(t, data).finish()}})
	wantErr(t, s.Abort(t.Context(), "unknown"), errdefs.ErrNotFound)

	// Two clients have staged the blob; it goes with the last of them.
	a, b := open(t, s, layerRef(d), 300), open(t, s, "other/1/layer-"+d.String(), 300)
	mustStatus(t, a, 300)
	mustStatus(t, b, 300)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	wantFile(t, s, d, true)
	if err := s.Abort(t.Context(), layerRef(d)); err != nil {
		t.Fatal(err)
	}
	wantFile(t, s, d, true)
	if err := s.Abort(t.Context(), "other/1/layer-"+d.String()); err != nil {
		t.Fatal(err)
	}
	wantFile(t, s, d, false)
	wantErr(t, s.Abort(t.Context(), "other/1/layer-"+d.String()), errdefs.ErrNotFound)

	// The second session is still open, and of no use.
	_, err := b.Write(t.Context(), 0, data)
	wantErr(t, err, errdefs.ErrAborted)
	_, err = b.Status(t.Context())
	wantErr(t, err, errdefs.ErrAborted)
	_, err = s.Open(t.Context(), "other/1/layer-"+d.String(), 300, "")
	wantErr(t, err, errdefs.ErrUnavailable)
	_, err = b.Commit(t.Context(), 0, 300, d, nil)
	wantErr(t, err, errdefs.ErrAborted)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	wantNoIngests(t, s)
}

// A session that comes back to a staged blob is answered at once.
func TestStagedOutlivesItsSession(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	f := &fakeFetcher{transfer: newTransfer(t, data).finish()}
	s := newStore(t, t.TempDir(), Options{Fetcher: f})
	w := open(t, s, layerRef(d), 300)
	mustStatus(t, w, 300)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	wantDigest(t, w, d)
	w = open(t, s, layerRef(d), 300)
	if st := w.Stat(); st.Offset != 300 {
		t.Fatalf("first STAT %d, wanted 300", st.Offset)
	}
	wantDigest(t, w, d)
	mustStatus(t, w, 300)
	if n := len(f.asked()); n != 1 {
		t.Fatalf("asked %d times, wanted 1", n)
	}
	mustCommit(t, w, 300, 300, d)
}

func TestDelete(t *testing.T) {
	t.Parallel()
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Observer: o})
	o.store = s
	var digests []digest.Digest
	for i := range 150 {
		data, d := randomBytes(t, 10+i)
		digests = append(digests, d)
		w := open(t, s, layerRef(d), int64(len(data)))
		mustWrite(t, w, 0, data, int64(len(data)))
		mustCommit(t, w, int64(len(data)), int64(len(data)), d)
	}
	n := 0
	err := s.Walk(t.Context(), func(info ccontent.Info) error {
		n++
		if err := s.Delete(t.Context(), info.Digest); err != nil {
			return err
		}
		_, err := s.Info(t.Context(), info.Digest)
		wantErr(t, err, errdefs.ErrNotFound)
		return nil
	})
	if err != nil || n != len(digests) {
		t.Fatalf("walked %d of %d: %v", n, len(digests), err)
	}
	for _, d := range digests {
		wantFile(t, s, d, false)
		wantErr(t, s.Delete(t.Context(), d), errdefs.ErrNotFound)
		if !slices.Contains(o.seen(), "deleted "+d.String()) {
			t.Fatalf("%s deleted, the observer was not told", d)
		}
	}
}

// Garbage collection deletes for one namespace what another is about to commit.
func TestDeleteOfWhatIsStaged(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	s := newStore(t, t.TempDir(), Options{})
	a, b := open(t, s, layerRef(d), 300), open(t, s, "other/1/layer-"+d.String(), 300)
	mustWrite(t, a, 0, data, 300)
	mustWrite(t, b, 0, data, 300)
	wantErr(t, s.Delete(t.Context(), d), errdefs.ErrNotFound)
	mustCommit(t, a, 300, 300, d)
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, data, false)
	mustCommit(t, b, 300, 300, d)
	wantBlob(t, s, data, true)
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantFile(t, s, d, false)
}

// Everything at once, on few refs and fewer blobs: whatever wins, what is shown
// is right, and nothing is left.
func TestTogether(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{Observer: &fakeObserver{}})
	blobs := make([][]byte, 3)
	for i := range blobs {
		blobs[i], _ = randomBytes(t, 3000+i)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for turn := range 60 {
				data := blobs[(i+turn)%len(blobs)]
				d := digest.FromBytes(data)
				ref := string(rune('a'+turn%2)) + "/1/layer-" + d.String()
				switch (i + turn) % 5 {
				case 0:
					_ = s.Abort(t.Context(), ref)
				case 1:
					_ = s.Delete(t.Context(), d)
				default:
					writeAll(t, s, ref, data)
				}
			}
		})
	}
	wg.Wait()
	for _, data := range blobs {
		_, err := s.Info(t.Context(), digest.FromBytes(data))
		wantBlob(t, s, data, err == nil)
	}
	for ref := range s.ingests {
		if err := s.Abort(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
	wantNoIngests(t, s)
	files, err := os.ReadDir(s.root + "/blobs/sha256")
	if err != nil || len(files) != len(s.infos()) {
		t.Errorf("%d files (%v) for %d blobs", len(files), err, len(s.infos()))
	}
}

// writeAll writes a blob as far as the others let it.
func writeAll(t *testing.T, s *Store, ref string, data []byte) {
	t.Helper()
	w, err := s.Open(t.Context(), ref, int64(len(data)), "")
	if err != nil {
		return
	}
	defer func() { _ = w.Close() }()
	off := w.Stat().Offset
	for off < int64(len(data)) {
		if off, err = w.Write(t.Context(), off, data[off:min(off+1000, int64(len(data)))]); err != nil {
			if !errdefs.IsAborted(err) && !is(err, os.ErrNotExist) {
				t.Errorf("write: %v", err)
			}
			return
		}
	}
	_, err = w.Commit(t.Context(), off, int64(len(data)), digest.FromBytes(data), nil)
	if err != nil && !errdefs.IsAlreadyExists(err) && !errdefs.IsAborted(err) {
		t.Errorf("commit: %v", err)
	}
}
