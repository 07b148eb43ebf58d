package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

func newCache(t testing.TB, o Options) *Cache {
	t.Helper()
	c, err := Open(filepath.Join(t.TempDir(), "layers"), o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func write(t testing.TB, c *Cache, tar []byte) *Layer {
	t.Helper()
	l, err := c.Write(t.Context(), bytes.NewReader(tar), nil)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// largeTar has random data, zeros in runs and in single pages, and junk after
// its end.
func largeTar() []byte {
	r := rand.New(rand.NewPCG(7, 8))
	noise := string(randomBytes(r, 3<<20+77))
	var w rawTar
	w.add(file("noise", noise))
	w.add(file("zeros", strings.Repeat("\x00", 5<<20)))
	w.add(file("mixed", noise[:10000]+strings.Repeat("\x00", 9000)+noise[:5]))
	for i := range 3000 {
		w.add(file(fmt.Sprintf("dir%d/f%d", i%7, i), noise[:i]))
	}
	return append(w.end(), noise[:70000]...)
}

func TestWrite(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	tar := largeTar()
	var mu sync.Mutex
	var steps []int64
	l, err := c.Write(t.Context(), iotest.HalfReader(bytes.NewReader(tar)), func(n int64) {
		mu.Lock()
		defer mu.Unlock()
		steps = append(steps, n)
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := digest.FromBytes(tar); l.DiffID != want || l.Size != int64(len(tar)) || l.Existed {
		t.Errorf("got %s of %d bytes (existed: %v), want %s of %d", l.DiffID, l.Size, l.Existed, want, len(tar))
	}
	got, err := os.ReadFile(l.Path)
	if err != nil || !bytes.Equal(got, tar) {
		t.Errorf("the file differs from the stream: %d bytes, %v", len(got), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(l.Path, &st); err != nil {
		t.Fatal(err)
	}
	if used := st.Blocks * 512; used > int64(len(tar))-5<<20+1<<16 {
		t.Errorf("%d of %d bytes are on disk: the zeros were written", used, len(tar))
	}
	if len(steps) == 0 || steps[len(steps)-1] != l.Size {
		t.Errorf("progress ended with %v, want %d", steps, l.Size)
	}
	if l.Timings.Total == 0 || l.Timings.Hash == 0 || l.Timings.Write == 0 || l.Timings.Scan == 0 || l.Timings.Sync == 0 {
		t.Errorf("a step took no time: %+v", l.Timings)
	}
	if n := findSorted(l.Table.root, "noise"); n == nil || contentOf(t, n, tar) != string(tar[512:512+3<<20+77]) {
		t.Error("the table does not lead to the data")
	}
	if err := c.Verify(t.Context(), l.DiffID); err != nil {
		t.Error(err)
	}
	checkNoTemp(t, c)
}

func checkNoTemp(t *testing.T, c *Cache) {
	t.Helper()
	if names, err := readNames(c.tmpDir()); err != nil || len(names) > 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// TestNewHash has the DiffID computed by what the options say.
func TestNewHash(t *testing.T) {
	t.Parallel()
	made := 0
	c := newCache(t, Options{NewHash: func() hash.Hash {
		made++
		return sha256.New224() // which nobody would take otherwise
	}})
	tar := largeTar()
	l, err := c.Write(t.Context(), bytes.NewReader(tar), nil)
	want := fmt.Sprintf("sha256:%x", sha256.Sum224(tar))
	if made != 1 || err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%d hashes made; got %v, %v, want an error about %s", made, l, err, want)
	}
}

func TestWriteSizes(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	for _, n := range []int{0, 1, 4095, 4096, chunkSize - 1024, chunkSize, chunksPerWrite*chunkSize + 5} {
		for name, fill := range map[string]byte{"zeros": 0, "ones": 1} {
			tar := append(makeTar(), bytes.Repeat([]byte{fill}, n)...)
			l := write(t, c, tar)
			if got, err := os.ReadFile(l.Path); err != nil || !bytes.Equal(got, tar) {
				t.Errorf("%d %s: file differs, %v", n, name, err)
			}
		}
	}
}

func TestWriteTwice(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	tar := makeTar(file("a", "x"))
	first := write(t, c, tar)
	var before, after unix.Stat_t
	if err := unix.Stat(first.Path, &before); err != nil {
		t.Fatal(err)
	}
	second := write(t, c, tar)
	if err := unix.Stat(first.Path, &after); err != nil {
		t.Fatal(err)
	}
	if !second.Existed || before.Ino != after.Ino {
		t.Errorf("existed: %v, inode %d, then %d: the file was replaced", second.Existed, before.Ino, after.Ino)
	}
	if err := os.Truncate(first.Path, 100); err != nil {
		t.Fatal(err)
	}
	if err := c.Verify(t.Context(), first.DiffID); !errdefs.IsDataLoss(err) {
		t.Errorf("Verify of a truncated file: %v", err)
	}
	if third := write(t, c, tar); third.Existed {
		t.Error("a truncated file was taken for the layer")
	}
	if err := c.Verify(t.Context(), first.DiffID); err != nil {
		t.Error(err)
	}
	checkNoTemp(t, c)
}

func TestWriteConcurrently(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	tar := largeTar()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			l, err := c.Write(t.Context(), bytes.NewReader(tar), nil)
			if err != nil {
				t.Error(err)
				return
			}
			if err := c.Verify(t.Context(), l.DiffID); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	checkNoTemp(t, c)
}

func TestWriteFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("connection lost")
	tar := largeTar()
	cases := map[string]struct {
		in   io.Reader
		want error
		text string
	}{
		"source":   {io.MultiReader(bytes.NewReader(tar[:3<<20]), iotest.ErrReader(broken)), broken, "3145728"},
		"not tar":  {strings.NewReader(longName(4 << 20)), errdefs.ErrInvalidArgument, "tar header"},
		"cut":      {bytes.NewReader(tar[:2<<20]), errdefs.ErrInvalidArgument, `"noise"`},
		"stuck":    {stuckReader{}, io.ErrNoProgress, ""},
		"member":   {bytes.NewReader(makeTar(file("a", ""), hardlink("h", "gone"))), errdefs.ErrInvalidArgument, `"h"`},
		"eof late": {io.MultiReader(bytes.NewReader(tar), iotest.ErrReader(io.ErrUnexpectedEOF)), io.ErrUnexpectedEOF, "after"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCache(t, Options{})
			_, err := c.Write(t.Context(), tc.in, nil)
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("got %v, want %v and %q", err, tc.want, tc.text)
			}
			checkNoTemp(t, c)
			if names, err := readNames(c.layerDir()); err != nil || len(names) > 0 {
				t.Errorf("published: %v, %v", names, err)
			}
		})
	}
}

type stuckReader struct{}

func (stuckReader) Read([]byte) (int, error) { return 0, nil }

func TestWriteEndsWithContext(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	r, w := io.Pipe()
	context.AfterFunc(ctx, func() { r.CloseWithError(context.Cause(ctx)) })
	why := errors.New("pull given up")
	go func() {
		_, _ = w.Write(largeTar()[:2<<20])
		cancel(why)
	}()
	if _, err := c.Write(ctx, r, nil); !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
	checkNoTemp(t, c)
}

// slowToSpread is a context whose end others learn of late: it has ended, and contexts made of it have not.
type slowToSpread struct{ context.Context } //nolint:containedctx // it is one

func (slowToSpread) Done() <-chan struct{} { return nil }

type readerFunc func([]byte) (int, error)

func (r readerFunc) Read(p []byte) (int, error) { return r(p) }

// The stream may notice the end of the context first, and put it in words of its own.
func TestWriteTellsWhyItsContextEnded(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("pull given up")
	stream := readerFunc(func([]byte) (int, error) {
		cancel(why)
		return 0, io.ErrClosedPipe
	})
	if _, err := c.Write(slowToSpread{ctx}, stream, nil); !errors.Is(err, why) {
		t.Errorf("got %v, want %v", err, why)
	}
	checkNoTemp(t, c)
}

func TestOpenRemovesUnfinished(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if _, err := Open(root, Options{}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "tmp", "layer-1"), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	checkNoTemp(t, c)
	if _, err := Open(root, Options{TableBytes: -1}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a negative number of bytes: %v", err)
	}
}

func TestGetRescans(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	c, err := Open(root, Options{})
	if err != nil {
		t.Fatal(err)
	}
	tar := largeTar()
	written := write(t, c, tar)
	if c, err = Open(root, Options{}); err != nil {
		t.Fatal(err)
	}
	got, err := c.Get(t.Context(), written.DiffID)
	if err != nil {
		t.Fatal(err)
	}
	never := func(string) bool { return false }
	if d := diff(describeTree(t, written.Table.root, tar, never), describeTree(t, got.Table.root, tar, never)); d != "" {
		t.Errorf("scanned again, the tree differs:\n%s", d)
	}
	if again, err := c.Get(t.Context(), written.DiffID); err != nil || again.Table != got.Table {
		t.Errorf("the table is not kept: %v", err)
	}
	for name, id := range map[string]digest.Digest{"absent": digest.FromString("x"), "sha512": digest.SHA512.FromString("x")} {
		if _, err := c.Get(t.Context(), id); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Truncate(written.Path, 1<<20); err != nil {
		t.Fatal(err)
	}
	if c, err = Open(root, Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), written.DiffID); !errdefs.IsDataLoss(err) {
		t.Errorf("a file that was cut short: %v", err)
	}
	if _, err := c.Get(t.Context(), "sha256:../../x"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a DiffID that is none: %v", err)
	}
}

func TestTableCache(t *testing.T) {
	t.Parallel()
	c := newTableCache(10_000)
	ids := []digest.Digest{"a", "b", "c", "big"}
	for i, id := range ids {
		c.put(id, &Table{bytes: []int64{3000, 3000, 3000, 20_000}[i]})
	}
	if len(c.byID) != 2 || c.byID["a"] != nil || c.byID["big"] != nil || c.bytes != 2*(3000+1<<10) {
		t.Errorf("kept %v with %d bytes", c.byID, c.bytes)
	}
}

// TestTableCacheSharesOneScan: a scan goes on while somebody waits for it, and
// ends when nobody does.
func TestTableCacheSharesOneScan(t *testing.T) {
	t.Parallel()
	c := newTableCache(10_000)
	started, ended := make(chan struct{}, 2), make(chan struct{})
	release := make(chan struct{})
	scan := func(ctx context.Context) (*Table, error) {
		started <- struct{}{}
		select {
		case <-release:
			return &Table{}, nil
		case <-ctx.Done():
			close(ended)
			return nil, ctx.Err()
		}
	}
	first, leave := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	go func() { _, err := c.get(first, "a", scan); errs <- err }()
	<-started
	leave()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("the only waiter: %v", err)
	}
	<-ended

	second, leave := context.WithCancel(t.Context())
	go func() { _, err := c.get(second, "a", scan); errs <- err }()
	<-started
	go func() { _, err := c.get(t.Context(), "a", scan); errs <- err }()
	waitFor(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.flights["a"].waiters == 2
	})
	leave()
	if err := <-errs; !errors.Is(err, context.Canceled) {
		t.Errorf("the waiter that left: %v", err)
	}
	close(release)
	if err := <-errs; err != nil {
		t.Errorf("the waiter that stayed: %v", err)
	}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("test ended")
		}
	}
}

