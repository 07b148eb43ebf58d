package check

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	digest "github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestHash(t *testing.T) {
	t.Parallel()
	// On a disk and, where direct reads may be refused, on tmpfs.
	for _, dir := range []string{t.TempDir(), tmpfs(t)} {
		for _, size := range []int{0, 1, 511, 512, align, align + 1, readStep - 1, readStep, readStep + 1, 3*readStep + 777} {
			data := bytes.Repeat([]byte("gantry!"), size/7+1)[:size]
			path := filepath.Join(dir, "f")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			var n int64
			got, fi, err := Hash(t.Context(), path, digest.SHA256, func(m int64) { n += m })
			if err != nil || got != digest.FromBytes(data) || n != int64(size) || fi.Size() != n {
				t.Errorf("%d bytes in %s: %s, %d read, %v", size, dir, got, n, err)
			}
		}
	}
}

func tmpfs(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "gantry-check")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestHashFails(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, make([]byte, 5*readStep), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	if _, _, err := Hash(ctx, path, digest.SHA256, func(int64) { cancel(stop) }); !errors.Is(err, stop) {
		t.Errorf("cancelled: %v", err)
	}
	link := path + "2"
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Hash(t.Context(), link, digest.SHA256, func(int64) {}); !errors.Is(err, unix.ELOOP) {
		t.Errorf("a symlink: %v", err)
	}
}

// A check of more than fits must not drive out what is in the page cache, nor leave itself there.
func TestHashLeavesNoPages(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "f")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(bytes.Repeat([]byte{7}, 8*readStep)); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Hash(t.Context(), path, digest.SHA256, func(int64) {}); err != nil {
		t.Fatal(err)
	}
	m, err := unix.Mmap(int(f.Fd()), 0, 8*readStep, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(m) }()
	vec := make([]byte, len(m)/os.Getpagesize())
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, addr(m), uintptr(len(m)), addr(vec)); errno != 0 {
		t.Fatal(errno)
	}
	resident := 0
	for _, v := range vec {
		resident += int(v & 1)
	}
	if resident > len(vec)/100 {
		t.Errorf("%d of %d pages are in memory afterwards", resident, len(vec))
	}
}

func addr(p []byte) uintptr { return uintptr(unsafe.Pointer(&p[0])) }
