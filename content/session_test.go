package content

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func TestWriteStagesAndCommitShows(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, layerRef(d), 5000)
	wantDigest(t, w, digest.FromString(""))
	mustWrite(t, w, 0, data[:1000], 1000)
	wantDigest(t, w, digest.FromBytes(data[:1000]))
	wantFile(t, s, d, false)
	mustWrite(t, w, 1000, data[1000:], 5000)
	wantDigest(t, w, d)
	mustStatus(t, w, 5000)
	wantFile(t, s, d, true)
	wantBlob(t, s, data, false)

	// Inside containerd's transaction nothing may wait for changes of blobs/.
	s.files.Lock()
	other := open(t, s, "default/2/"+d.String(), 5000)
	if _, err := s.Status(t.Context(), layerRef(d)); err != nil {
		t.Fatal(err)
	}
	mustStatus(t, w, 5000)
	mustCommit(t, w, 5000, 5000, d)
	wantBlob(t, s, data, true)
	s.files.Unlock()

	wantDigest(t, w, d)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Abort(t.Context(), "default/2/"+d.String()); err != nil {
		t.Fatal(err)
	}
	wantNoIngests(t, s)
}

func TestWriteOffsets(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	tests := map[string]struct {
		off  int64
		n    int
		want int64
		err  error
	}{
		"next":               {100, 50, 150, nil},
		"last":               {100, 200, 300, nil},
		"nothing":            {100, 0, 100, nil},
		"zero starts over":   {0, 40, 40, nil},
		"gap":                {101, 50, 100, errdefs.ErrOutOfRange},
		"again":              {50, 50, 100, errdefs.ErrOutOfRange},
		"negative":           {-1, 50, 100, errdefs.ErrOutOfRange},
		"too many":           {100, 201, 100, errdefs.ErrFailedPrecondition},
		"too many from zero": {0, 301, 0, errdefs.ErrFailedPrecondition},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{})
			w := open(t, s, layerRef(d), 300)
			mustWrite(t, w, 0, data[:100], 100)
			p := make([]byte, 400)
			copy(p, data[100:])
			got, err := w.Write(t.Context(), tt.off, p[:tt.n])
			if got != tt.want || !is(err, tt.err) {
				t.Fatalf("write at %d: %d, %v, wanted %d, %v", tt.off, got, err, tt.want, tt.err)
			}
			if st := w.Stat(); st.Offset != tt.want {
				t.Fatalf("offset %d, wanted %d", st.Offset, tt.want)
			}
		})
	}
}

func TestStartOverAfterCompletion(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, layerRef(d), 300)
	mustWrite(t, w, 0, data, 300)
	mustWrite(t, w, 0, data[:10], 10)
	wantFile(t, s, d, false)
	mustWrite(t, w, 10, data[10:], 300)
	mustCommit(t, w, 300, 300, d)
	wantBlob(t, s, data, true)
}

func TestCommitChecks(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	_, other := randomBytes(t, 301)
	tests := map[string]struct {
		ref      string
		declared int64
		write    int
		off      int64
		total    int64
		expected digest.Digest
		err      error
	}{
		"sized":                   {layerRef(d), 300, 300, 300, 300, d, nil},
		"nothing said":            {layerRef(d), 300, 300, 300, 0, "", nil},
		"no size declared":        {"default/1/x", 0, 300, 300, 300, d, nil},
		"digest only here":        {"default/1/x", 300, 300, 300, 300, d, nil},
		"another algorithm":       {"default/1/x", 300, 300, 300, 300, digest.SHA512.FromBytes(data), nil},
		"offset zero, all right":  {layerRef(d), 300, 300, 0, 300, d, nil},
		"offset zero, other size": {layerRef(d), 300, 300, 0, 299, d, errdefs.ErrFailedPrecondition},
		"offset zero, other blob": {layerRef(d), 300, 300, 0, 300, other, errdefs.ErrFailedPrecondition},
		"other offset":            {layerRef(d), 300, 300, 299, 300, d, errdefs.ErrOutOfRange},
		"other total":             {layerRef(d), 300, 300, 300, 301, d, errdefs.ErrFailedPrecondition},
		"other digest":            {layerRef(d), 300, 300, 300, 300, other, errdefs.ErrFailedPrecondition},
		"no digest":               {layerRef(d), 300, 300, 300, 300, "sha256:../../x", errdefs.ErrInvalidArgument},
		"incomplete":              {layerRef(d), 300, 200, 200, 300, d, errdefs.ErrFailedPrecondition},
		"incomplete, unsaid":      {layerRef(d), 300, 200, 200, 0, "", errdefs.ErrFailedPrecondition},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{})
			w := open(t, s, tt.ref, tt.declared)
			mustWrite(t, w, 0, data[:tt.write], int64(tt.write))
			n, err := w.Commit(testContext(t), tt.off, tt.total, tt.expected, nil)
			if !is(err, tt.err) {
				t.Fatalf("commit: %v, wanted %v", err, tt.err)
			}
			if tt.err != nil {
				wantBlob(t, s, data, false)
				// The ref is free again.
				open(t, s, tt.ref, tt.declared)
				return
			}
			if n != 300 {
				t.Fatalf("commit: offset %d, wanted 300", n)
			}
			if tt.expected != "" && w.Digest() != tt.expected {
				t.Fatalf("digest %s, wanted %s", w.Digest(), tt.expected)
			}
			wantNoIngests(t, s)
		})
	}
}

