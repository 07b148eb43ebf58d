// Command packlayer packs a layer's tar as lazy-pulling snapshotters want it, with the
// libraries that make such layers for registries. Tests pull what it makes.
//
//	packlayer estargz|zstd:chunked < layer.tar > blob
package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containers/storage/pkg/chunked/compressor"
)

func main() {
	if len(os.Args) != 2 {
		fail(errors.New("usage: packlayer estargz|zstd:chunked < layer.tar > blob"))
	}
	layer, err := io.ReadAll(os.Stdin)
	if err == nil {
		err = pack(os.Stdout, os.Args[1], layer)
	}
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "packlayer:", err)
	os.Exit(1)
}

func pack(w io.Writer, format string, layer []byte) error {
	switch format {
	case "estargz":
		return packStargz(w, layer)
	case "zstd:chunked":
		return packChunked(w, layer)
	}
	return fmt.Errorf("unknown format %q", format)
}

// packStargz adds the table of contents, and the landmark that no file was prioritised.
func packStargz(w io.Writer, layer []byte) error {
	blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer), 0, int64(len(layer))), estargz.WithChunkSize(4096))
	if err != nil {
		return err
	}
	_, err = io.Copy(w, blob)
	return errors.Join(err, blob.Close())
}

// packChunked writes a zstd frame for each file, and the table of contents in frames that are skipped.
func packChunked(w io.Writer, layer []byte) error {
	packer, err := compressor.ZstdCompressor(w, map[string]string{}, nil)
	if err != nil {
		return err
	}
	_, err = packer.Write(layer)
	return errors.Join(err, packer.Close())
}
