package transfer

import (
	"bytes"
	"context"
	_ "crypto/sha512"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestTransferSizes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name     string
		size     int
		requests int
	}{
		{"empty", 0, 0},
		{"one byte", 1, 1},
		{"a block", blockSize, 1},
		{"a block and a byte", blockSize + 1, 1},
		{"a chunk", 1 << 20, 1},
		{"many chunks", 9<<20 + 12345, 10},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(1, tc.size)
			src := &fakeSource{host: "a", data: data}
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
			h := join(t, m, b, src)
			got, err := readAll(t, h)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("read %d bytes, %v; want %d", len(got), err, len(data))
			}
			wait(t, h)
			if calls, sent := src.stats(); calls != tc.requests || sent != int64(tc.size) {
				t.Errorf("%d requests and %d bytes, want %d and %d", calls, sent, tc.requests, tc.size)
			}
			if f := h.Frontier(); f != int64(tc.size) {
				t.Errorf("frontier %d, want %d", f, tc.size)
			}
		})
	}
}

func TestParallelInOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) { // in real time a busy machine holds the second chunk until it is taken over
		data, b := randomBlob(2, 40<<20)
		release := make(chan struct{})
		src := &fakeSource{host: "a", data: data}
		src.reply = func(ctx context.Context, _ int, off, _ int64) (fakeReply, error) {
			if off == 1<<20 { // the second chunk comes last
				select {
				case <-release:
				case <-ctx.Done():
				}
			}
			return fakeReply{}, nil
		}
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 4})
		h := join(t, m, b, src)
		// The others run ahead of the frontier by 4 × 4 chunks and stop there.
		eventually(t, "run ahead", func() bool {
			return h.Frontier() == 1<<20 && m.List()[0].Received == 16<<20
		})
		buf := make([]byte, 2<<20)
		if n, err := h.ReadAt(t.Context(), buf, 0); err != nil || n != 1<<20 || !bytes.Equal(buf[:n], data[:n]) {
			t.Errorf("read %d, %v; want the first chunk", n, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if n, err := h.ReadAt(ctx, buf, 1<<20); n != 0 || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("read at the frontier: %d, %v; want it to wait", n, err)
		}
		close(release)
		wait(t, h)
		if calls, sent := src.stats(); calls != 40 || sent != b.Size || src.maxOpen > 4 {
			t.Errorf("%d requests, %d bytes, %d at once", calls, sent, src.maxOpen)
		}
	})
}

func TestCoalescing(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(3, 10<<20)
	src := &fakeSource{host: "a", data: data}
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
	var wg sync.WaitGroup
	for range 32 {
		h := join(t, m, b, src)
		wg.Go(func() {
			got, err := readAll(t, h)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
			if err := h.Wait(t.Context()); err != nil {
				t.Error(err)
			}
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if _, sent := src.stats(); sent != b.Size {
		t.Errorf("sent %d bytes, want %d", sent, b.Size)
	}
	// Once more when it is complete and nobody holds it.
	again := join(t, m, b)
	wait(t, again)
	if _, sent := src.stats(); sent != b.Size {
		t.Errorf("sent %d bytes, want %d", sent, b.Size)
	}
}

func TestHostLimitIsSharedAndFair(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		big, bb := randomBlob(4, 64<<20)
		small, sb := randomBlob(5, 1<<20)
		var mu sync.Mutex
		open, most := 0, 0
		count := func(d int) {
			mu.Lock()
			defer mu.Unlock()
			open += d
			most = max(most, open)
		}
		slow := func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{latency: 10 * time.Millisecond}, nil
		}
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 4})
		hb := join(t, m, bb, &fakeSource{host: "a", data: big, reply: slow, inFlight: count})
		time.Sleep(time.Second)
		hs := join(t, m, sb, &fakeSource{host: "a", data: small, reply: slow, inFlight: count})
		wait(t, hs)
		if hb.Frontier() > bb.Size/2 {
			t.Errorf("the small blob waited until %d of %d of the large one were there", hb.Frontier(), bb.Size)
		}
		wait(t, hb)
		if most != 4 {
			t.Errorf("%d connections at once, want 4", most)
		}
	})
}

// TestBusyHost has connections to spare for one worker only; the others must not hold up the end.
func TestBusyHost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		busy, bb := randomBlob(4, 3<<20)
		data, b := randomBlob(5, 8<<20)
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 4})
		slow := func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{latency: 10 * time.Second}, nil
		}
		join(t, m, bb, &fakeSource{host: "a", data: busy, reply: slow})
		time.Sleep(15 * time.Second)
		start := time.Now()
		wait(t, join(t, m, b, &fakeSource{host: "a", data: data}))
		if took := time.Since(start); took > time.Second {
			t.Errorf("took %s beside a busy transfer", took)
		}
	})
}

