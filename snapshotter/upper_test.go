package snapshotter

import (
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/snapshotter/layer"
)

func TestUpperOptions(t *testing.T) {
	for name, tt := range map[string]struct {
		o    Options
		want string
	}{
		"unknown":   {Options{Upper: "xyz"}, `snapshotter.upper = "xyz" is neither directory nor file`},
		"too small": {Options{Upper: UpperFile, UpperSize: 1}, "snapshotter.upper_size = 1 is not from 16777216 to 1099511627776"},
		"too large": {Options{Upper: UpperFile, UpperSize: MaxUpperSize + 1}, "snapshotter.upper_size = 1099511627777 is not"},
	} {
		t.Run(name, func(t *testing.T) {
			checkRefused(t, tt.o, tt.want)
		})
	}
	t.Run("no mkfs.ext4", func(t *testing.T) {
		defer func(old []string) { mkfsPlaces = old }(mkfsPlaces)
		mkfsPlaces = []string{"/nowhere/mkfs.ext4"}
		checkRefused(t, Options{Upper: UpperFile}, `snapshotter.upper = "file" does not work in`)
		checkRefused(t, Options{Upper: UpperFile}, "mkfs.ext4 is not installed (package e2fsprogs)")
		// Directories do not need it.
		r := newRigIn(t, t.TempDir(), Options{Upper: UpperDirectory})
		if st := r.Status(); st.Upper != UpperDirectory || st.UpperSize != 0 {
			t.Errorf("status %+v", st)
		}
	})
}

func checkRefused(t *testing.T, o Options, want string) {
	t.Helper()
	dir := t.TempDir()
	cache, err := layer.Open(dir+"/layers", layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(t.Context(), dir+"/root", cache, o)
	if err == nil {
		_ = s.Close()
	}
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want an error with %q", err, want)
	}
}

// TestFileSize says which snapshots get a file, and of what size.
func TestFileSize(t *testing.T) {
	chain := digest.FromString("x").String()
	unpack := "extract-123456789-AbC_ " + chain
	maxSize := func(v string) map[string]string { return map[string]string{snapshots.LabelSnapshotMaxSize: v} }
	for name, tt := range map[string]struct {
		kind   snapshots.Kind
		key    string
		labels map[string]string
		want   int64
	}{
		"container":                    {key: "k8s.io/7/0123abcd", want: 64 << 20},
		"view":                         {kind: snapshots.KindView, key: "k8s.io/7/0123abcd"},
		"unpack":                       {key: unpack},
		"unpack, as containerd has it": {key: "default/12/" + unpack},
		"unpack with a size":           {key: unpack, labels: maxSize("268435456")}, // from an image's annotations
		"named like an unpack":         {key: "extract-me", want: 64 << 20},
		"named even more like one":     {key: "extract-1 sha256:xyz", want: 64 << 20},
		// A pod's annotations become labels: they must not take the bound away.
		"labelled as an unpack": {key: "0123abcd", labels: map[string]string{snapshots.LabelSnapshotRef: chain, snapshots.LabelSnapshotDiffID: chain}, want: 64 << 20},
		"max-size":              {key: "c", labels: maxSize("268435456"), want: 256 << 20},
		"less":                  {key: "c", labels: maxSize("33554432"), want: 32 << 20},
		"no whole block":        {key: "c", labels: maxSize("33558527"), want: 32 << 20},
		"below the least":       {key: "c", labels: maxSize("1048576"), want: MinUpperSize},
		"beyond the most":       {key: "c", labels: maxSize("9223372036854775807"), want: MaxUpperSize},
		// As containerd's erofs snapshotter has it.
		"empty":           {key: "c", labels: maxSize(""), want: 64 << 20},
		"no number":       {key: "c", labels: maxSize("100MB"), want: 64 << 20},
		"zero":            {key: "c", labels: maxSize("0"), want: 64 << 20},
		"negative":        {key: "c", labels: maxSize("-1"), want: 64 << 20},
		"beyond a number": {key: "c", labels: maxSize("9223372036854775808"), want: 64 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.kind == snapshots.KindUnknown {
				tt.kind = snapshots.KindActive
			}
			info := snapshots.Info{Kind: tt.kind, Name: tt.key, Labels: tt.labels}
			s := &Snapshotter{uppers: &uppers{size: 64 << 20}}
			if got := s.fileSize(t.Context(), info); got != tt.want {
				t.Errorf("with files: %d, want %d", got, tt.want)
			}
			if got := new(Snapshotter).fileSize(t.Context(), info); got != 0 {
				t.Errorf("with directories: %d, want 0", got)
			}
		})
	}
}