func TestRecords(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	l := write(t, c, makeTar(file("a", "x")))
	blob, other := digest.FromString("blob"), digest.SHA512.FromString("blob")
	if _, err := c.Lookup(blob); !errdefs.IsNotFound(err) {
		t.Errorf("Lookup before Record: %v", err)
	}
	for _, b := range []digest.Digest{blob, blob, other} {
		if err := c.Record(b, l.DiffID); err != nil {
			t.Fatal(err)
		}
		if got, err := c.Lookup(b); err != nil || got != l.DiffID {
			t.Errorf("Lookup(%s) = %s, %v", b, got, err)
		}
	}
	second := write(t, c, makeTar(file("b", "x")))
	if err := c.Record(blob, second.DiffID); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Lookup(blob); err != nil || got != second.DiffID {
		t.Errorf("Lookup after another Record = %s, %v", got, err)
	}
	if err := c.Record(blob, digest.FromString("no layer")); !errdefs.IsNotFound(err) {
		t.Errorf("Record of an absent layer: %v", err)
	}
	if err := c.Record("sha256:/../x", l.DiffID); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Record of a bad digest: %v", err)
	}
	if err := os.Remove(second.Path); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Lookup(blob); !errdefs.IsNotFound(err) {
		t.Errorf("Lookup without the layer file: %v", err)
	}
	checkNoTemp(t, c)
}

