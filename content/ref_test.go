package content

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func is(err, want error) bool { return errors.Is(err, want) }

func TestDigestFromRef(t *testing.T) {
	t.Parallel()
	const hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	d := digest.Digest("sha256:" + hex)
	d512 := digest.SHA512.FromString("x")
	tests := map[string]struct {
		ref  string
		want digest.Digest
	}{
		"layer":           {"default/1/layer-sha256:" + hex, d},
		"named manifest":  {"k8s.io/12/manifest-latest@sha256:" + hex, d},
		"bare":            {"sha256:" + hex, d},
		"sha512":          {"default/1/layer-" + d512.String(), d512},
		"hostile type":    {"default/1/unknown-../../\x00\nsha256:00-sha256:" + hex, d},
		"two digests":     {"default/1/" + d512.String() + "-sha256:" + hex, d},
		"longer name":     {"default/1/layer-xsha256:" + hex, ""},
		"text after":      {"default/1/layer-sha256:" + hex + " ", ""},
		"upper case":      {"default/1/layer-sha256:" + strings.ToUpper(hex), ""},
		"short":           {"default/1/layer-sha256:" + hex[1:], ""},
		"long":            {"default/1/layer-sha256:0" + hex, ""},
		"wrong algorithm": {"default/1/layer-sha512:" + hex, ""},
		"md5":             {"default/1/layer-md5:d41d8cd98f00b204e9800998ecf8427e", ""},
		"path":            {"default/1/layer-sha256:../../../../etc/passwd", ""},
		"none":            {"default/1/import", ""},
		"empty":           {"", ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, ok := digestFromRef(tt.ref)
			if got != tt.want || ok != (tt.want != "") {
				t.Fatalf("digestFromRef(%q) = %q, %t, wanted %q", tt.ref, got, ok, tt.want)
			}
		})
	}
}

func TestSplitRef(t *testing.T) {
	t.Parallel()
	tests := map[string]struct{ ref, ns, rest string }{
		"containerd's":   {"k8s.io/12/layer-x", "k8s.io", "layer-x"},
		"slashes":        {"default/1/a/b/../c", "default", "a/b/../c"},
		"no number":      {"default/one/layer", "", "default/one/layer"},
		"no rest":        {"default/1/", "", "default/1/"},
		"no namespace":   {"/1/x", "", "/1/x"},
		"a client's own": {"layer-x", "", "layer-x"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if ns, rest := splitRef(tt.ref); ns != tt.ns || rest != tt.rest {
				t.Fatalf("splitRef(%q) = %q, %q, wanted %q, %q", tt.ref, ns, rest, tt.ns, tt.rest)
			}
		})
	}
}

func FuzzRef(f *testing.F) {
	for _, ref := range []string{"", "..", "/", "a/1/b", "default/1/layer-sha256:zz", "../../x", "\x00", "sha256:" + strings.Repeat("a", 64)} {
		f.Add(ref)
	}
	s := &Store{root: "/r"}
	f.Fuzz(func(t *testing.T, ref string) {
		if d, ok := digestFromRef(ref); ok && (d.Validate() != nil || !strings.HasSuffix(ref, string(d))) {
			t.Fatalf("digestFromRef(%q) = %q", ref, d)
		}
		if _, rest := splitRef(ref); !strings.HasSuffix(ref, rest) {
			t.Fatalf("splitRef(%q) = %q", ref, rest)
		}
		if dir := s.ingestDir(ref); filepath.Dir(dir) != "/r/ingest" || len(filepath.Base(dir)) != 64 {
			t.Fatalf("ingestDir(%q) = %q", ref, dir)
		}
	})
}

// What a crash or another program left in an ingest's folder never stops the start.
func FuzzIngestFolder(f *testing.F) {
	f.Add("default/1/x", "2026-01-02T03:04:05Z", "2026-01-02T03:04:05.5Z", "7", []byte("data"))
	f.Add("x", "", "yesterday", "-1", []byte(nil))
	f.Add("", "\x00", "9999999999", "99999999999999999999", []byte("x"))
	f.Fuzz(func(t *testing.T, ref, started, updated, total string, data []byte) {
		root := t.TempDir()
		dir := (&Store{root: root}).ingestDir(ref)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, text := range map[string]string{refFile: ref, startedFile: started, updatedFile: updated, totalFile: total, dataFile: string(data)} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		s, err := NewStore(root, Options{})
		if err != nil {
			t.Fatal(err)
		}
		st, err := s.Status(t.Context(), ref)
		if err == nil && (st.Ref != ref || st.Offset != int64(len(data)) || st.Total < 0) {
			t.Fatalf("status %+v of ref %q with %d bytes", st, ref, len(data))
		}
	})
}
