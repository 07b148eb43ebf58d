package pull

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"math/rand/v2"
	"testing"

	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// noiseLayer is a layer of one file of random bytes, gzipped as such files are.
func noiseLayer(b *testing.B, size int) (blob []byte, id digest.Digest) {
	b.Helper()
	var packed bytes.Buffer
	packed.Grow(size + size/1000)
	diffID := digest.SHA256.Digester()
	zw, err := gzip.NewWriterLevel(&packed, gzip.NoCompression)
	if err != nil {
		b.Fatal(err)
	}
	tw := tar.NewWriter(both{zw, diffID.Hash()})
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "model", Mode: 0o644, Size: int64(size)}); err != nil {
		b.Fatal(err)
	}
	noise := make([]byte, 1<<20)
	src := rand.NewChaCha8([32]byte{1})
	for left := size; left > 0; left -= len(noise) {
		_, _ = src.Read(noise)
		if _, err := tw.Write(noise[:min(left, len(noise))]); err != nil {
			b.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		b.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		b.Fatal(err)
	}
	return packed.Bytes(), diffID.Digest()
}

type both [2]interface{ Write([]byte) (int, error) }

func (w both) Write(p []byte) (int, error) {
	if n, err := w[0].Write(p); err != nil {
		return n, err
	}
	return w[1].Write(p)
}

// BenchmarkTail pulls a layer of 1 GB over loopback and says how long after its last byte it was durable and on record.
func BenchmarkTail(b *testing.B) {
	blob, id := noiseLayer(b, 1_000_000_000)
	for b.Loop() {
		f := newFixture(b, false)
		l := f.addBlob(blob)
		f.addImage(b, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
		f.Start(b.Context(), f.images)
		if err := f.take(b, "default", l); err != nil {
			b.Fatal(err)
		}
		if u := f.running(f.unpackKey("default", l.Digest, l.Size)); u != nil {
			if _, err := u.wait(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		r := f.Recent()[0]
		b.ReportMetric(r.TailSeconds, "tail-s")
		b.Log(fmt.Sprintf("%+v", r.Seconds))
	}
}
