package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// blockSource hands a stream out in blocks, and sees to it that whoever gets them
// keeps to the rules.
type blockSource struct {
	t     testing.TB
	data  []byte
	sizes func() int
	most  int   // blocks that may be out at once; 0: any number
	err   error // what ends the stream, if not io.EOF

	mu   sync.Mutex
	free *sync.Cond
	out  int
}

func newBlockSource(t testing.TB, data []byte, most int, sizes func() int) *blockSource {
	t.Helper()
	s := &blockSource{t: t, data: data, most: most, sizes: sizes, err: io.EOF}
	s.free = sync.NewCond(&s.mu)
	t.Cleanup(func() {
		if s.out != 0 {
			t.Errorf("%d blocks were never released", s.out)
		}
	})
	return s
}

// Next implements Blocks.
func (s *blockSource) Next() ([]byte, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.most > 0 && s.out >= s.most {
		s.free.Wait()
	}
	if len(s.data) == 0 {
		return nil, nil, s.err
	}
	n := min(s.sizes(), len(s.data))
	b := bytes.Clone(s.data[:n])
	s.data = s.data[n:]
	s.out++
	released := false
	return b, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if released {
			s.t.Error("released twice")
		}
		released = true
		s.out--
		s.free.Signal()
		for i := range b {
			b[i] = 0xa5 // what still looks sees it
		}
	}, nil
}

// Read implements io.Reader; Write must not use it.
func (s *blockSource) Read([]byte) (int, error) {
	return 0, errors.New("read although there are blocks")
}

func upTo(n int, seed uint64) func() int {
	r := rand.New(rand.NewPCG(seed, 1))
	return func() int { return 1 + r.IntN(n) }
}

func always(n int) func() int { return func() int { return n } }

// holedTar has zero pages alone, in runs, at both ends of a page and of the file.
func holedTar() []byte {
	r := rand.New(rand.NewPCG(3, 9))
	var data bytes.Buffer
	for i := range 200 {
		data.Write(make([]byte, []int{0, 1, 511, 4095, 4096, 4097, 8192, 70_000}[i%8]))
		data.Write(randomBytes(r, []int{1, 4096, 3, 5000, 300, 65_536}[i%6]))
	}
	var w rawTar
	w.add(file("holed", data.String()))
	w.add(file("zeros", strings.Repeat("\x00", 300_000)))
	return w.end()
}

// pagesOf counts the pages of data that are not zeros.
func pagesOf(data []byte) (n int64) {
	for ; len(data) > 0; data = data[min(pageSize, len(data)):] {
		if len(bytes.Trim(data[:min(pageSize, len(data))], "\x00")) > 0 {
			n++
		}
	}
	return n
}

func TestWriteBlocks(t *testing.T) {
	t.Parallel()
	tar := holedTar()
	cases := map[string]struct {
		most  int
		sizes func() int
	}{
		"pages":           {0, always(pageSize)},
		"odd":             {0, always(4097)},
		"less than pages": {0, always(1000)},
		"tiny":            {3, upTo(64, 1)},
		"mixed":           {0, upTo(100_000, 2)},
		"one at a time":   {1, upTo(30_000, 3)},
		"two at a time":   {2, always(65_536)},
		"all at once":     {1, always(len(tar))},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCache(t, Options{})
			l, err := c.Write(t.Context(), newBlockSource(t, tar, tc.most, tc.sizes), nil)
			if err != nil {
				t.Fatal(err)
			}
			if want := digest.FromBytes(tar); l.DiffID != want || l.Size != int64(len(tar)) {
				t.Errorf("got %s of %d bytes, want %s of %d", l.DiffID, l.Size, want, len(tar))
			}
			if got, err := os.ReadFile(l.Path); err != nil || !bytes.Equal(got, tar) {
				t.Errorf("the file differs from the stream: %d bytes, %v", len(got), err)
			}
			var st unix.Stat_t
			if err := unix.Stat(l.Path, &st); err != nil {
				t.Fatal(err)
			}
			if used, want := st.Blocks*512/pageSize, pagesOf(tar); used > want+8 {
				t.Errorf("%d pages are on disk, only %d are not zeros", used, want)
			}
			checkNoTemp(t, c)
		})
	}
}

