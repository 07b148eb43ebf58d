package transfer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

func joinDiscarding(t testing.TB, m *Manager, b Blob, srcs ...Source) *Handle {
	t.Helper()
	h, err := m.JoinDiscarding(t.Context(), "", b, srcs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

// unpackAll reads as an unpack does: in order, saying what it needs no more.
func unpackAll(t testing.TB, h *Handle) []byte {
	t.Helper()
	var out []byte
	buf := make([]byte, 100<<10)
	for {
		n, err := h.ReadAt(t.Context(), buf, int64(len(out)))
		out = append(out, buf[:n]...)
		h.Discard(int64(len(out)))
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// onDisk is how many bytes the data file takes on disk.
func onDisk(t testing.TB, h *Handle) int64 {
	t.Helper()
	h.job.mu.Lock()
	f := h.job.folder
	h.job.mu.Unlock()
	if f == nil {
		return 0
	}
	st, err := f.data.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return st.Sys().(*syscall.Stat_t).Blocks * 512
}

// gone is up to where bytes were given up.
func (h *Handle) gone() int64 {
	h.job.mu.Lock()
	defer h.job.mu.Unlock()
	return h.job.discard.gone
}

func wantSums(t testing.TB, h *Handle, data []byte) {
	t.Helper()
	sums, err := h.Discarded(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(sums)) != chunks(int64(len(data))) {
		t.Fatalf("%d checksums, want %d", len(sums), chunks(int64(len(data))))
	}
	for i, sum := range sums {
		p := data[i*DiscardChunk : min((i+1)*DiscardChunk, len(data))]
		if sum != sha256.Sum256(p) {
			t.Fatalf("checksum %d is wrong", i)
		}
	}
}

func wantEmpty(t testing.TB, folder string) {
	t.Helper()
	left, err := os.ReadDir(folder)
	if len(left) > 0 || err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("%s has %v, %v; want nothing", folder, left, err)
	}
}

func TestDiscard(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(60, 24<<20+123)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20})
	client := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data})
	unpack := join(t, m, b)
	if got := unpackAll(t, unpack); !bytes.Equal(got, data) {
		t.Fatal("other bytes were read")
	}
	eventually(t, "the last chunk is given up", func() bool { return unpack.gone() == b.Size })
	eventually(t, "the file is punched", func() bool { return onDisk(t, unpack) <= 64<<10 })
	wait(t, client)
	if err := client.LinkTo(filepath.Join(root, "link")); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("link: %v", err)
	}
	if err := client.Keep(); !errors.Is(err, ErrDiscarded) {
		t.Errorf("keep: %v", err)
	}
	wantSums(t, client, data)
	if _, err := client.ReadAt(t.Context(), make([]byte, 1), 0); !errors.Is(err, ErrDiscarded) {
		t.Errorf("a read of what is gone: %v", err)
	}
	_, _ = unpack.Close(), client.Close()
	eventually(t, "the folder is removed", func() bool {
		left, err := filepath.Glob(filepath.Join(root, discardRoot, "*", "*"))
		return err == nil && len(left) == 0
	})
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, filepath.Join(root, discardRoot))
	wantEmpty(t, filepath.Join(root, locksName))
	if _, err := os.Stat(folderPath(root, plainName(b))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something is left where other processes look: %v", err)
	}
}

// Bytes are given up only behind all who read, whether they discard or not.
func TestDiscardWaitsForAllReaders(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(61, 32<<20)
	m := newManager(t, t.TempDir(), Options{ChunkSize: 4 << 20})
	client := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data})
	wait(t, client)
	one, other := join(t, m, b), join(t, m, b)
	if _, err := other.ReadAt(t.Context(), make([]byte, 10), 12<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := one.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
		t.Fatal(err)
	}
	one.Discard(20 << 20)
	if err := sleep(t.Context(), backoffMin); err != nil {
		t.Fatal(err)
	}
	if n := one.gone(); n != 0 {
		t.Fatalf("%d bytes are gone that a reader needs", n)
	}
	other.Discard(8<<20 + 5)
	eventually(t, "what neither needs is given up", func() bool { return one.gone() == 8<<20 })
	if _, err := joinDiscarding(t, m, b).ReadAt(t.Context(), make([]byte, 10), 8<<20-1); !errors.Is(err, ErrDiscarded) {
		t.Fatalf("read of what is gone: %v", err)
	}
	_ = other.Close()
	eventually(t, "more is given up when a reader leaves", func() bool { return one.gone() == 20<<20 })
	p := make([]byte, 1000)
	if n, err := one.ReadAt(t.Context(), p, 20<<20); err != nil || !bytes.Equal(p[:n], data[20<<20:20<<20+n]) {
		t.Fatalf("read of what is there: %v", err)
	}
	_ = one.Close()
	if err := sleep(t.Context(), backoffMin); err != nil {
		t.Fatal(err)
	}
	if n := client.gone(); n != 20<<20 {
		t.Fatalf("%d bytes are gone, want no more without a reader", n)
	}
	wantSums(t, client, data)
}

