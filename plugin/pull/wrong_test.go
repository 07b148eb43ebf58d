package pull

import (
	"bytes"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content"
)

// TestWrongBytesAreNamed has the registry send other bytes than those that the layer's digest names. One wrong reply costs
// a second try and nothing else; when no try is right the client reads which image, layer and host it was.
func TestWrongBytesAreNamed(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name  string
		wrong int // replies for the layer that are wrong
	}{
		{"once", 1},
		{"always", 1 << 30},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, false)
			l, id := f.addLayer(t, 1, 1<<16)
			var wrong atomic.Int32
			f.answer = func(w http.ResponseWriter, r *http.Request) bool {
				if !strings.HasSuffix(r.URL.Path, l.Digest.String()) || int(wrong.Add(1)) > tc.wrong {
					return false
				}
				b := bytes.Clone(f.blobs[l.Digest])
				b[len(b)/2] ^= 1
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(b))
				return true
			}
			f.addImage(t, "default", []ocispec.Descriptor{l}, []digest.Digest{id})
			f.Start(t.Context(), f.images)
			err := f.take(t, "default", l)
			if tc.wrong == 1 {
				if err != nil {
					t.Fatal(err)
				}
				if got, _, err := f.Layer(namespaces.WithNamespace(t.Context(), "default"), l); err != nil || got != id {
					t.Errorf("layer %s, %v; want %s", got, err, id)
				}
				return
			}
			if !errors.Is(err, content.ErrRefused) || !errdefs.IsDataLoss(err) {
				t.Fatalf("got %v, want a refusal for data loss", err)
			}
			for _, want := range []string{f.host() + "/test/image:latest", "layer " + l.Digest.String(), "digest mismatch: " + f.host() + " sent"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("want %q in %q", want, err)
				}
			}
		})
	}
}
