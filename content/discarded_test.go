package content

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

func recordOf(data []byte, chunk int64) *Record {
	r := &Record{
		Digest: digest.FromBytes(data), Size: int64(len(data)), Chunk: chunk, Namespace: "default",
		Origins: []Origin{{Host: "registry.test:5000", Repository: "team/app"}},
	}
	for rest := data; len(rest) > 0; rest = rest[min(int(chunk), len(rest)):] {
		r.Sums = append(r.Sums, sha256.Sum256(rest[:min(int(chunk), len(rest))]))
	}
	return r
}

// fakeRefetcher brings bytes back as a test wants it.
type fakeRefetcher struct {
	err     error
	refetch *fakeRefetch

	mu    sync.Mutex
	calls int
}

func (f *fakeRefetcher) Refetch(context.Context, *Record) (Refetch, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls++
	if f.err != nil {
		return nil, f.err
	}
	return f.refetch, nil
}

// fakeRefetch has a file, or fails. good, if set, is what it has after the first bytes turned out wrong.
type fakeRefetch struct {
	data, good []byte
	err        error
	file       string
	hang       bool

	mu        sync.Mutex
	bytes     int // handed out
	restarted bool
	read      bool
	closed    int
}

func (f *fakeRefetch) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if f.hang {
		<-ctx.Done()
		return 0, context.Cause(ctx)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return 0, f.err
	}
	if f.restarted && f.read && off > 0 {
		return 0, fmt.Errorf("begin anew: %w", errdefs.ErrAborted)
	}
	f.read = !f.restarted
	n := copy(p[:min(len(p), 1000)], f.data[off:]) // less than was asked for
	f.bytes += n
	return n, nil
}

func (f *fakeRefetch) Wait(ctx context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case f.err != nil:
		return f.err
	case f.good != nil && !f.restarted:
		f.data, f.restarted = f.good, true
		return fmt.Errorf("other bytes: %w", errdefs.ErrAborted)
	case digest.FromBytes(f.data) != digest.FromBytes(f.good) && f.good != nil:
		return errdefs.ErrDataLoss
	}
	return ctx.Err()
}

func (f *fakeRefetch) LinkTo(path string) error { return os.Link(f.file, path) }

func (f *fakeRefetch) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed++
	return nil
}

// discardingStore is a store with one discarded blob, committed by "default".
func discardingStore(t *testing.T, root string, data []byte, o Options) *Store {
	t.Helper()
	d := digest.FromBytes(data)
	transfer := newTransfer(t, data).finish()
	transfer.file, transfer.record = "", recordOf(data, 2000)
	o.Fetcher = &fakeFetcher{transfer: transfer}
	s := newStore(t, root, o)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	w := open(t, s, layerRef(d), int64(len(data)))
	mustStatus(t, w, int64(len(data)))
	wantDigest(t, w, d)
	if _, err := s.Info(t.Context(), d); !errdefs.IsNotFound(err) {
		t.Fatalf("shown before its commit: %v", err)
	}
	mustCommit(t, w, 0, int64(len(data)), d)
	return s
}

func wantRecord(t *testing.T, s *Store, d digest.Digest, there bool) {
	t.Helper()
	if _, err := os.Stat(s.recordPath(d)); (err == nil) != there {
		t.Fatalf("record there: %v, wanted %t", err, there)
	}
}

func TestDiscardedBlob(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 9001)
	root := t.TempDir()
	s := discardingStore(t, root, data, Options{})
	for range 2 { // as it was left, and as a restart finds it
		info, err := s.Info(t.Context(), d)
		if err != nil || info.Size != 9001 {
			t.Fatalf("info %+v, %v", info, err)
		}
		if infos := s.infos(); len(infos) != 1 || infos[0].Digest != d {
			t.Errorf("listed %v", infos)
		}
		if got := s.DiscardedBlobs(); len(got) != 1 || got[0].Size != 9001 || !s.Discarded(d) {
			t.Errorf("discarded %v", got)
		}
		wantFile(t, s, d, false)
		wantRecord(t, s, d, true)
		if _, err := s.Update(t.Context(), ccontent.Info{Digest: d, Labels: map[string]string{"a": "b"}}, "labels.a"); err != nil {
			t.Error(err)
		}
		if _, err := s.Open(testContext(t), "other-ref", 9001, d); !errdefs.IsAlreadyExists(err) {
			t.Errorf("a writer of what is there: %v", err)
		}
		s = newStore(t, root, Options{})
	}
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantRecord(t, s, d, false)
	if _, err := s.Info(t.Context(), d); !errdefs.IsNotFound(err) {
		t.Errorf("after its deletion: %v", err)
	}
}

// A client that gives up before its commit leaves nothing.
func TestAbortedDiscardedBlob(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	transfer := newTransfer(t, data).finish()
	transfer.record = recordOf(data, 2000)
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: transfer}})
	w := open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 5000)
	wantRecord(t, s, d, true)
	if err := s.Abort(t.Context(), layerRef(d)); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	wantRecord(t, s, d, false)
	wantNoIngests(t, s)
}

