package pull

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pierrec/lz4/v4"
)

// TestLZ4LayersUnpack pulls layers of a media type that only gantry knows: one
// in the LZ4 frame format, one in Apple's framing.
func TestLZ4LayersUnpack(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	var layers []ocispec.Descriptor
	var ids []digest.Digest
	for i, pack := range []func(*testing.T, []byte) []byte{lz4Framed, appleFramed} {
		raw := textTar(t, string(rune('a'+i)))
		l := f.addBlob(pack(t, raw))
		l.MediaType = ocispec.MediaTypeImageLayer + "+lz4"
		layers, ids = append(layers, l), append(ids, digest.FromBytes(raw))
	}
	f.addImage(t, "default", layers, ids)
	f.Start(t.Context(), f.images)
	for i, l := range layers {
		if err := f.take(t, "default", l); err != nil {
			t.Fatal(err)
		}
		f.images.mu.Lock()
		f.images.blobs[l.Digest] = f.blobs[l.Digest] // committed
		f.images.mu.Unlock()
		got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l)
		if err != nil || got != ids[i] {
			t.Errorf("layer %d: got DiffID %s, %v; want %s", i, got, err, ids[i])
		}
	}
}

// textTar is a tar of one file of 300 KiB that compresses well.
func textTar(t *testing.T, name string) []byte {
	t.Helper()
	data := bytes.Repeat([]byte("the contents of "+name+", "), 300<<10/20)
	var raw bytes.Buffer
	w := tar.NewWriter(&raw)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return raw.Bytes()
}

func lz4Framed(t *testing.T, raw []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := lz4.NewWriter(&b)
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// appleFramed writes blocks of 64 KiB, each with its lengths, and an end.
func appleFramed(t *testing.T, raw []byte) []byte {
	t.Helper()
	var out []byte
	for len(raw) > 0 {
		n := min(len(raw), 64<<10)
		block := make([]byte, lz4.CompressBlockBound(n))
		size, err := lz4.CompressBlock(raw[:n], block, nil)
		if err != nil {
			t.Fatal(err)
		}
		out = binary.LittleEndian.AppendUint32(append(out, "bv41"...), uint32(n))
		out = binary.LittleEndian.AppendUint32(out, uint32(size))
		out = append(out, block[:size]...)
		raw = raw[n:]
	}
	return append(out, "bv4$"...)
}
