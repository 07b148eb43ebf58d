package harness

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"io"
	"strings"
	"testing"
)

// Images that are compared must be the same each time, and what they claim to be.
func TestSources(t *testing.T) {
	const size, files = 20_000_000, 700
	var first, second bytes.Buffer
	if err := Sources("usr/lib", 1, size, files)(&first); err != nil {
		t.Fatal(err)
	}
	if err := Sources("usr/lib", 1, size, files)(&second); err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(first.Bytes()) != sha256.Sum256(second.Bytes()) {
		t.Error("the same description gave two tars")
	}
	if got := float64(packed(t, first.Bytes())) / float64(first.Len()); got < 0.22 || got > 0.30 {
		t.Errorf("gzip made %.2f of it, want a quarter", got)
	}
	regular, sum, known := 0, int64(0), map[string]bool{"": true}
	for _, h := range headers(t, &first) {
		dir := h.Name[:strings.LastIndexByte(strings.TrimSuffix(h.Name, "/"), '/')+1]
		if !known[dir] {
			t.Errorf("%s comes before its directory", h.Name)
		}
		if h.Typeflag == tar.TypeDir {
			known[h.Name] = true
			continue
		}
		regular, sum = regular+1, sum+h.Size
	}
	if regular != files || sum > size || sum < size*997/1000 {
		t.Errorf("%d files of %d bytes, want %d of about %d", regular, sum, files, size)
	}
}

// What was compressed before is worth a little to gzip, and so is not stored.
func TestArchives(t *testing.T) {
	var first, second, blob bytes.Buffer
	if err := Archives("wheels", 1, 8_000_000)(&first); err != nil {
		t.Fatal(err)
	}
	if err := Archives("wheels", 1, 8_000_000)(&second); err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(first.Bytes()) != sha256.Sum256(second.Bytes()) {
		t.Error("the same description gave two tars")
	}
	if _, err := (LayerSpec{Tar: func(w io.Writer) error { _, err := w.Write(first.Bytes()); return err }, Compression: GzipGo}).write(&blob); err != nil {
		t.Fatal(err)
	}
	saved := 1 - float64(blob.Len())/float64(first.Len())
	if saved < 0.003 || saved > 0.03 {
		t.Errorf("gzip saved %.2f %%, want about 0.7 %%, as of a tar of Go's sources", 100*saved)
	}
	t.Logf("gzip saves %.2f %%", 100*saved)
}

// Concat's tar ends once, behind the last member.
func TestConcat(t *testing.T) {
	var b bytes.Buffer
	if err := Concat(Random("a", 1, 100_000, 3), Entries(Folder("b", 0o755)), Text("c", 2, 50_000, 2))(&b); err != nil {
		t.Fatal(err)
	}
	if n := b.Len() % 512; n != 0 {
		t.Errorf("%d bytes too many for blocks", n)
	}
	var names []string
	for _, h := range headers(t, &b) {
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); got != "a/000 a/001 a/002 b/ c/000 c/001" {
		t.Errorf("members are %s", got)
	}
}

func headers(t *testing.T, r io.Reader) []*tar.Header {
	t.Helper()
	var all []*tar.Header
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, h)
	}
}

func packed(t *testing.T, data []byte) int {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Len()
}
