package harness

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	stdgzip "compress/gzip"
	"fmt"
	"io"
	"math/rand/v2"
)

// archiveInput is how many bytes are packed into one archive: a wheel or a jar of a large library.
const archiveInput = 24 << 20

// Archives writes files that were compressed before: by turns zip archives of many small files, as wheels and jars are,
// and gzip streams of one large tar. Together at least size bytes and at most an archive more, the same for the same seed.
//
// gzip makes little of them, but it does make something: their bytes are not quite evenly distributed. So a packer that weighs
// each block, as Go's does, writes most blocks with Huffman codes of about 8 bits, which are slow to inflate. Of random
// bytes (see [Random]) it writes stored blocks, which cost nothing to inflate.
func Archives(prefix string, seed uint64, size int64) TarFunc {
	return func(w io.Writer) error {
		src := rand.New(rand.NewPCG(seed, 0x6172636869766573))
		pool := code(src, codePool)
		tw := tar.NewWriter(w)
		var packed bytes.Buffer
		for i, sum := 0, int64(0); sum < size; i++ {
			packed.Reset()
			pack, kind := packZip, "zip"
			if i%2 == 1 {
				pack, kind = packGzip, "gz"
			}
			if err := pack(&packed, src, pool); err != nil {
				return err
			}
			sum += int64(packed.Len())
			h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/archive%03d.%s", prefix, i, kind), Mode: 0o644, Size: int64(packed.Len()), ModTime: Epoch}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			if _, err := tw.Write(packed.Bytes()); err != nil {
				return err
			}
		}
		return tw.Close()
	}
}

func packZip(w io.Writer, src *rand.Rand, pool []byte) error {
	zw := zip.NewWriter(w)
	for i, n := range sourceSizes(src, archiveInput, 800) {
		f, err := zw.CreateHeader(&zip.FileHeader{Name: fmt.Sprintf("module%02d/file%04d.code", i/100, i), Method: zip.Deflate, Modified: Epoch})
		if err != nil {
			return err
		}
		if err := cut(f, src, pool, n); err != nil {
			return err
		}
	}
	return zw.Close()
}

func packGzip(w io.Writer, src *rand.Rand, pool []byte) error {
	zw := stdgzip.NewWriter(w)
	if err := cut(zw, src, pool, archiveInput); err != nil {
		return err
	}
	return zw.Close()
}
