package transfer

import (
	"context"
	"io"
	"testing"
)

// BenchmarkTransfer fetches a blob from memory: what is measured is storing, hashing and making durable.
func BenchmarkTransfer(b *testing.B) {
	data, blob := randomBlob(1, 256<<20)
	b.SetBytes(blob.Size)
	b.ReportAllocs()
	for b.Loop() {
		m := newManager(b, b.TempDir(), Options{})
		h := join(b, m, blob, &fakeSource{host: "a", data: data})
		wait(b, h)
		_ = h.Close()
		if err := m.Forget(blob.Digest); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkResume continues a blob whose last chunk is missing: recorded blocks are checked and hashed.
func BenchmarkResume(b *testing.B) {
	data, blob := randomBlob(1, 256<<20)
	root := b.TempDir()
	m := newManager(b, root, Options{})
	h := join(b, m, blob, &fakeSource{host: "a", data: data, reply: stopAfter(blob.Size - 8<<20)})
	if err := h.Wait(b.Context()); err == nil {
		b.Fatal("complete")
	}
	_ = h.Close()
	b.SetBytes(blob.Size)
	for b.Loop() {
		h := join(b, m, blob, &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{}, io.ErrNoProgress
		}})
		if _, err := h.ReadAt(b.Context(), make([]byte, 1), blob.Size-8<<20-1); err != nil {
			b.Fatal(err)
		}
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
		_ = h.Close()
		m = newManager(b, root, Options{})
	}
}