// What nobody unpacks is kept in full, and durable.
func TestNobodyDiscards(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(62, 3<<20+1)
	root := t.TempDir()
	m := newManager(t, root, Options{})
	h := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data})
	if !h.Discarding() {
		t.Fatal("not discarding")
	}
	wait(t, h)
	if err := h.Keep(); err != nil {
		t.Fatal(err)
	}
	if h.Discarding() {
		t.Error("kept and discarding")
	}
	if _, err := h.Discarded(t.Context()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("discarded what is kept: %v", err)
	}
	h.Discard(b.Size)
	if err := h.LinkTo(filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	_ = h.Close()
	got, err := os.ReadFile(filepath.Join(root, "link"))
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

// What lies on disk already is used, and kept.
func TestDiscardingUsesWhatIsThere(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(63, 4<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20})
	h := join(t, m, b, &fakeSource{host: "a", data: data, reply: stopAfter(2 << 20)})
	if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	there := h.Frontier()
	_ = h.Close()
	src := &fakeSource{host: "a", data: data}
	h = joinDiscarding(t, m, b, src)
	wait(t, h)
	if _, sent := src.stats(); h.Discarding() || sent > b.Size-there {
		t.Errorf("discarding: %t, %d bytes fetched, want the %d that were missing", h.Discarding(), sent, b.Size-there)
	}
}

// A failed transfer of which something is gone offers nothing, and the next one starts from nothing.
func TestDiscardedTransferFails(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(64, 12<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
	hold := make(chan struct{})
	h := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data, reply: func(ctx context.Context, n int, off, length int64) (fakeReply, error) {
		if _, err := holdFrom(8<<20, hold)(ctx, n, off, length); err != nil {
			return fakeReply{}, err
		}
		return stopAfter(8<<20)(ctx, n, off, length)
	}})
	unpack := join(t, m, b)
	for off := int64(0); off < 6<<20; {
		n, err := unpack.ReadAt(t.Context(), make([]byte, 1<<20), off)
		if err != nil {
			t.Fatal(err)
		}
		off += int64(n)
		unpack.Discard(off)
	}
	eventually(t, "something is gone", func() bool { return h.gone() >= 4<<20 })
	close(hold)
	if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	out, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if n, err := h.CloneTo(t.Context(), out, 0); n != 0 || err != nil {
		t.Errorf("cloned %d bytes, %v; want none", n, err)
	}
	src := &fakeSource{host: "a", data: data}
	again := joinDiscarding(t, m, b, src) // while the failed one is still held
	if got := unpackAll(t, again); !bytes.Equal(got, data) {
		t.Error("other bytes were read")
	}
	if _, sent := src.stats(); sent != b.Size {
		t.Errorf("%d bytes fetched, want all %d", sent, b.Size)
	}
	wait(t, again)
	wantSums(t, again, data)
}

// What was given up may be needed after all: the layer was bad. Whoever comes then starts anew.
func TestAbandonedTransferIsNotJoined(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(65, 2<<20)
	m := newManager(t, t.TempDir(), Options{})
	h := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data})
	unpackAll(t, h)
	eventually(t, "all is gone", func() bool { return h.gone() == b.Size })
	h.Abandon()
	src := &fakeSource{host: "a", data: data}
	next := joinDiscarding(t, m, b, src)
	if got := unpackAll(t, next); !bytes.Equal(got, data) {
		t.Error("other bytes were read")
	}
	if _, sent := src.stats(); sent != b.Size {
		t.Errorf("%d bytes fetched, want %d", sent, b.Size)
	}
}

// After a mismatch all is fetched again and kept: readers are told, and never see a hole.
func TestDiscardingEndsWithAMismatch(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(66, 6<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20})
	h := joinDiscarding(t, m, b, newFlipper("a", data, map[int64]func(int) byte{b.Size - 9: times(1)}))
	unpack := join(t, m, b)
	var got []byte
	buf := make([]byte, 64<<10)
	restarts := 0
	for {
		n, err := unpack.ReadAt(t.Context(), buf, int64(len(got)))
		got = append(got, buf[:n]...)
		unpack.Discard(int64(len(got)))
		if errors.Is(err, ErrRestarted) {
			got, restarts = nil, restarts+1
			continue
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, data) || restarts == 0 {
		t.Fatalf("%d bytes after %d restarts are others", len(got), restarts)
	}
	wait(t, h)
	if h.Discarding() {
		t.Error("still discarding")
	}
	if err := h.LinkTo(filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(root, "link")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("the linked file is another: %v", err)
	}
}

