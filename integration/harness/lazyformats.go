package harness

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	digest "github.com/opencontainers/go-digest"
)

// Estargz packs a layer as stargz-snapshotter's library does: gzip members, the files in an order of its own, and a table
// of contents as one more file.
func Estargz(ctx context.Context, tar TarFunc) LayerSpec {
	return LayerSpec{Compression: Gzip, Packed: func(w io.Writer) (digest.Digest, error) {
		return packedBy(ctx, w, "estargz", tar, func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) })
	}}
}

// ZstdChunked packs a layer as podman does: a zstd frame a file, and a table of contents in frames that are skipped.
func ZstdChunked(ctx context.Context, tar TarFunc) LayerSpec {
	return LayerSpec{Compression: Zstd, Packed: func(w io.Writer) (digest.Digest, error) {
		return packedBy(ctx, w, "zstd:chunked", tar, func(r io.Reader) (io.ReadCloser, error) {
			d, err := zstd.NewReader(r)
			if err != nil {
				return nil, err
			}
			return d.IOReadCloser(), nil
		})
	}}
}

// packedBy has integration/formats pack the layer, and unpacks it again for its DiffID.
func packedBy(ctx context.Context, w io.Writer, format string, tar TarFunc, unpack func(io.Reader) (io.ReadCloser, error)) (digest.Digest, error) {
	program, err := Program("packlayer")
	if err != nil {
		return "", err
	}
	var plain, blob bytes.Buffer
	if err := tar(&plain); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, program, format)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &plain, &blob, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("packlayer %s: %w", format, err)
	}
	content, err := unpack(bytes.NewReader(blob.Bytes()))
	if err != nil {
		return "", err
	}
	defer content.Close()
	diffID := digest.SHA256.Digester()
	if _, err := io.Copy(diffID.Hash(), content); err != nil {
		return "", fmt.Errorf("what packlayer wrote as %s: %w", format, err)
	}
	_, err = w.Write(blob.Bytes())
	return diffID.Digest(), err
}