func TestRunningLimit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(4, 1<<20)
		other, ob := randomBlob(5, 1<<20)
		slow := func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{latency: time.Second}, nil
		}
		src := &fakeSource{host: "b", data: other}
		m := newManager(t, t.TempDir(), Options{MaxTransfers: 1})
		first := join(t, m, b, &fakeSource{host: "a", data: data, reply: slow})
		time.Sleep(time.Second)
		second := join(t, m, ob, src)
		time.Sleep(10 * time.Second) // longer than FirstContact
		if calls, _ := src.stats(); calls != 0 {
			t.Errorf("the second transfer runs beside the first: %d requests", calls)
		}
		wait(t, first)
		wait(t, second)
	})
}

func TestWaiters(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(6, 32<<20)
		slow := func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{latency: time.Second}, nil
		}
		src := &fakeSource{host: "a", data: data, reply: slow}
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 8, Grace: 30 * time.Second})
		first, second := join(t, m, b, src), join(t, m, b, src)
		time.Sleep(5 * time.Second)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := first.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("wait with a deadline: %v", err)
		}
		for range 2 {
			if err := first.Close(); err != nil {
				t.Error(err)
			}
		}
		if _, err := first.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
			t.Errorf("read after close: %v", err)
		}
		if l := m.List(); len(l) != 1 || l[0].Waiters != 1 || l[0].Phase != PhaseFetching || l[0].Rate < 1<<17 {
			t.Errorf("list: %+v", l)
		}
		_ = second.Close()
		time.Sleep(20 * time.Second) // within grace: the same transfer
		third := join(t, m, b, src)
		if third.job != first.job {
			t.Error("the transfer was not joined within its grace")
		}
		_ = third.Close()
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if l := m.List(); len(l) != 1 || l[0].Phase != PhaseFailed || !errors.Is(l[0].Err, errAbandoned) {
			t.Errorf("list after the grace: %+v", l)
		}
		_, before := src.stats()
		src.reply = nil
		wait(t, join(t, m, b, src))
		if _, sent := src.stats(); sent > b.Size+8*64<<10 || before == 0 {
			t.Errorf("sent %d bytes for %d, %d before the stop", sent, b.Size, before)
		}
	})
}

func TestTwoManagers(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	data, b := randomBlob(7, 20<<20)
	one, two := &fakeSource{host: "a", data: data}, &fakeSource{host: "a", data: data}
	started, release := make(chan struct{}), make(chan struct{})
	one.reply = func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
		if call == 1 {
			close(started)
			<-release
		}
		return fakeReply{}, nil
	}
	m1 := newManager(t, root, Options{ChunkSize: 1 << 20})
	m2 := newManager(t, root, Options{ChunkSize: 1 << 20})
	h1 := join(t, m1, b, one)
	<-started
	h2 := join(t, m2, b, two)
	eventually(t, "waiting for the lock", func() bool { return m2.List()[0].Phase == PhaseLock })
	close(release)
	wait(t, h1)
	wait(t, h2)
	got, err := readAll(t, h2)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("second manager read %d bytes, %v", len(got), err)
	}
	if _, sent := two.stats(); sent != 0 {
		t.Errorf("the second manager fetched %d bytes", sent)
	}
	// In use by both: nobody removes it.
	if err := m1.Forget(b.Digest); err != nil {
		t.Fatal(err)
	}
	if err := h2.LinkTo(filepath.Join(root, "linked")); err != nil {
		t.Fatal(err)
	}
}

func TestTakeover(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	data, b := randomBlob(8, 20<<20)
	one := &fakeSource{host: "a", data: data}
	one.reply = func(_ context.Context, _ int, off, _ int64) (fakeReply, error) {
		return fakeReply{cut: (1 << 20) - (off>>20)*1000, stall: true}, nil // never comes to an end
	}
	m1 := newManager(t, root, Options{ChunkSize: 1 << 20})
	m2 := newManager(t, root, Options{ChunkSize: 1 << 20})
	h1 := join(t, m1, b, one)
	eventually(t, "half of it", func() bool { return m1.List()[0].Received > 4<<20 })
	two := &fakeSource{host: "a", data: data}
	h2 := join(t, m2, b, two)
	if err := m1.Close(); err != nil {
		t.Fatal(err)
	}
	if err := h1.Wait(t.Context()); !errors.Is(err, errClosed) {
		t.Errorf("first: %v", err)
	}
	wait(t, h2)
	_, sent1 := one.stats()
	_, sent2 := two.stats()
	if sent1+sent2 > b.Size+8*64<<10 { // what was read and not yet stored
		t.Errorf("sent %d + %d bytes, want %d", sent1, sent2, b.Size)
	}
}

