package transfer

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// asked is a context that calls f when it is first asked whether it has ended.
type asked struct {
	context.Context //nolint:containedctx // it is one
	f               func()
}

func (a *asked) Err() error {
	if f := a.f; f != nil {
		a.f = nil
		f()
	}
	return a.Context.Err()
}

// TestCloneOfWhatBeginsAnew has the transfer throw its bytes away while they are handed out.
func TestCloneOfWhatBeginsAnew(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(*job) error{
		"from nothing": func(j *job) error { return j.restart("") },
		"dropped": func(j *job) error {
			if err := j.giveUp([]error{errMismatch}); !errdefs.IsDataLoss(err) {
				return err
			}
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(6, 2<<20)
			src := &fakeSource{host: "a", data: data}
			src.reply = func(_ context.Context, _ int, off, n int64) (fakeReply, error) {
				if off >= 1<<20 {
					return fakeReply{}, errdefs.ErrPermissionDenied
				}
				return fakeReply{off: off, n: n}, nil
			}
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
			h := join(t, m, b, src)
			if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
				t.Fatal(err)
			}
			f, err := os.Create(filepath.Join(t.TempDir(), "clone"))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			ctx := &asked{t.Context(), func() {
				if err := between(h.job); err != nil {
					t.Error(err)
				}
			}}
			// An odd offset, so that a part is copied also where blocks can be shared.
			if n, err := h.CloneTo(ctx, f, 1); n != 0 || !errors.Is(err, ErrRestarted) {
				t.Errorf("got %d bytes, %v; want none and %v", n, err, ErrRestarted)
			}
			if n, err := h.CloneTo(t.Context(), f, 0); n != 0 || err != nil {
				t.Errorf("then got %d bytes, %v; want none, for there are none", n, err)
			}
		})
	}
}
