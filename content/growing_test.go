package content

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

var errLeft = errors.New("left")

// readAll reads a Growing to its end, in the background.
func readAll(ctx context.Context, g *Growing) <-chan []byte {
	out := make(chan []byte, 1)
	go func() {
		var all []byte
		p := make([]byte, 77)
		for {
			n, err := g.ReadAt(ctx, p, int64(len(all)))
			all = append(all, p[:n]...)
			if err != nil && (n == 0 || !errors.Is(err, io.EOF)) {
				break
			}
		}
		out <- all
	}()
	return out
}

func TestGrowing(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Observer: o})
	o.store = s
	w := open(t, s, layerRef(d), 5000)
	if got := o.seen(); len(got) != 0 {
		t.Fatalf("events before the first write: %q", got)
	}
	mustWrite(t, w, 0, data[:1000], 1000)
	g := o.follower(t, 0)
	first, second := readAll(t.Context(), g), readAll(t.Context(), g)
	verified := make(chan error, 1)
	go func() { verified <- g.Verified(t.Context()) }()
	mustWrite(t, w, 1000, data[1000:2000], 2000)
	mustWrite(t, w, 2000, data[2000:], 5000)
	select {
	case err := <-verified:
		t.Fatalf("verified before COMMIT: %v", err)
	default:
	}
	mustCommit(t, w, 5000, 5000, d)
	if err := <-verified; err != nil {
		t.Fatal(err)
	}
	for _, r := range []<-chan []byte{first, second} {
		if got := <-r; !bytes.Equal(got, data) {
			t.Errorf("read %d bytes, wanted the blob's %d", len(got), len(data))
		}
	}
	if _, err := g.ReadAt(t.Context(), make([]byte, 1), 5000); !errors.Is(err, io.EOF) {
		t.Errorf("read at the end: %v", err)
	}
	want := []string{"ingesting default " + d.String() + " 5000", "committed default " + d.String() + " 5000"}
	if got := o.seen(); !slices.Equal(got, want) {
		t.Errorf("events %q, wanted %q", got, want)
	}
	if err := errors.Join(g.Close(), g.Close()); err != nil {
		t.Error(err)
	}
	if _, err := g.ReadAt(t.Context(), make([]byte, 1), 0); err == nil {
		t.Error("read after close: no error")
	}
}

func TestGrowingEnds(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	tests := map[string]struct {
		end      func(t *testing.T, s *Store, w *Session)
		readable bool
	}{
		"closed":    {func(t *testing.T, _ *Store, w *Session) { t.Helper(); _ = w.Close() }, true},
		"truncated": {func(t *testing.T, _ *Store, w *Session) { t.Helper(); mustWrite(t, w, 0, data[:7], 7) }, false},
		"aborted": {func(t *testing.T, s *Store, w *Session) {
			t.Helper()
			if err := errors.Join(s.Abort(t.Context(), layerRef(d)), w.Close()); err != nil {
				t.Fatal(err)
			}
		}, true},
		"commit fails": {func(t *testing.T, _ *Store, w *Session) {
			t.Helper()
			if _, err := w.Commit(t.Context(), 200, 200, d, nil); err == nil {
				t.Fatal("commit of another size: no error")
			}
		}, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := &fakeObserver{}
			s := newStore(t, t.TempDir(), Options{Observer: o})
			w := open(t, s, layerRef(d), 300)
			mustWrite(t, w, 0, data[:200], 200)
			g := o.follower(t, 0)
			verified := make(chan error, 1)
			go func() { verified <- g.Verified(t.Context()) }()
			tt.end(t, s, w)
			wantErr(t, <-verified, errdefs.ErrAborted)
			_, err := g.ReadAt(t.Context(), make([]byte, 1), 200)
			wantErr(t, err, errdefs.ErrAborted)
			if n, err := g.ReadAt(t.Context(), make([]byte, 300), 0); (n == 200) != tt.readable || (err == nil) != tt.readable {
				t.Fatalf("reading what was there: %d, %v", n, err)
			}
		})
	}
}

// A new session, or a truncation, has its own Growing.
func TestGrowingAgain(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Observer: o})
	w := open(t, s, layerRef(d), 300)
	mustWrite(t, w, 0, data[:100], 100)
	mustWrite(t, w, 0, data[:200], 200)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = open(t, s, layerRef(d), 300)
	mustStatus(t, w, 200)
	mustWrite(t, w, 200, data[200:], 300)
	g := o.follower(t, 2)
	all := readAll(t.Context(), g)
	mustCommit(t, w, 300, 300, d)
	if got := <-all; !bytes.Equal(got, data) {
		t.Fatalf("the last follower read %d bytes, wanted the blob's 300", len(got))
	}
	if got := o.seen(); len(got) != 4 {
		t.Fatalf("events %q, wanted three ingests and a commit", got)
	}
}

func TestGrowingWaitEndsWithContext(t *testing.T) {
	t.Parallel()
	_, d := randomBytes(t, 300)
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Observer: o})
	w := open(t, s, layerRef(d), 300)
	mustWrite(t, w, 0, []byte("x"), 1)
	g := o.follower(t, 0)
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errLeft)
	_, err := g.ReadAt(ctx, make([]byte, 1), 1)
	wantErr(t, err, errLeft)
	wantErr(t, g.Verified(ctx), errLeft)
	_, err = g.ReadAt(ctx, make([]byte, 1), -1)
	wantErr(t, err, errdefs.ErrInvalidArgument)
}

// Committed as something else than the ref says: that is no verification.
func TestGrowingOfAnotherBlob(t *testing.T) {
	t.Parallel()
	data, _ := randomBytes(t, 300)
	o := &fakeObserver{}
	s := newStore(t, t.TempDir(), Options{Observer: o})
	w := open(t, s, layerRef(digest.FromString("other")), 300)
	mustWrite(t, w, 0, data, 300)
	g := o.follower(t, 0)
	mustCommit(t, w, 300, 300, digest.FromBytes(data))
	wantErr(t, g.Verified(t.Context()), errdefs.ErrAborted)
}