func TestLinkAndSweep(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	linked, pinned, free := write(t, c, makeTar(file("a", ""))), write(t, c, makeTar(file("b", ""))), write(t, c, makeTar(file("c", "")))
	blob := digest.FromString("free's blob")
	if err := c.Record(blob, free.DiffID); err != nil {
		t.Fatal(err)
	}
	dst := filepath.Join(t.TempDir(), "layer")
	if err := c.Link(linked.DiffID, dst); err != nil {
		t.Fatal(err)
	}
	if err := c.Link(linked.DiffID, dst); !errdefs.IsAlreadyExists(err) {
		t.Errorf("Link over a file: %v", err)
	}
	if err := c.Link(digest.FromString("none"), dst+"2"); !errdefs.IsNotFound(err) {
		t.Errorf("Link of an absent layer: %v", err)
	}
	if err := c.Link(linked.DiffID, dst+"/no/folder"); err == nil || errdefs.IsNotFound(err) {
		t.Errorf("Link into an absent folder: %v", err)
	}
	unpin := c.Pin(pinned.DiffID)
	unpin2 := c.Pin(pinned.DiffID)
	unpin()
	unpin()
	sweep := func(age time.Duration, want ...*Layer) {
		t.Helper()
		if err := c.Sweep(t.Context(), age); err != nil {
			t.Fatal(err)
		}
		names, err := readNames(c.layerDir())
		if err != nil || len(names) != len(want) {
			t.Errorf("left: %v, %v", names, err)
		}
		for _, l := range want {
			if _, err := c.Get(t.Context(), l.DiffID); err != nil {
				t.Error(err)
			}
		}
	}
	sweep(time.Hour, linked, pinned, free)
	sweep(0, linked, pinned)
	if _, err := os.Lstat(filepath.Join(c.blobDir(digest.SHA256), blob.Encoded())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record of a swept layer: %v", err)
	}
	if _, err := c.Get(t.Context(), free.DiffID); !errdefs.IsNotFound(err) {
		t.Errorf("Get of a swept layer: %v", err)
	}
	unpin2()
	if err := os.Remove(dst); err != nil {
		t.Fatal(err)
	}
	sweep(time.Hour, linked, pinned) // its pull may be tried again
	c.Satisfied(linked.DiffID)
	c.Satisfied(pinned.DiffID)
	sweep(time.Hour, pinned) // which waits for its first snapshot
	sweep(0)
}

