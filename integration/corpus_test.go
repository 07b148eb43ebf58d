package integration

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/corpus"
	"github.com/gantryd/gantry/integration/harness"
)

// TestCorpus pulls every image of the corpus from a registry, with gantry and with overlayfs, and compares all entries.
// The snapshotter's test of the same name does so in each mode.
func TestCorpus(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	ours := newNode(t, harness.Options{GantryExtra: "[snapshotter]\nmount = \"file\"\n"})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	packings := []harness.Compression{harness.Gzip, harness.Zstd, harness.Uncompressed}
	for i, c := range corpus.Images() {
		t.Run(c.Name, func(t *testing.T) {
			var spec harness.ImageSpec
			for j, tar := range c.Tars {
				packing := packings[(i+j)%len(packings)]
				if len(tar) == 0 {
					packing = harness.Gzip // ctr refuses a blob of no bytes
				}
				spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: verbatim(tar), Compression: packing})
			}
			ways := bothWays
			if len(c.Tars) > 100 {
				ways = oneWay
			}
			im, ref := push(t, r, r.Host(), fmt.Sprint("corpus", i), spec)
			compareWays(t, ways, ours, theirs, im, ref, c.Except...)
		})
	}
	// The libraries take neither members that are there twice, nor global headers, nor holes, nor years beyond 9999 or
	// before 0.
	members := verbatim(corpus.Together("formats", corpus.Named("modes", "devices", "ids", "hard-links", "symlink-loops",
		"names-255", "names-gnu", "names-pax", "names-implied", "zeros", "xattrs")).Tars[0])
	for name, layer := range map[string]harness.LayerSpec{"eStargz": harness.Estargz(t.Context(), members), "zstd:chunked": harness.ZstdChunked(t.Context(), members)} {
		t.Run(name, func(t *testing.T) {
			upper := harness.LayerSpec{Tar: harness.Entries(harness.File("over", "it"), harness.File("whiteouts/.wh.file", ""))}
			im, ref := push(t, r, r.Host(), strings.ToLower(strings.ReplaceAll(name, ":", "")), harness.ImageSpec{Layers: []harness.LayerSpec{layer, upper}})
			compareTrees(t, ours, theirs, im, ref)
		})
	}
	t.Run("lz4", func(t *testing.T) {
		compareLZ4(t, r, ours, theirs, members)
	})
}

// compareLZ4 holds an image of lz4, which containerd's own differ cannot read, against the same layers in gzip.
func compareLZ4(t *testing.T, r *harness.Registry, ours, theirs *harness.Node, tar harness.TarFunc) {
	t.Helper()
	plain, plainRef := push(t, r, r.Host(), "plain", harness.ImageSpec{Layers: []harness.LayerSpec{{Tar: tar}}})
	packed, packedRef := push(t, r, r.Host(), "lz4", harness.ImageSpec{Layers: []harness.LayerSpec{{Tar: tar, Compression: harness.LZ4}}})
	mustPull(t, theirs, "default", plainRef)
	mustPull(t, ours, "default", packedRef)
	want, err := theirs.Tree(t.Context(), "default", plain)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ours.Tree(t.Context(), "default", packed)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range corpus.Compare(want, got, started) {
		t.Error(line)
	}
}

func verbatim(tar []byte) harness.TarFunc {
	return func(w io.Writer) error {
		_, err := w.Write(tar)
		return err
	}
}

// TestCorpusRefused pulls what is refused: nobody's pull succeeds, and gantry's says what is wrong with the image.
func TestCorpusRefused(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	ours := newNode(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	for i, c := range corpus.Refused() {
		t.Run(c.Name, func(t *testing.T) {
			var spec harness.ImageSpec
			for _, tar := range c.Tars {
				spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: verbatim(tar)})
			}
			_, ref := push(t, r, r.Host(), fmt.Sprint("refused", i), spec)
			if _, err := theirs.Pull(t.Context(), "default", ref); (err == nil) != (c.Alone != "") {
				t.Errorf("overlayfs: %v", err)
			}
			if _, err := ours.Pull(t.Context(), "default", ref); err == nil || !strings.Contains(err.Error(), c.Says) {
				t.Errorf("gantry: %v; it should say %q", err, c.Says)
			}
		})
	}
}

// zerosSize is far more than the layer may take of the disk.
const zerosSize = 10 << 30

// TestZeros pulls a file of 10 GiB of zeros, as data and as a sparse member.
func TestZeros(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	n := newNode(t, harness.Options{})
	if err := n.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	im, err := harness.BuildCached(t.Context(), "zeros-v1", harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: zeroFile, Compression: harness.Zstd},
		{Tar: verbatim(corpus.SparseZeros("sparse", zerosSize))},
	}})
	if err != nil {
		t.Fatal(err)
	}
	ref, err := im.Push(t.Context(), r.Host(), "zeros", "test")
	if err != nil {
		t.Fatal(err)
	}
	mustPull(t, n, "default", ref)
	err = n.WithRootfs(t.Context(), "default", im.DiffIDs, func(root string) error {
		for _, name := range []string{"zeros", "sparse"} {
			if err := endsOfZeros(filepath.Join(root, name)); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	var blocks int64
	err = filepath.Walk(filepath.Join(n.Dir, "gantry", "layers"), func(path string, _ os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		err = unix.Lstat(path, &st)
		blocks += st.Blocks
		return err
	})
	if err != nil || blocks*512 > 1<<20 {
		t.Errorf("the layer files take %d bytes of disk (%v)", blocks*512, err)
	}
}

// endsOfZeros looks at the size, and reads some of it everywhere.
func endsOfZeros(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() != zerosSize {
		return fmt.Errorf("%d bytes", fi.Size())
	}
	none, got := make([]byte, 1<<20), make([]byte, 1<<20)
	for at := int64(0); at < zerosSize; at += 256 << 20 {
		for _, off := range []int64{at, at + 255<<20} {
			if _, err := f.ReadAt(got, off); err != nil {
				return err
			}
			if !bytes.Equal(got, none) {
				return fmt.Errorf("no zeros at %d", off)
			}
		}
	}
	return nil
}

// TestLargeDirectory pulls 100,000 files in one directory, and then one more image that takes most of them away.
func TestLargeDirectory(t *testing.T) {
	needGantry(t)
	const files = 100_000
	r := newRegistry(t)
	ours := newNode(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs, Root: harness.Tmpfs}) // ext4 takes long to forget that many files
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	im, ref := push(t, r, r.Host(), "large-directory", harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: verbatim(corpus.ManyFiles("d", files)), Compression: harness.Zstd},
		{Tar: verbatim(corpus.ManyWhiteouts("d", files, 3)), Compression: harness.Zstd},
	}})
	compareWays(t, oneWay, ours, theirs, im, ref)
}

// zeroFile writes the file of zeros as data.
func zeroFile(w io.Writer) error {
	tw := tar.NewWriter(w)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "zeros", Mode: 0o644, Size: zerosSize, ModTime: harness.Epoch}); err != nil {
		return err
	}
	none := make([]byte, 1<<20)
	for range zerosSize / len(none) {
		if _, err := tw.Write(none); err != nil {
			return err
		}
	}
	return tw.Close()
}