// However many cores there are, the file and the table are the same.
func TestWriteIsTheSameOnAnyCores(t *testing.T) { //nolint:paralleltest // changes GOMAXPROCS
	before := runtime.GOMAXPROCS(0)
	defer runtime.GOMAXPROCS(before)
	tar := append(largeTar(), holedTar()...)
	never := func(string) bool { return false }
	want := describeTree(t, scanBytes(t, tar).root, tar, never)
	for _, n := range []int{1, 2, 4, 8} {
		runtime.GOMAXPROCS(n)
		c := newCache(t, Options{})
		l, err := c.Write(t.Context(), newBlockSource(t, tar, 4, upTo(300_000, uint64(n))), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(l.Path); err != nil || !bytes.Equal(got, tar) || l.DiffID != digest.FromBytes(tar) {
			t.Errorf("GOMAXPROCS %d: the file differs, %v", n, err)
		}
		if d := diff(want, describeTree(t, l.Table.root, tar, never)); d != "" {
			t.Errorf("GOMAXPROCS %d: the table differs:\n%s", n, d)
		}
	}
}

// A step that fails must not leave the stream waiting for its blocks.
func TestWriteBlocksFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("disk on fire")
	fails := func(int, int64, int64, int) error { return broken }
	large, noTar := largeTar(), randomBytes(rand.New(rand.NewPCG(5, 5)), 4<<20)
	cases := map[string]struct {
		data  []byte
		err   error
		flush flushFunc
		want  error
	}{
		"stream":     {large[:3<<20], broken, nil, broken},
		"no tar":     {noTar, io.EOF, nil, errdefs.ErrInvalidArgument},
		"write-back": {bytes.Repeat(large, 12), io.EOF, fails, broken},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCache(t, Options{})
			if tc.flush != nil {
				c.flush = tc.flush
			}
			s := newBlockSource(t, tc.data, 2, always(100_000))
			s.err = tc.err
			if _, err := c.Write(t.Context(), s, nil); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
			checkNoTemp(t, c)
			if names, err := readNames(c.layerDir()); err != nil || len(names) > 0 {
				t.Errorf("published: %v, %v", names, err)
			}
		})
	}
}

// The stream's own error is what Write returns, not what a step makes of the stream's end.
func TestWriteTellsTheFirstError(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	broken := errors.New("connection lost")
	tar := largeTar()
	for i := range 200 {
		n := i * 997 % len(tar)
		_, err := c.Write(t.Context(), io.MultiReader(bytes.NewReader(tar[:n]), iotest.ErrReader(broken)), nil)
		if !errors.Is(err, broken) {
			t.Fatalf("after %d bytes: got %v, want %v", n, err, broken)
		}
	}
}

func TestWriteOfFullDisk(t *testing.T) {
	t.Parallel()
	f, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &sparseFile{f: f, makeRoom: func() bool { return false }}
	if err := s.write([]*chunk{{data: bytes.Repeat([]byte{1}, 3*pageSize)}}); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want %v", err, unix.ENOSPC)
	}
}

// A full disk ends no write while somebody makes room.
func TestWriteWaitsForRoom(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Open(filepath.Join(dir, "layers"), Options{MakeRoom: func() bool { return os.Remove(filler) == nil }})
	if err != nil {
		t.Fatal(err)
	}
	tar := largeTar()
	if got, want := write(t, c, tar).DiffID, digest.FromBytes(tar); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if _, err := os.Lstat(filler); err == nil {
		t.Error("there was room: the test shows nothing")
	}
	if err := os.WriteFile(filepath.Join(dir, "more"), make([]byte, 10<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(t.Context(), bytes.NewReader(largeTar()), nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v, want %v", err, unix.ENOSPC)
	}
}

// What a write leaves over is written by the next.
func TestShortWrites(t *testing.T) {
	t.Parallel()
	parts := [][]byte{[]byte("abc"), []byte("d"), []byte("efghi")}
	for n := range int64(10) {
		s := &sparseFile{off: 4096, pending: [][]byte{parts[0], parts[1], parts[2]}}
		s.written(n)
		if got, want := string(bytes.Join(s.pending, nil)), "abcdefghi"[n:]; got != want || s.off != 4096+n {
			t.Errorf("after %d bytes: %q at %d; want %q", n, got, s.off, want)
		}
	}
}

// Never more than so much is on its way to the disk, and every byte of the file is told of once.
func TestWriteBackIsBounded(t *testing.T) {
	t.Parallel()
	const size = 200 << 20
	c := newCache(t, Options{})
	var told, waited int64
	var most int64
	c.flush = func(_ int, off, n int64, flags int) error {
		switch flags {
		case unix.SYNC_FILE_RANGE_WRITE:
			if off != told {
				t.Errorf("told of %d, want %d", off, told)
			}
			told = off + n
		case unix.SYNC_FILE_RANGE_WAIT_BEFORE:
			if off != waited {
				t.Errorf("waited for %d, want %d", off, waited)
			}
			waited = off + n
		default:
			t.Errorf("flags %d", flags)
		}
		most = max(most, told-waited)
		return nil
	}
	var w rawTar
	w.block(member{typ: '0', name: "zeros"}, size)
	in := io.MultiReader(&w, io.LimitReader(zeros{}, size+1024))
	if _, err := c.Write(t.Context(), in, nil); err != nil {
		t.Fatal(err)
	}
	if most > 96<<20 || told < size-flushStep {
		t.Errorf("up to %d bytes on their way at once, told of %d", most, told)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// A disk that stands still holds Write up, not memory, and Write ends with its context.
func TestWriteWaitsForTheDisk(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	stuck := make(chan struct{})
	c.flush = func(_ int, _, _ int64, flags int) error {
		if flags == unix.SYNC_FILE_RANGE_WAIT_BEFORE {
			<-stuck
		}
		return nil
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("given up")
	var mu sync.Mutex
	var at int64
	time.AfterFunc(500*time.Millisecond, func() {
		cancel(why)
		close(stuck)
	})
	var w rawTar
	w.block(member{typ: '0', name: "zeros"}, 1<<40)
	_, err := c.Write(ctx, io.MultiReader(&w, zeros{}), func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		at = n
	})
	if !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
	if at == 0 || at > 160<<20 {
		t.Errorf("%d bytes were written while nothing came to the disk", at)
	}
	checkNoTemp(t, c)
}