// A layer that served is kept for a pull that counts on it, and only for as long as that may take.
func TestWantedLayerIsKept(t *testing.T) {
	t.Parallel()
	c := newCache(t, Options{})
	tar := makeTar(file("a", ""))
	l := write(t, c, tar)
	served := func() {
		t.Helper()
		dst := filepath.Join(t.TempDir(), "layer")
		if err := errors.Join(c.Link(l.DiffID, dst), os.Remove(dst)); err != nil {
			t.Fatal(err)
		}
		c.Satisfied(l.DiffID)
	}
	swept := func(age time.Duration) bool {
		t.Helper()
		if err := c.Sweep(t.Context(), age); err != nil {
			t.Fatal(err)
		}
		_, err := c.Get(t.Context(), l.DiffID)
		return errdefs.IsNotFound(err)
	}
	served()
	c.Want(l.DiffID)
	if swept(time.Hour) {
		t.Error("a wanted layer was swept")
	}
	if !swept(0) {
		t.Error("a layer that was wanted long ago is kept")
	}
	l = write(t, c, tar)
	served()
	if l = write(t, c, tar); !l.Existed || swept(time.Hour) {
		t.Error("a layer that was written again was swept")
	}
	c.Satisfied(l.DiffID)
	if !swept(time.Hour) {
		t.Error("a layer that served is kept")
	}
}