// What a client writes itself is kept, also if the blob was discarded before.
func TestClientWritesWhatWasDiscarded(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	s := discardingStore(t, root, data, Options{})
	s.fetcher = nil
	w := open(t, s, "other/1/layer-"+d.String(), 5000)
	mustWrite(t, w, 0, data, 5000)
	if _, err := w.Commit(testContext(t), 5000, 5000, d, nil); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	wantBlob(t, s, data, true)
	wantFile(t, s, d, true)
	wantRecord(t, s, d, false)
	wantBlob(t, newStore(t, root, Options{}), data, true)
}

func TestReadDiscarded(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 20_001)
	f := &fakeRefetcher{refetch: &fakeRefetch{data: data}}
	s := discardingStore(t, t.TempDir(), data, Options{Refetcher: f})
	var g errgroup.Group
	for range 8 {
		g.Go(func() error {
			got, err := ccontent.ReadBlob(t.Context(), s, ocispec.Descriptor{Digest: d})
			if err == nil && !bytes.Equal(got, data) {
				err = errors.New("other bytes")
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	// Each reader may wait for the last byte of each of the 11 chunks.
	if f.calls != 1 || f.refetch.bytes > len(data)+8*11 {
		t.Errorf("%d transfers that read %d bytes for eight readers", f.calls, f.refetch.bytes)
	}
	ra, err := s.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d})
	if err != nil {
		t.Fatal(err)
	}
	defer ra.Close()
	p := make([]byte, 3000)
	if n, err := ra.ReadAt(p, 18_000); n != 2001 || !errors.Is(err, io.EOF) || !bytes.Equal(p[:n], data[18_000:]) {
		t.Errorf("a read over the end: %d, %v", n, err)
	}
	if n, err := ra.ReadAt(p, 1500); n != 3000 || err != nil || !bytes.Equal(p, data[1500:4500]) {
		t.Errorf("a read over chunks: %d, %v", n, err)
	}
	if _, err := ra.ReadAt(p, -1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a read before the start: %v", err)
	}
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if _, err := ra.ReadAt(p, 0); err != nil {
		t.Errorf("a reader does not outlive the deletion: %v", err)
	}
	f.refetch.mu.Lock()
	defer f.refetch.mu.Unlock()
	if f.refetch.closed != 0 {
		t.Error("the transfer was left while somebody reads")
	}
}

// Not one byte is handed out that the record does not vouch for; where the transfer begins again, the right ones are.
func TestOtherBytesThanDiscarded(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 9001)
	rotten := bytes.Clone(data)
	rotten[5000] ^= 1
	for name, tt := range map[string]struct {
		refetch *fakeRefetch
		want    string // "": it can be read
	}{
		"for good": {&fakeRefetch{data: rotten}, "other bytes came than those that were discarded"},
		"at first": {&fakeRefetch{data: rotten, good: data}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := discardingStore(t, t.TempDir(), data, Options{Refetcher: &fakeRefetcher{refetch: tt.refetch}})
			ra, err := s.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d})
			if err != nil {
				t.Fatal(err)
			}
			defer ra.Close()
			p := make([]byte, 9001)
			n, err := ra.ReadAt(p, 0)
			if !bytes.Equal(p[:n], data[:n]) {
				t.Fatal("wrong bytes were handed out")
			}
			switch {
			case tt.want == "" && (err != nil || n != 9001):
				t.Errorf("%d bytes, %v", n, err)
			case tt.want != "" && (n != 4000 || err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("%d bytes, %v; want the two chunks before and %q", n, err, tt.want)
			}
		})
	}
}

// A disk without room for the bytes is not the registry's fault.
func TestNoRoomForDiscarded(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	full := fmt.Errorf("the disk is full, free some space: %w", errdefs.ErrResourceExhausted)
	s := discardingStore(t, t.TempDir(), data, Options{Refetcher: &fakeRefetcher{refetch: &fakeRefetch{data: data, err: full}}})
	_, err := ccontent.ReadBlob(t.Context(), s, ocispec.Descriptor{Digest: d})
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "no room") || !strings.Contains(err.Error(), d.String()) {
		t.Errorf("read: %v", err)
	}
	if err != nil && strings.Contains(err.Error(), "registry") {
		t.Errorf("%v sends the reader to the registry", err)
	}
}