// holdFrom does not answer requests from off on until hold is closed.
func holdFrom(off int64, hold <-chan struct{}) func(context.Context, int, int64, int64) (fakeReply, error) {
	return func(ctx context.Context, _ int, at, _ int64) (fakeReply, error) {
		if at >= off {
			select {
			case <-hold:
			case <-ctx.Done():
			}
		}
		return fakeReply{}, nil
	}
}

// What a killed process left is of no use to anybody, what a living one has is not touched.
func TestSweepOfDiscarding(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(67, 4<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20})
	hold := make(chan struct{})
	h := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data, reply: holdFrom(3<<20, hold)})
	eventually(t, "bytes", func() bool { return h.Frontier() >= 1<<20 })
	crashed := copyRoot(t, root)
	if err := newManager(t, root, Options{}).Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(root, discardRoot, "*", "*", "sha256-*", dataName)); err != nil || len(left) != 1 {
		t.Errorf("a living process has %v, %v", left, err)
	}
	close(hold)

	after := newManager(t, crashed, Options{})
	if err := after.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, filepath.Join(crashed, discardRoot))
	wantEmpty(t, filepath.Join(crashed, locksName))
	fresh := &fakeSource{host: "a", data: data}
	next := joinDiscarding(t, after, b, fresh)
	if got := unpackAll(t, next); !bytes.Equal(got, data) {
		t.Error("other bytes were read")
	}
	if _, sent := fresh.stats(); sent != b.Size {
		t.Errorf("%d bytes fetched after the crash, want all %d", sent, b.Size)
	}
	wait(t, h)
}

// Another process fetches for itself: it must not follow what has holes.
func TestNobodyFollowsDiscarding(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(68, 4<<20)
	root := t.TempDir()
	m, other := newManager(t, root, Options{ChunkSize: 1 << 20}), newManager(t, root, Options{})
	hold := make(chan struct{})
	h := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data, reply: holdFrom(3<<20, hold)})
	eventually(t, "bytes", func() bool { return h.Frontier() >= 1<<20 })
	src := &fakeSource{host: "a", data: data}
	wait(t, join(t, other, b, src))
	if _, sent := src.stats(); sent != b.Size {
		t.Errorf("the other process fetched %d bytes, want %d", sent, b.Size)
	}
	close(hold)
	wait(t, h)
}

// What nobody has read yet is not far behind what is fetched: it would be written to disk after all.
func TestDiscardingDoesNotRunAhead(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(69, 24<<20)
	m := newManager(t, t.TempDir(), Options{ChunkSize: 256 << 10, ConnectionsPerHost: 2})
	hold := make(chan struct{})
	h := joinDiscarding(t, m, b, &fakeSource{host: "a", data: data, reply: holdFrom(1<<20, hold)})
	if _, err := h.ReadAt(t.Context(), make([]byte, 10), 0); err != nil {
		t.Fatal(err)
	}
	h.Discard(1)
	close(hold)
	h.job.mu.Lock()
	most := h.job.runAhead() + 1<<20
	h.job.mu.Unlock()
	eventually(t, "it runs ahead", func() bool { return h.Frontier() >= most/2 })
	if err := sleep(t.Context(), backoffMax/10); err != nil {
		t.Fatal(err)
	}
	if n := h.Frontier(); n > most {
		t.Errorf("%d bytes are fetched that nobody has read, want at most %d", n, most)
	}
	if got := unpackAll(t, h); !bytes.Equal(got, data) {
		t.Error("other bytes were read")
	}
}

// However the bytes come, each chunk has its own checksum.
func TestChunkSums(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, DiscardChunk - 1, DiscardChunk, DiscardChunk + 1, 2*DiscardChunk + 77} {
		for _, piece := range []int{100_003, DiscardChunk, 3 * DiscardChunk} {
			data, _ := randomBlob(70, size)
			c := newChunkSums(int64(size), sha256.New())
			for p := range slices.Chunk(data, piece) {
				c.add(p)
			}
			if int64(len(c.sums)) != chunks(int64(size)) {
				t.Fatalf("%d bytes by %d: %d checksums, want %d", size, piece, len(c.sums), chunks(int64(size)))
			}
			for i, sum := range c.sums {
				if sum != sha256.Sum256(data[i*DiscardChunk:min((i+1)*DiscardChunk, size)]) {
					t.Errorf("%d bytes by %d: checksum %d is wrong", size, piece, i)
				}
			}
		}
	}
}

// A file that was closed meanwhile is no file system that cannot punch holes.
func TestPunchOfAClosedFile(t *testing.T) {
	t.Parallel()
	f, err := os.Create(filepath.Join(t.TempDir(), "data"))
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := punchHole(f, 0, 4096); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v, want os.ErrClosed", err)
	}
}