// Data, then name, then folder; the record of a blob after its layer.
func TestOrderOfDurability(t *testing.T) {
	t.Parallel()
	c, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	tarball := makeTar(file("f", "data"))
	d := digest.FromBytes(tarball)
	blob := digest.FromString("blob")
	named := func() string {
		_, err := os.Stat(filepath.Join(c.layerDir(), d.Encoded()))
		return fmt.Sprintf("layer named %t", err == nil)
	}
	var got []string
	c.onSync = func(path string) {
		switch filepath.Dir(path) {
		case c.tmpDir():
			path = "data"
		case c.root:
			path = "folder"
		default:
			path = "records"
			if _, err := os.Lstat(filepath.Join(c.blobDir(digest.SHA256), blob.Encoded())); err != nil {
				path = "records, without the record"
			}
		}
		got = append(got, path+", "+named())
	}
	if _, err := c.Write(t.Context(), bytes.NewReader(tarball), nil); err != nil {
		t.Fatal(err)
	}
	if err := c.Record(blob, d); err != nil {
		t.Fatal(err)
	}
	want := []string{"data, layer named false", "folder, layer named true", "records, layer named true"}
	if !slices.Equal(got, want) {
		t.Errorf("made durable %q, want %q", got, want)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	b := newBuilder(0)
	b.held = MaxHeld - 10
	if err := b.add(b.root, longName(11), &erofs.Inode{}); err == nil {
		t.Error("no limit on what is held")
	}
	b.entries = MaxEntries
	m := scanner{tape: &tape{}, build: b}
	if err := m.build.apply(nil, nil); err == nil {
		t.Error("no limit on entries")
	}
	deep := newBuilder(0)
	deep.most = 100
	m = scanner{tape: &tape{src: readerSource{bytes.NewReader(makeTar(file(strings.Repeat("d/", 99)+"f", ""), file(strings.Repeat("e/", 99), "")))}}, build: deep}
	m.headers.tape = m.tape
	if _, err := m.run(t.Context()); err == nil || !strings.Contains(err.Error(), "implied") {
		t.Errorf("no limit on implied directories: %v", err)
	}
	huge := pax(file("s", ""), "GNU.sparse.major", "0", "GNU.sparse.minor", "1", "GNU.sparse.map", "", "GNU.sparse.numblocks", "0", "GNU.sparse.size", fmt.Sprint(int64(1)<<62))
	if _, err := Scan(t.Context(), bytes.NewReader(makeTar(huge))); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a hole of 4 EiB: %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(io.ErrClosedPipe)
	if _, err := Scan(ctx, bytes.NewReader(largeTar())); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("Scan with an ended context: %v", err)
	}
}

// TestXattrSetsAreShared: a label on every file must not cost a map each.
func TestXattrSetsAreShared(t *testing.T) {
	t.Parallel()
	m := func(name string) member { return xattr(file(name, ""), "security.selinux", "label") }
	table := scanBytes(t, makeTar(m("a"), m("b"), xattr(hardlink("b2", "b"), "user.x", "1")))
	a, b := findSorted(table.root, "a"), findSorted(table.root, "b")
	if len(a.Xattrs) != 1 || len(b.Xattrs) != 2 {
		t.Errorf("a has %v, b has %v: one changed the other", a.Xattrs, b.Xattrs)
	}
}
