package pull

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// addPlainLayer serves a layer that is not compressed, so that wrong bytes in it
// unpack as well as the right ones. Its blob digest is its DiffID.
func (f *fixture) addPlainLayer(t *testing.T, size int) ocispec.Descriptor {
	t.Helper()
	var raw bytes.Buffer
	tw := tar.NewWriter(&raw)
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "file", Mode: 0o644, Size: int64(size)}); err != nil {
		t.Fatal(err)
	}
	if _, err := tw.Write(bytes.Repeat([]byte("layer..."), size/8)); err != nil {
		t.Fatal(err)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return f.addBlob(raw.Bytes())
}

// spoiled is the blob with another byte near its start.
func (f *fixture) spoiled(d digest.Digest) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := bytes.Clone(f.blobs[d])
	b[1000] ^= 0xff
	return b
}

// firstByte is where the requested range begins.
func firstByte(t *testing.T, r *http.Request) (from int64) {
	t.Helper()
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err != nil {
		t.Errorf("range %q: %v", r.Header.Get("Range"), err)
	}
	return from
}

// A registry sends wrong bytes and then refuses the rest. The client goes on from
// there, its commit fails, its retry brings the blob from the start: what was
// unpacked from the wrong bytes must not be believed because of the right ones.
func TestWrongBytesAreNotVouchedForByTheNextSource(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l := f.addPlainLayer(t, 4<<20)
	bad := f.spoiled(l.Digest)
	refuse := false
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		f.mu.Lock()
		refuse := refuse
		f.mu.Unlock()
		if refuse || firstByte(t, r) >= 1<<20 {
			w.WriteHeader(http.StatusForbidden)
			return true
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(bad))
		return true
	}
	f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{l.Digest})
	f.Start(t.Context(), f.images)
	ctx := namespaces.WithNamespace(t.Context(), "default")
	ref := "default/1/layer-" + l.Digest.String()
	from, err := writeAs(ctx, f.store, ref, f.blobs[l.Digest])
	if err == nil || from == 0 {
		t.Fatalf("want the commit of wrong bytes to fail after a partial takeover, got %v after %d bytes", err, from)
	}
	f.mu.Lock()
	refuse = true
	f.mu.Unlock()
	for try := 0; ; try++ {
		// What the transfer has is dropped in the background.
		from, err = writeAs(ctx, f.store, ref, f.blobs[l.Digest])
		if err == nil {
			break
		}
		if try == 3 {
			t.Fatalf("the wrong bytes stay in the way of every retry: from %d: %v", from, err)
		}
	}
	f.images.mu.Lock()
	f.images.blobs[l.Digest] = f.blobs[l.Digest]
	f.images.mu.Unlock()
	got, _, err := f.Layer(ctx, l)
	if err != nil || got != l.Digest {
		t.Errorf("want DiffID %s, got %s, %v", l.Digest, got, err)
	}
	if got, err := f.layers.Lookup(l.Digest); err != nil || got != l.Digest {
		t.Errorf("on record: want DiffID %s, got %s, %v", l.Digest, got, err)
	}
}

// slowToVouch has all bytes, and vouches for them when it is told to.
type slowToVouch struct {
	localSource
	vouch chan struct{}
}

func (s slowToVouch) Verified(ctx context.Context) error {
	select {
	case <-s.vouch:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func TestVerifyingNeedsNoWorker(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 1000)
	f.images.put(t, f.blobs[l.Digest])
	f.Start(t.Context(), f.images)
	ra, err := f.images.ReaderAt(t.Context(), l)
	if err != nil {
		t.Fatal(err)
	}
	s := slowToVouch{localSource{ra}, make(chan struct{})}
	u, err := f.unpack(t.Context(), f.unpackKey("default", l.Digest, l.Size), func() (byteSource, error) { return s, nil })
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the layer to be written", func() bool { return u.phase.Load() == phaseVerifying })
	if err := f.workers.Acquire(t.Context(), 2); err != nil { // all there are
		t.Fatal(err)
	}
	defer f.workers.Release(2)
	close(s.vouch)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got, err := u.wait(ctx); err != nil || got.DiffID != id {
		t.Errorf("want the layer although all workers are busy, got %v, %v", got, err)
	}
}
