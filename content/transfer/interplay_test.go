package transfer

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// TestLateReplyIsNotStored: a host that honoured ranges answers one request with the whole blob, whose stream takes over
// what the others wait for. What they bring after all, wrong bytes here, must not land on what was hashed already.
func TestLateReplyIsNotStored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(31, 4<<20)
		passed, late := make(chan struct{}), make(chan struct{})
		src := &fakeSource{host: "a", data: data}
		asked := make(chan struct{})
		var flipped, streamed atomic.Bool
		src.reply = func(_ context.Context, _ int, off, _ int64) (fakeReply, error) {
			switch {
			case off == 1<<20 && flipped.CompareAndSwap(false, true):
				close(asked)
				return fakeReply{flip: true, flipAt: 100, after: passed, told: late}, nil
			case off == 2<<20 && streamed.CompareAndSwap(false, true):
				<-asked
				return fakeReply{whole: true, pauseAt: 3 << 20, paused: passed, after: late}, nil
			}
			return fakeReply{}, nil
		}
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 2, Stall: time.Hour, GiveUp: 2 * time.Hour, FirstContact: time.Hour})
		h := join(t, m, b, src)
		complete(t, h, data)
		if got, err := os.ReadFile(dataPath(m, b)); err != nil || !bytes.Equal(got, data) {
			t.Errorf("the published file is not the blob: %v", err)
		}
		if h.job.currentGeneration() != 0 {
			t.Error("the blob was fetched again")
		}
		_ = h.Close()
		_ = m.Close()
	})
}

// TestRestartFails: readers of bytes that turned out wrong get an error, and do not look at a closed file for ever.
func TestRestartFails(t *testing.T) {
	t.Parallel()
	for name, restart := range map[string]func(*job) error{
		"all":    func(j *job) error { return j.restart("") },
		"blocks": func(j *job) error { return j.again(make([]bool, 4)) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(32, 1<<20)
			m := newManager(t, t.TempDir(), lockOptions)
			j := newJob(m.root, b, lockOptions, m.shared)
			f, err := openFolder(filepath.Join(m.root, folderName(m.root, b)), b, false)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.data.WriteAt(data, 0); err != nil {
				t.Fatal(err)
			}
			j.folder, j.frontier = f, b.Size
			h := &Handle{m: m, job: j}
			if _, err := h.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
				t.Fatal(err)
			}
			// A folder that cannot be made anew.
			if err := os.RemoveAll(f.path); err != nil {
				t.Fatal(err)
			}
			f.path = filepath.Join(m.root, "missing", "folder")
			if err := restart(j); err == nil {
				t.Fatal("no error")
			}
			j.finish(errMismatch)
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := h.ReadAt(ctx, make([]byte, 10), 5)
				done <- err
			}()
			select {
			case err := <-done:
				if !errors.Is(err, ErrRestarted) {
					t.Errorf("read: %v, want ErrRestarted", err)
				}
			case <-ctx.Done():
				h.job.mu.Lock()
				h.closed = true
				h.job.mu.Unlock()
				t.Errorf("the read never ends, but with the handle: %v", <-done)
			}
			if err := errors.Join(j.suspend(), j.retire()); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestAllAreAskedAnew: an inquiry that was broken off leaves no host alone.
func TestAllAreAskedAnew(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(33, 1<<20)
	m := newManager(t, t.TempDir(), lockOptions)
	j := newJob(m.root, b, lockOptions, m.shared)
	j.addSources([]Source{
		&fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{}, errdefs.ErrNotFound
		}},
		&fakeSource{host: "b", data: data},
	})
	j.only = "a"
	hold, err := tryExclusive(m.root, folderName(m.root, b))
	if err != nil {
		t.Fatal(err)
	}
	if err := j.runLocked(t.Context(), hold); err != nil {
		t.Error(err)
	}
	if err := j.retire(); err != nil {
		t.Error(err)
	}
}

// TestFolderOfTheOtherSize: what was fetched beside a folder of another size is used when that one is gone.
func TestFolderOfTheOtherSize(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(34, 3<<20)
	root := t.TempDir()
	m := newManager(t, root, lockOptions)
	wrong := Blob{Digest: b.Digest, Size: b.Size + 1}
	other, err := openFolder(filepath.Join(root, folderName(root, wrong)), wrong, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.closeState(), other.data.Close()); err != nil {
		t.Fatal(err)
	}
	gate := newGate(2 << 20)
	src := &fakeSource{host: "a", data: data, reply: gate.reply}
	h := join(t, m, b, src)
	frontierOf(t, h, 2<<20)
	if err := os.RemoveAll(other.path); err != nil {
		t.Fatal(err)
	}
	_ = m.Close()
	_ = h.Close()
	gate.open(b.Size)
	again := newManager(t, root, lockOptions)
	complete(t, join(t, again, b, src), data)
	if n := sentBy(src); n != b.Size {
		t.Errorf("sent %d bytes, want %d", n, b.Size)
	}
}

// TestForgetInAnyRoot: a root is a path and no pattern.
func TestForgetInAnyRoot(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(35, 1<<20)
	m := newManager(t, filepath.Join(t.TempDir(), "a[b]*"), lockOptions)
	h := join(t, m, b, &fakeSource{host: "a", data: data})
	wait(t, h)
	_ = h.Close()
	if err := m.Forget(b.Digest); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dataPath(m, b)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after Forget: %v", err)
	}
}

// TestLiarsAreForgotten bounds what is kept of hosts.
func TestLiarsAreForgotten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &shared{liars: map[string]time.Time{}}
		s.caught("a")
		if !s.lied("a") {
			t.Error("a liar is trusted at once")
		}
		time.Sleep(distrust + 1)
		s.caught("b")
		if len(s.liars) != 1 {
			t.Errorf("%d liars, want 1", len(s.liars))
		}
		if s.lied("a") {
			t.Error("a liar is never trusted again")
		}
	})
}