func TestCommitOfWhatIsShown(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	for name, declared := range map[string]int64{"sized": 300, "no size": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newStore(t, t.TempDir(), Options{})
			for i, ref := range []string{"default/1/x", "other/1/x"} {
				w := open(t, s, ref, declared)
				mustWrite(t, w, 0, data, 300)
				n, err := w.Commit(testContext(t), 300, 300, d, nil)
				if n != 300 || (i == 0) != (err == nil) || (i == 1 && !errdefs.IsAlreadyExists(err)) {
					t.Fatalf("commit %d: %d, %v", i, n, err)
				}
				wantDigest(t, w, d)
			}
			wantNoIngests(t, s)
			wantBlob(t, s, data, true)
			if _, err := s.Open(t.Context(), "third", 300, d); !errdefs.IsAlreadyExists(err) {
				t.Fatalf("open with the digest of a shown blob: %v", err)
			}
		})
	}
}

// Bytes that can never become what the ref names do not stop the next try.
func TestWrongBytesAreDiscarded(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	bad := append([]byte{data[0] ^ 1}, data[1:]...)
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, layerRef(d), 300)
	mustWrite(t, w, 0, bad, 300)
	wantDigest(t, w, digest.FromBytes(bad))
	_, err := w.Commit(t.Context(), 300, 300, d, nil)
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	wantFile(t, s, d, false)
	w = open(t, s, layerRef(d), 300)
	mustStatus(t, w, 0)
	mustWrite(t, w, 0, data, 300)
	mustCommit(t, w, 300, 300, d)
}

func TestOneWriterPerRef(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, "ref", 0)
	_, err := s.Open(t.Context(), "ref", 0, "")
	wantErr(t, err, errdefs.ErrUnavailable)
	open(t, s, "another", 0)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	_, err = w.Write(t.Context(), 0, []byte("x"))
	wantErr(t, err, errdefs.ErrFailedPrecondition)
	open(t, s, "ref", 0)
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{})
	for name, tt := range map[string]struct {
		ref      string
		expected digest.Digest
	}{
		"no ref":     {"", ""},
		"long ref":   {strings.Repeat("x", maxRef+1), ""},
		"bad digest": {"x", "sha256:../../etc"},
	} {
		_, err := s.Open(t.Context(), tt.ref, 1, tt.expected)
		if !is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v, wanted %v", name, err, errdefs.ErrInvalidArgument)
		}
	}
	wantNoIngests(t, s)
}

