package transfer

import (
	"bytes"
	"crypto/sha256"
	"hash"
	"sync/atomic"
	"testing"

	"github.com/gantryd/gantry/content/sha256x2"
)

// countingHash tells how much was hashed.
type countingHash struct {
	hash.Hash
	n *atomic.Int64
}

func (h countingHash) Write(p []byte) (int, error) {
	h.n.Add(int64(len(p)))
	return h.Hash.Write(p)
}

// TestNewHash has blobs and their chunks hashed by what the options say, several at once, and a wrong blob found by it.
func TestNewHash(t *testing.T) {
	t.Parallel()
	var (
		pool sha256x2.Pool
		n    atomic.Int64
	)
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, NewHash: func() hash.Hash { return countingHash{pool.New(), &n} }})
	kept, a := randomBlob(80, 9<<20+5)
	discarded, b := randomBlob(81, 7<<20+77)
	wrong, c := randomBlob(82, 3<<20)
	c.Digest = a.Digest
	ha, hb := join(t, m, a, &fakeSource{host: "a", data: kept}), joinDiscarding(t, m, b, &fakeSource{host: "a", data: discarded})
	unpack := join(t, m, b)
	if got := unpackAll(t, unpack); !bytes.Equal(got, discarded) {
		t.Error("other bytes were read")
	}
	wait(t, ha)
	wait(t, hb)
	wantSums(t, hb, discarded)
	if got, want := n.Load(), a.Size+2*b.Size; got != want {
		t.Errorf("%d bytes were hashed by NewHash, want %d", got, want)
	}
	if err := join(t, m, c, &fakeSource{host: "a", data: wrong}).Wait(t.Context()); err == nil {
		t.Errorf("bytes that hash to %x passed for %s", sha256.Sum256(wrong), c.Digest)
	}
}
