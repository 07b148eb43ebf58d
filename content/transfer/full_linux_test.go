package transfer

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// smallDisk is a folder with so much room, "2m" for instance.
func smallDisk(t *testing.T, size string) string {
	t.Helper()
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size="+size); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return root
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	root := smallDisk(t, "2m")
	data, b := randomBlob(6, 4<<20)
	src := &fakeSource{host: "a", data: data}
	m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
	h := join(t, m, b, src)
	err := h.Wait(t.Context())
	if !errors.Is(err, syscall.ENOSPC) || !strings.Contains(err.Error(), "is full, free some space") || strings.Count(err.Error(), "sha256") != 1 {
		t.Fatalf("got %v, want ENOSPC said plainly, and the blob once", err)
	}
	if h.Frontier() < 1<<20 {
		t.Errorf("frontier %d", h.Frontier())
	}
	if err := unix.Mount("tmpfs", root, "tmpfs", unix.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	_, before := src.stats()
	again := join(t, m, b, src)
	wait(t, again)
	if _, sent := src.stats(); sent-before >= b.Size {
		t.Errorf("fetched everything again: %d", sent-before)
	}
	if err := again.LinkTo(filepath.Join(t.TempDir(), "x")); !errors.Is(err, syscall.EXDEV) {
		t.Errorf("link to another file system: %v", err)
	}
	_ = again.Close()
	_ = h.Close()
}

// TestFullDiskMakesRoom: of partial transfers that nobody uses, the oldest goes when another one needs its place; neither one
// that was written a moment ago nor one in use does.
func TestFullDiskMakesRoom(t *testing.T) {
	t.Parallel()
	root := smallDisk(t, "10m")
	m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 2})
	partial := func(seed byte, idle time.Duration) (folder string) {
		data, b := randomBlob(seed, 4<<20)
		gate := newGate(3 << 20)
		before := newManager(t, root, lockOptions)
		h := join(t, before, b, &fakeSource{host: "a", data: data, reply: gate.reply})
		frontierOf(t, h, 3<<20)
		if err := errors.Join(h.Close(), before.Close()); err != nil {
			t.Fatal(err)
		}
		folder = folderPath(root, plainName(b))
		when := time.Now().Add(-idle)
		for _, n := range []string{dataName, stateName} {
			if err := os.Chtimes(filepath.Join(folder, n), when, when); err != nil {
				t.Fatal(err)
			}
		}
		return folder
	}
	oldest, older, young := partial(11, 2*time.Hour), partial(12, time.Hour), partial(13, 0)
	data, b := randomBlob(14, 3<<20)
	h := join(t, m, b, &fakeSource{host: "a", data: data})
	wait(t, h)
	for folder, want := range map[string]bool{oldest: false, older: true, young: true} {
		if _, err := os.Lstat(folder); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", folder, err == nil, want)
		}
	}
	data, b = randomBlob(15, 7<<20)
	if err := join(t, m, b, &fakeSource{host: "a", data: data}).Wait(t.Context()); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v, want ENOSPC: what is left is in use, or was written a moment ago", err)
	}
	for folder, want := range map[string]bool{older: false, young: true} {
		if _, err := os.Lstat(folder); (err == nil) != want {
			t.Errorf("%s is there: %v, want %v", folder, err == nil, want)
		}
	}
}

// TestFullDiskWhileCopying: what a private folder could not get all of does not keep the disk full.
func TestFullDiskWhileCopying(t *testing.T) {
	t.Parallel()
	root := smallDisk(t, "3m")
	data, b := randomBlob(7, 4<<20)
	gate := newGate(2 << 20)
	m1 := newManager(t, root, lockOptions)
	h1 := join(t, m1, b, &fakeSource{host: "a", data: data, reply: gate.reply})
	frontierOf(t, h1, 2<<20)
	m2 := newManager(t, root, stuckAfter(200*time.Millisecond))
	h2 := join(t, m2, b, &fakeSource{host: "a", data: data})
	if err := h2.Wait(t.Context()); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v, want ENOSPC", err)
	}
	if _, err := os.Lstat(folderPath(root, privateName(b, 1))); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the private folder: %v", err)
	}
	_, _ = h2.Close(), h1.Close()
	_, _ = m2.Close(), m1.Close()
}