func TestHostileRefsStayInside(t *testing.T) {
	t.Parallel()
	parent := t.TempDir()
	s := newStore(t, filepath.Join(parent, "root"), Options{})
	for _, ref := range []string{"../../../x", "/etc/passwd", "a\x00b", "..", ".", "default/1/../../../../x", strings.Repeat("../", 1000)} {
		w := open(t, s, ref, 0)
		mustWrite(t, w, 0, []byte("x"), 1)
		if st, err := s.Status(t.Context(), ref); err != nil || st.Ref != ref {
			t.Fatalf("status of %q: %+v, %v", ref, st, err)
		}
	}
	if entries, err := os.ReadDir(parent); err != nil || len(entries) != 1 {
		t.Fatalf("%v (%v) beside the root, wanted the root alone", entries, err)
	}
	// They come back after a restart, to be aborted by name.
	s = newStore(t, s.root, Options{})
	list, err := s.ListStatuses(t.Context())
	if err != nil || len(list) != 7 {
		t.Fatalf("%d ingests after the restart (%v), wanted 7", len(list), err)
	}
	for _, st := range list {
		if err := s.Abort(t.Context(), st.Ref); err != nil {
			t.Fatal(err)
		}
	}
	wantNoIngests(t, s)
}

func TestNoDirectoryForAHostileDigest(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{})
	for _, d := range []digest.Digest{"sha256:../../x", "../x:00", "", "sha256:" + digest.Digest(strings.Repeat("A", 64))} {
		_, err := s.Info(t.Context(), d)
		wantErr(t, err, errdefs.ErrInvalidArgument)
		wantErr(t, s.Delete(t.Context(), d), errdefs.ErrInvalidArgument)
		_, err = s.ReaderAt(t.Context(), ocispec.Descriptor{Digest: d})
		wantErr(t, err, errdefs.ErrInvalidArgument)
	}
}

func TestUnsizedIsSyncedAsItGoes(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 1<<20)
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, "import", 0)
	for i := range int64(20) {
		mustWrite(t, w, i<<20, data, (i+1)<<20)
		if want := (i + 1) % 8 << 20; w.unsynced != want {
			t.Fatalf("after %d MiB %d bytes are not synced, wanted %d", i+1, w.unsynced, want)
		}
	}
	mustWrite(t, w, 0, data, 1<<20)
	mustCommit(t, w, 1<<20, 1<<20, d)
	wantBlob(t, s, data, true)
}

func TestEmptyBlob(t *testing.T) {
	t.Parallel()
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, "empty", 0)
	mustWrite(t, w, 0, []byte("text"), 4)
	// A client that truncated and wrote no more.
	mustCommit(t, w, 0, 0, "")
	wantBlob(t, s, nil, true)
	wantDigest(t, w, digest.FromString(""))
}

func TestFullDisk(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, 0); err != nil {
			t.Error(err)
		}
	})
	data, d := randomBytes(t, 2<<20)
	s := newStore(t, root, Options{})
	w, err := s.Open(t.Context(), layerRef(d), 2<<20, "")
	if err != nil {
		t.Fatal(err)
	}
	var n int64
	for err == nil {
		n, err = w.Write(t.Context(), n, data[n:n+100_000])
	}
	wantErr(t, err, errdefs.ErrResourceExhausted)
	if !strings.Contains(err.Error(), "is full") {
		t.Errorf("error %q does not say it plainly", err)
	}
	// What fitted stays, to be resumed.
	if n == 0 || n >= 1<<20 || w.Stat().Offset != n {
		t.Errorf("%d bytes written, offset %d", n, w.Stat().Offset)
	}
	wantDigest(t, w, digest.FromBytes(data[:n]))
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Abort(t.Context(), layerRef(d)); err != nil {
		t.Error(err)
	}
}

func TestCrash(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	s := newStore(t, root, Options{})
	w := open(t, s, layerRef(d), 5000)
	mustWrite(t, w, 0, data[:3000], 3000)

	// Nothing is closed. A new process finds the ingest.
	s = newStore(t, root, Options{})
	st, err := s.Status(t.Context(), layerRef(d))
	if err != nil || st.Offset != 3000 || st.Total != 5000 || st.StartedAt.IsZero() {
		t.Fatalf("status after the crash: %+v, %v", st, err)
	}
	w = open(t, s, layerRef(d), 5000)
	if st := w.Stat(); st.Offset != 3000 {
		t.Fatalf("first STAT after the crash: %d, wanted 3000", st.Offset)
	}
	mustStatus(t, w, 3000)
	wantDigest(t, w, digest.FromBytes(data[:3000]))
	mustWrite(t, w, 3000, data[3000:], 5000)
	wantBlob(t, s, data, false)

	// Again, between the last WRITE and COMMIT: what is in blobs/ is visible, and
	// the client's retry is answered.
	s = newStore(t, root, Options{})
	wantBlob(t, s, data, true)
	w = open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 0)
	mustWrite(t, w, 0, data, 5000)
	_, err = w.Commit(t.Context(), 5000, 5000, d, nil)
	wantErr(t, err, errdefs.ErrAlreadyExists)
	wantNoIngests(t, s)
}