func TestOtherSizeDoesNotBind(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(9, 3<<20)
	liar := &fakeSource{host: "a", data: append(bytes.Clone(data), 0)}
	hang := make(chan struct{})
	liar.reply = func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
		select {
		case <-hang:
		case <-ctx.Done():
		}
		return fakeReply{}, errdefs.ErrFailedPrecondition
	}
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
	wrong := join(t, m, Blob{Digest: b.Digest, Size: b.Size + 1}, liar)
	eventually(t, "folder of the wrong size", func() bool {
		_, ok := peekSize(filepath.Join(m.root, "sha256-"+b.Digest.Encoded(), stateName))
		return ok
	})
	right := join(t, m, b, &fakeSource{host: "a", data: data})
	wait(t, right)
	close(hang)
	if err := wrong.Wait(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("wrong size: %v", err)
	}
	_ = wrong.Close()
	_ = right.Close()
	if err := m.Forget(b.Digest); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(m.root, "sha256-*"))
	if err != nil || len(left) != 0 {
		t.Errorf("left after Forget: %v %v", left, err)
	}
	locks, err := os.ReadDir(filepath.Join(m.root, locksName))
	if err != nil || len(locks) != 0 {
		t.Errorf("locks left after Forget: %v %v", locks, err)
	}
}

func TestLinkTo(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(10, 2<<20)
	hold := make(chan struct{})
	src := &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
		<-hold
		return fakeReply{}, nil
	}}
	m := newManager(t, t.TempDir(), Options{})
	h := join(t, m, b, src)
	path := filepath.Join(t.TempDir(), "blob")
	if err := h.LinkTo(path); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("link before the end: %v", err)
	}
	close(hold)
	wait(t, h)
	for range 2 { // the second finds it there
		if err := h.LinkTo(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := h.LinkTo(filepath.Join(t.TempDir(), "no", "such", "folder")); err == nil {
		t.Error("link into nowhere succeeded")
	}
	_ = h.Close()
	if err := m.Forget(b.Digest); err != nil { // somebody links it: stays
		t.Fatal(err)
	}
	wait(t, join(t, m, b))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	path2 := path + "2"
	h = join(t, m, b)
	wait(t, h)
	if err := errors.Join(h.LinkTo(path2), os.RemoveAll(filepath.Dir(dataPath(m, b)))); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path2)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("the link reads %d bytes, %v", len(got), err)
	}
	if st, err := os.Stat(path2); err != nil || st.Mode().Perm() != 0o444 {
		t.Errorf("mode %v, %v; want 0444", st.Mode(), err)
	}
}

func TestSweep(t *testing.T) {
	t.Parallel()
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, KeepPartial: time.Hour, Grace: time.Nanosecond})
	finish := func(seed byte) (*Handle, Blob) {
		data, b := randomBlob(seed, 1<<20)
		h := join(t, m, b, &fakeSource{host: "a", data: data})
		wait(t, h)
		return h, b
	}
	used, usedBlob := finish(1)
	linked, linkedBlob := finish(2)
	unused, unusedBlob := finish(3)
	young, youngBlob := finish(4)
	if err := linked.LinkTo(filepath.Join(t.TempDir(), "x")); err != nil {
		t.Fatal(err)
	}
	data, partialBlob := randomBlob(5, 2<<20)
	partial := join(t, m, partialBlob, &fakeSource{host: "a", data: data, reply: func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
		if call > 1 {
			return fakeReply{}, errdefs.ErrNotFound
		}
		return fakeReply{cut: 1 << 19}, nil
	}})
	if err := partial.Wait(t.Context()); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	for _, h := range []*Handle{linked, unused, young, partial} {
		_ = h.Close()
	}
	old := time.Now().Add(-2 * time.Hour)
	for _, b := range []Blob{usedBlob, linkedBlob, unusedBlob, partialBlob} {
		dir := filepath.Dir(dataPath(m, b))
		if err := errors.Join(os.Chtimes(filepath.Join(dir, dataName), old, old), os.Chtimes(filepath.Join(dir, stateName), old, old)); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		b    Blob
		want bool
	}{{"used", usedBlob, true}, {"linked", linkedBlob, true}, {"young", youngBlob, true}, {"unused", unusedBlob, false}, {"partial", partialBlob, false}} {
		_, err := os.Stat(dataPath(m, tc.b))
		if got := err == nil; got != tc.want {
			t.Errorf("%s: there = %v, want %v", tc.name, got, tc.want)
		}
	}
	_ = used.Close()
}

func TestJoinRefuses(t *testing.T) {
	t.Parallel()
	m := newManager(t, t.TempDir(), Options{})
	_, b := randomBlob(1, 10)
	for name, bad := range map[string]Blob{
		"no digest":     {Size: 1},
		"negative size": {Digest: b.Digest, Size: -1},
		"huge size":     {Digest: b.Digest, Size: maxBlobSize + 1},
		"sha512":        {Digest: digest.SHA512.FromString("x"), Size: 1},
	} {
		if _, err := m.Join(t.Context(), "", bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := New(t.TempDir(), Options{GiveUp: -1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("negative option: %v", err)
	}
	h := join(t, m, b)
	if err := h.Wait(t.Context()); !errdefs.IsNotFound(err) {
		t.Errorf("without a source: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Join(t.Context(), "", b); !errors.Is(err, errClosed) {
		t.Errorf("after close: %v", err)
	}
}
