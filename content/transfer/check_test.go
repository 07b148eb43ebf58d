package transfer

import (
	"context"
	"errors"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"
)

type testPieces struct{}

func (testPieces) Verify(ctx context.Context, path string, d digest.Digest, size int64) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	return hashesTo(ctx, f, Blob{Digest: d, Size: size})
}
func (testPieces) Read(int64) {}

func unlinked(fs.FileInfo) bool { return false }

func mustCheck(t *testing.T, m *Manager) []Damage {
	t.Helper()
	found, err := m.Check(t.Context(), testPieces{}, unlinked)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func rot(t *testing.T, path string, off int64) {
	t.Helper()
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var p [1]byte
	if _, err := f.ReadAt(p[:], off); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 1
	if _, err := f.WriteAt(p[:], off); err != nil {
		t.Fatal(err)
	}
}

// A damaged partial transfer is found, repaired, and then fetches what is missing and no more.
func TestCheckPartial(t *testing.T) {
	t.Parallel()
	const blocks = 8
	data, b := randomBlob(31, blocks*blockSize)
	for name, tc := range map[string]struct {
		damage func(t *testing.T, path string)
		says   string
		blocks int64 // to fetch, beside the last one
	}{
		"sound":        {func(*testing.T, string) {}, "", 0},
		"state header": {func(t *testing.T, p string) { rot(t, filepath.Join(p, stateName), 20) }, "no valid header", blocks - 1},
		"state record": {func(t *testing.T, p string) { rot(t, filepath.Join(p, stateName), headerSize+8) }, "1 records are damaged", 1},
		"data":         {func(t *testing.T, p string) { rot(t, filepath.Join(p, dataName), 3*blockSize+5) }, "of 7 recorded blocks 1 do not match", 1},
		"data cut short": {func(t *testing.T, p string) {
			if err := os.Truncate(filepath.Join(p, dataName), 5*blockSize); err != nil {
				t.Fatal(err)
			}
		}, "of 7 recorded blocks 2 do not match", 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newManager(t, t.TempDir(), Options{})
			path := folderPath(m.root, plainName(b))
			f, err := openFolder(path, b, false)
			if err != nil {
				t.Fatal(err)
			}
			for n := range uint32(blocks - 1) {
				p := data[n*blockSize : (n+1)*blockSize]
				if _, err := f.data.WriteAt(p, int64(n)*blockSize); err != nil {
					t.Fatal(err)
				}
				if err := f.record(n, blockSize, crc32.Checksum(p, castagnoli)); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.closeState(); err != nil {
				t.Fatal(err)
			}
			if err := f.data.Close(); err != nil {
				t.Fatal(err)
			}
			tc.damage(t, path)
			// While somebody works in it, it is nobody's business.
			l, err := tryLock(m.root, plainName(b), false)
			if err != nil {
				t.Fatal(err)
			}
			if found := mustCheck(t, m); len(found) > 0 {
				t.Errorf("while it is locked: %+v", found)
			}
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			found := mustCheck(t, m)
			if tc.says == "" {
				if len(found) > 0 {
					t.Fatalf("found %+v", found)
				}
			} else {
				if len(found) != 1 || !strings.Contains(found[0].Problem, tc.says) || found[0].Digest != b.Digest {
					t.Fatalf("found %+v, want %q", found, tc.says)
				}
				if done, err := m.Repair(found[0]); err != nil || !done {
					t.Fatal(done, err)
				}
				if found := mustCheck(t, m); len(found) > 0 {
					t.Errorf("after the repair: %+v", found)
				}
			}
			src := &fakeSource{host: "a", data: data}
			h := join(t, m, b, src)
			wait(t, h)
			if _, sent := src.stats(); sent != (tc.blocks+1)*blockSize {
				t.Errorf("%d bytes were fetched, want %d", sent, (tc.blocks+1)*blockSize)
			}
			if found := mustCheck(t, m); len(found) > 0 {
				t.Errorf("finished: %+v", found)
			}
		})
	}
}

// A finished blob that rots after it was verified in this process is found, and not believed any more, be it that the
// transfer's goroutine has not yet settled what its waiters know, or that somebody still has a handle.
func TestCheckFinished(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct{ late, held bool }{"settled": {}, "not settled": {late: true}, "held": {held: true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(32, 3*blockSize+100)
			m := newManager(t, t.TempDir(), Options{})
			src := &fakeSource{host: "a", data: data}
			ctx, settle := t.Context(), func() {}
			if tc.late {
				ctx, settle = heldAtItsEnd(ctx)
				t.Cleanup(settle)
			}
			h, err := m.Join(ctx, "", b, src)
			if err != nil {
				t.Fatal(err)
			}
			wait(t, h)
			if old := h; tc.held {
				t.Cleanup(func() { _ = old.Close() })
			} else if err := h.Close(); err != nil {
				t.Fatal(err)
			}
			before, err := os.Stat(dataPath(m, b))
			if err != nil {
				t.Fatal(err)
			}
			rot(t, dataPath(m, b), 1000)
			if err := os.Chtimes(dataPath(m, b), before.ModTime(), before.ModTime()); err != nil { // a disk that rots changes no times
				t.Fatal(err)
			}
			if found := mustCheck(t, m); len(found) != 1 || !found[0].Complete {
				t.Fatalf("found %+v", found)
			}
			if err := m.Distrust(b.Digest); err != nil {
				t.Fatal(err)
			}
			_, first := src.stats()
			h = join(t, m, b, src)
			settle()
			within, cancel := context.WithTimeoutCause(t.Context(), 30*time.Second, errors.New("it waits for the handle"))
			defer cancel()
			if err := h.Wait(within); err != nil {
				t.Fatal(err)
			}
			if got, err := readAll(t, h); err != nil || string(got) != string(data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if _, sent := src.stats(); sent-first != b.Size {
				t.Errorf("%d bytes were fetched again, want %d", sent-first, b.Size)
			}
			if found := mustCheck(t, m); len(found) > 0 {
				t.Errorf("afterwards: %+v", found)
			}
		})
	}
}

// heldAtItsEnd makes a context for Join whose transfer stops, when its waiters are told, until the function is called.
func heldAtItsEnd(ctx context.Context) (context.Context, func()) {
	logger, held := logrus.New(), make(chan struct{})
	logger.SetOutput(io.Discard)
	logger.SetLevel(logrus.DebugLevel)
	logger.AddHook(holdAt{"transfer complete", held})
	return log.WithLogger(ctx, logrus.NewEntry(logger)), sync.OnceFunc(func() { close(held) })
}

// holdAt is a hook that lets a message wait.
type holdAt struct {
	message string
	until   <-chan struct{}
}

func (holdAt) Levels() []logrus.Level { return logrus.AllLevels }

func (h holdAt) Fire(e *logrus.Entry) error {
	if e.Message == h.message {
		<-h.until
	}
	return nil
}