func TestCrashWithAllBytes(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 5000)
	root := t.TempDir()
	if err := open(t, newStore(t, root, Options{}), layerRef(d), 5000).folder(); err != nil {
		t.Fatal(err)
	}
	dir := (&Store{root: root}).ingestDir(layerRef(d))
	for name, content := range map[string][]byte{dataFile: data, claimedFile: []byte("junk")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s := newStore(t, root, Options{})
	w := open(t, s, layerRef(d), 5000)
	mustStatus(t, w, 5000)
	wantFile(t, s, d, true)
	wantDigest(t, w, d)
	mustCommit(t, w, 5000, 5000, d)
	wantNoIngests(t, s)
}

func TestLeftoversThatCannotBeResumed(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	newStore(t, root, Options{})
	dirs := map[string]map[string]string{
		digest.FromString("no ref").Encoded():    {dataFile: "x"},
		digest.FromString("empty ref").Encoded(): {refFile: "", dataFile: "x"},
		digest.FromString("other").Encoded():     {refFile: "another", dataFile: "x"},
		"junk":                                   {},
	}
	for dir, files := range dirs {
		if err := os.Mkdir(filepath.Join(root, ingestFolder, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(root, ingestFolder, dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, name := range []string{"blobs/sha256/short", "blobs/md5/x", "blobs/junk"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := newStore(t, root, Options{})
	wantNoIngests(t, s)
	if infos := s.infos(); len(infos) != 0 {
		t.Fatalf("blobs %v, wanted none", infos)
	}
}

func TestAnotherSizeStartsOver(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	s := newStore(t, t.TempDir(), Options{})
	w := open(t, s, layerRef(d), 400)
	mustWrite(t, w, 0, data, 300)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = open(t, s, layerRef(d), 300)
	mustStatus(t, w, 0)
	mustWrite(t, w, 0, data, 300)
	mustCommit(t, w, 300, 300, d)
}

func TestLayoutIsContainerds(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	root := t.TempDir()
	s := newStore(t, root, Options{})
	w := open(t, s, layerRef(d), 300)
	mustWrite(t, w, 0, data[:100], 100)
	dir := filepath.Join(root, "ingest", digest.FromString(layerRef(d)).Encoded())
	for name, want := range map[string]string{"ref": layerRef(d), "total": "300", "data": string(data[:100])} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"startedat", "updatedat"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	mustWrite(t, w, 100, data[100:], 300)
	mustCommit(t, w, 300, 300, d)
	if got, err := os.ReadFile(filepath.Join(root, "blobs", "sha256", d.Encoded())); err != nil || string(got) != string(data) {
		t.Errorf("blob: %d bytes, %v", len(got), err)
	}
}

func TestWriterInProcess(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 300)
	root := t.TempDir()
	s := newStore(t, root, Options{})
	w, err := s.Writer(t.Context(), ccontent.WithRef("x"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data[:200]); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.Truncate(7), errdefs.ErrInvalidArgument)
	s = newStore(t, root, Options{}) // a crash
	if w, err = s.Writer(t.Context(), ccontent.WithRef("x")); err != nil {
		t.Fatal(err)
	}
	if got := w.Digest(); got != digest.FromBytes(data[:200]) {
		t.Fatalf("digest %s after the crash", got)
	}
	if _, err := w.Write(data[200:]); err != nil {
		t.Fatal(err)
	}
	if err := w.Commit(t.Context(), 300, d); err != nil {
		t.Fatal(err)
	}
	wantErr(t, w.Commit(t.Context(), 300, d), errdefs.ErrFailedPrecondition)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	wantBlob(t, s, data, true)
}
