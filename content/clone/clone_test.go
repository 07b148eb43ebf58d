package clone

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// random returns n bytes and a file of them in dir, on disk.
func random(t *testing.T, dir string, n int) ([]byte, *os.File) {
	t.Helper()
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(p)
	f := file(t, dir)
	if _, err := f.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return p, f
}

func file(t *testing.T, dir string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// ranges clones all kinds of ranges from a folder to another and looks at every byte.
func ranges(t *testing.T, from, to string) {
	t.Helper()
	data, src := random(t, from, 3*unit+1000)
	for _, r := range [][2]int64{
		{0, 3*unit + 1000}, {0, 3 * unit}, {0, 1}, {0, 0}, {5, 4}, {unit, 2 * unit}, {1, unit - 1},
		{unit - 1, unit + 1}, {100, 3*unit + 1}, {unit + 7, 3 * unit}, {3 * unit, 3*unit + 1000},
	} {
		t.Run(fmt.Sprint(r), func(t *testing.T) { //nolint:paralleltest // the files are shared
			dst := file(t, to)
			before := bytes.Repeat([]byte{'x'}, int(r[0]))
			if _, err := dst.Write(before); err != nil {
				t.Fatal(err)
			}
			want := max(0, r[1]-r[0])
			if n, err := Range(t.Context(), dst, src, r[0], r[1]); n != want || err != nil {
				t.Fatalf("%d bytes, %v; want %d", n, err, want)
			}
			got, err := os.ReadFile(dst.Name())
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, append(before, data[r[0]:r[0]+want]...)) {
				t.Error("the bytes are others")
			}
		})
	}
}

func TestRange(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ranges(t, dir, dir)
}

// Between file systems of two kinds the kernel refuses to copy.
func TestRangeToAnotherFileSystem(t *testing.T) {
	t.Parallel()
	memory, err := os.MkdirTemp("/dev/shm", "clone-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(memory) })
	ranges(t, t.TempDir(), memory)
}

// What is said to be there after an error is there.
func TestRangeOfTooLittle(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	data, src := random(t, dir, unit/2)
	dst := file(t, dir)
	n, err := Range(t.Context(), dst, src, 10, unit/2+1)
	if n != unit/2-10 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Fatalf("%d bytes, %v; want %d and an unexpected end", n, err, unit/2-10)
	}
	got, err := os.ReadFile(dst.Name())
	if err != nil || !bytes.Equal(got[10:10+n], data[10:]) {
		t.Errorf("%d other bytes, %v", len(got), err)
	}
}

func TestRangeEndsWithItsContext(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, src := random(t, dir, 1000)
	gone := errors.New("gone")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if n, err := Range(ctx, file(t, dir), src, 0, 1000); n != 0 || !errors.Is(err, gone) {
		t.Errorf("%d bytes, %v; want none and the reason", n, err)
	}
}

func TestRangeOfAClosedFile(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	_, src := random(t, dir, unit)
	if err := src.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := Range(t.Context(), file(t, dir), src, 0, unit); n != 0 || !errors.Is(err, os.ErrClosed) {
		t.Errorf("%d bytes, %v; want none, closed", n, err)
	}
}
