package transfer

import (
	"errors"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFullDisk(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
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