func TestSourceOfDiscardedIsGone(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	gone := fmt.Errorf("404: %w", errdefs.ErrNotFound)
	f := &fakeRefetcher{refetch: &fakeRefetch{data: data, err: gone}}
	s := discardingStore(t, t.TempDir(), data, Options{Refetcher: f})
	check := func(what string, err error) {
		t.Helper()
		if !errdefs.IsUnavailable(err) || errdefs.IsNotFound(err) {
			t.Errorf("%s: %v, wanted unavailable", what, err)
		}
		for _, word := range []string{d.String(), "registry.test:5000/team/app", "404", "discarded", "remove the image"} {
			if err == nil || !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v does not say %q", what, err, word)
			}
		}
	}
	_, err := ccontent.ReadBlob(t.Context(), s, ocispec.Descriptor{Digest: d})
	check("read", err)
	check("restore", s.Restore(t.Context(), d))
	f.mu.Lock()
	f.err = gone
	f.mu.Unlock()
	_, err = s.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d})
	check("open", err)
	f.mu.Lock()
	f.err, f.refetch = nil, &fakeRefetch{data: data}
	f.mu.Unlock()
	wantBlob(t, s, data, true) // it is back
}

func TestReadOfDiscardedEndsWithItsContext(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	s := discardingStore(t, t.TempDir(), data, Options{Refetcher: &fakeRefetcher{refetch: &fakeRefetch{data: data, hang: true}}})
	why := errors.New("the client left")
	ctx, cancel := context.WithCancelCause(t.Context())
	ra, err := s.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		t.Fatal(err)
	}
	defer ra.Close()
	cancel(why)
	if _, err := ra.ReadAt(make([]byte, 10), 0); !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

func TestRestore(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	file := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(file, data, 0o444); err != nil {
		t.Fatal(err)
	}
	s := discardingStore(t, root, data, Options{Refetcher: &fakeRefetcher{refetch: &fakeRefetch{data: data, file: file}}})
	for range 2 { // the second one has nothing to do
		if err := s.Restore(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		wantFile(t, s, d, true)
		wantRecord(t, s, d, false)
		wantBlob(t, s, data, true)
		if s.Discarded(d) || len(s.DiscardedBlobs()) > 0 {
			t.Error("still discarded")
		}
	}
	if err := s.Delete(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantFile(t, s, d, false)
	if err := s.Restore(t.Context(), d); !errdefs.IsNotFound(err) {
		t.Errorf("restore of what was deleted: %v", err)
	}
}

// A crash between the file's name and the record's end: the file counts.
func TestRecordBesideFile(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	s := discardingStore(t, root, data, Options{})
	if err := os.WriteFile(s.blobPath(d), data, 0o444); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, root, Options{})
	wantBlob(t, s, data, true)
	wantRecord(t, s, d, false)
}

// A record that is not what was written vouches for nothing, and a half of one is removed.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	good, err := recordOf(data, 2000).encode()
	if err != nil {
		t.Fatal(err)
	}
	if r, err := decodeRecord(good); err != nil || r.Digest != d || len(r.Sums) != 3 || r.Sums[2] != sha256.Sum256(data[4000:]) {
		t.Fatalf("decoded %+v, %v", r, err)
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x10
		if _, err := decodeRecord(bad); !errdefs.IsDataLoss(err) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := decodeRecord(good[:i]); !errdefs.IsDataLoss(err) {
			t.Fatalf("cut after %d bytes: %v", i, err)
		}
	}
	root := t.TempDir()
	s := discardingStore(t, root, data, Options{})
	half := filepath.Join(root, discardedFolder, "new-1")
	if err := errors.Join(os.WriteFile(half, good[:40], 0o600), os.Chmod(s.recordPath(d), 0o600), os.WriteFile(s.recordPath(d), good[:90], 0o600)); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, root, Options{})
	if _, err := s.Info(t.Context(), d); !errdefs.IsNotFound(err) {
		t.Errorf("a damaged record is shown: %v", err)
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("half a record stays behind")
	}
}

func TestRecordThatIsNoRecord(t *testing.T) {
	t.Parallel()
	data, _ := randomBytes(t, 5000)
	for name, change := range map[string]func(*Record){
		"no origin":     func(r *Record) { r.Origins = nil },
		"no size":       func(r *Record) { r.Size = 0 },
		"huge chunks":   func(r *Record) { r.Chunk = maxChunk + 1 },
		"no chunks":     func(r *Record) { r.Chunk = 0 },
		"few sums":      func(r *Record) { r.Sums = r.Sums[1:] },
		"no digest":     func(r *Record) { r.Digest = "sha256:../../x" },
		"negative size": func(r *Record) { r.Size = -1 },
	} {
		r := recordOf(data, 2000)
		change(r)
		if _, err := r.encode(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecodeRecord(f *testing.F) {
	good, err := recordOf([]byte("some bytes"), 4).encode()
	if err != nil {
		f.Fatal(err)
	}
	body := good[:len(good)-sha256.Size]
	f.Add(body)
	f.Add([]byte(recordMagic + "{}\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body) // no fuzzer finds one
		r, err := decodeRecord(append(bytes.Clone(body), sum[:]...))
		if err != nil {
			return
		}
		again, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		if back, err := decodeRecord(again); err != nil || back.Digest != r.Digest || int64(len(back.Sums)) != back.chunks() {
			t.Fatalf("%+v, %v", back, err)
		}
	})
}
