package differ

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"

	"github.com/gantryd/gantry/snapshotter"
	"github.com/gantryd/gantry/snapshotter/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// unpacked is a Layers whose layers are all unpacked.
type unpacked map[digest.Digest]*layer.Layer

func (u unpacked) Layer(_ context.Context, desc ocispec.Descriptor) (digest.Digest, int64, error) {
	l := u[desc.Digest]
	if l == nil {
		return "", 0, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return l.DiffID, l.Size, nil
}

type rig struct {
	*Differ
	snapshots *snapshotter.Snapshotter
	cache     *layer.Cache
	blobs     ccontent.Store
	layers    unpacked
}

func newRig(t *testing.T) *rig {
	t.Helper()
	dir := t.TempDir()
	r := &rig{layers: unpacked{}}
	var err error
	if r.blobs, err = local.NewStore(filepath.Join(dir, "content")); err != nil {
		t.Fatal(err)
	}
	if r.cache, err = layer.Open(filepath.Join(dir, "layers"), layer.Options{}); err != nil {
		t.Fatal(err)
	}
	if r.snapshots, err = snapshotter.New(context.WithoutCancel(t.Context()), filepath.Join(dir, "root"), r.cache, snapshotter.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.snapshots.Close(); err != nil {
			t.Error(err)
		}
		for _, id := range mountPoints(t, filepath.Join(dir, "root", "mnt")) {
			if err := mount.UnmountAll(id, 0); err != nil {
				t.Error(err)
			}
		}
	})
	r.Differ = New(r.layers, r.snapshots, r.blobs)
	return r
}

func mountPoints(t *testing.T, dir string) (paths []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range list {
		paths = append(paths, filepath.Join(dir, e.Name()))
	}
	return paths
}

// add stores a compressed layer of one file, as blob and as layer file.
func (r *rig) add(t *testing.T, name string) ocispec.Descriptor {
	t.Helper()
	var plain, blob bytes.Buffer
	w := tar.NewWriter(&plain)
	z := gzip.NewWriter(&blob)
	err := errors.Join(
		w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(name))}),
		func() error { _, err := w.Write([]byte(name)); return err }(),
		w.Close(),
		func() error { _, err := z.Write(plain.Bytes()); return err }(),
		z.Close(),
	)
	if err != nil {
		t.Fatal(err)
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromBytes(blob.Bytes()), Size: int64(blob.Len())}
	if err := ccontent.WriteBlob(t.Context(), r.blobs, name, &blob, desc); err != nil {
		t.Fatal(err)
	}
	if r.layers[desc.Digest], err = r.cache.Write(t.Context(), &plain, nil); err != nil {
		t.Fatal(err)
	}
	return desc
}

func (r *rig) wants(desc ocispec.Descriptor) ocispec.Descriptor {
	l := r.layers[desc.Digest]
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: l.Size}
}

func files(t *testing.T, mounts []mount.Mount) (names []string) {
	t.Helper()
	err := mount.WithTempMount(t.Context(), mounts, func(root string) error {
		list, err := os.ReadDir(root)
		for _, e := range list {
			names = append(names, e.Name())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func TestApplyAdopts(t *testing.T) {
	r := newRig(t)
	desc := r.add(t, "a")
	mounts, err := r.snapshots.Prepare(t.Context(), "k", "")
	if err != nil {
		t.Fatal(err)
	}
	var progress int64
	// What CRI sends with every layer, encrypted or not.
	payload := diff.WithPayloads(map[string]typeurl.Any{"io.containerd.ocicrypt.v1.payload": nil})
	got, err := r.Apply(t.Context(), desc, mounts, payload, diff.WithProgress(func(_ ocispec.Descriptor, n int64) { progress = n }))
	if err != nil {
		t.Fatal(err)
	}
	if want := r.wants(desc); got.Digest != want.Digest || got.Size != want.Size || got.MediaType != want.MediaType {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if progress != desc.Size {
		t.Errorf("progress %d, want %d", progress, desc.Size)
	}
	if st := r.snapshots.Status(); st.TarLayers != 1 {
		t.Errorf("not adopted: %+v", st)
	}
}

// TestApplyTakesLZ4 has a media type that containerd does not know, but lets through.
func TestApplyTakesLZ4(t *testing.T) {
	r := newRig(t)
	desc := r.add(t, "a")
	desc.MediaType = ocispec.MediaTypeImageLayer + "+lz4"
	mounts, err := r.snapshots.Prepare(t.Context(), "k", "")
	if err != nil {
		t.Fatal(err)
	}
	got, err := r.Apply(t.Context(), desc, mounts)
	if want := r.wants(desc); err != nil || got.Digest != want.Digest || got.Size != want.Size {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	foreign := []mount.Mount{{Type: "bind", Source: t.TempDir(), Options: []string{"rw", "rbind"}}}
	if _, err := r.Apply(t.Context(), desc, foreign); !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "lz4") {
		t.Errorf("onto foreign mounts: got %v, want ErrNotImplemented that names lz4", err)
	}
	desc.MediaType += "+encrypted"
	var out bytes.Buffer
	logger := logrus.New()
	logger.SetOutput(&out)
	if _, err := r.Apply(log.WithLogger(t.Context(), logrus.NewEntry(logger)), desc, mounts); !errors.Is(err, ErrStreamProcessor) {
		t.Errorf("encrypted: got %v, want ErrStreamProcessor", err)
	}
	if !strings.Contains(out.String(), desc.Digest.String()) || !strings.Contains(out.String(), "stream processor") {
		t.Errorf("encrypted: the log says %q", out.String())
	}
}

func TestApplySecondLayerGoesOverTheFirst(t *testing.T) {
	r := newRig(t)
	mounts, err := r.snapshots.Prepare(t.Context(), "k", "")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b", "c"} {
		desc := r.add(t, name)
		got, err := r.Apply(t.Context(), desc, mounts)
		if err != nil {
			t.Fatal(err)
		}
		if want := r.wants(desc); got.Digest != want.Digest || got.Size != want.Size {
			t.Errorf("%s: got %+v, want %+v", name, got, want)
		}
	}
	if got := fmt.Sprint(files(t, mounts)); got != "[a b c]" {
		t.Errorf("got %s, want [a b c]", got)
	}
}

func TestApplyOntoForeignMounts(t *testing.T) {
	r := newRig(t)
	desc := r.add(t, "a")
	mounts := []mount.Mount{{Type: "bind", Source: t.TempDir(), Options: []string{"rw", "rbind"}}}
	got, err := r.Apply(t.Context(), desc, mounts)
	if err != nil {
		t.Fatal(err)
	}
	if want := r.wants(desc); got.Digest != want.Digest {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if got := fmt.Sprint(files(t, mounts)); got != "[a]" {
		t.Errorf("got %s, want [a]", got)
	}
	// A DiffID that the blob does not have is found out.
	r.layers[desc.Digest] = r.layers[r.add(t, "b").Digest]
	if _, err := r.Apply(t.Context(), desc, mounts); !errdefs.IsDataLoss(err) {
		t.Errorf("got %v, want ErrDataLoss", err)
	}
}

func TestApplyErrorsNameTheLayer(t *testing.T) {
	r := newRig(t)
	desc := r.add(t, "a")
	broken := errors.New("broken")
	tests := []struct {
		name   string
		desc   ocispec.Descriptor
		layers Layers
		adopt  error
		is     error
	}{
		{"unknown blob", ocispec.Descriptor{MediaType: desc.MediaType, Digest: digest.FromString("x")}, r.layers, nil, errdefs.ErrNotFound},
		{"encrypted", ocispec.Descriptor{MediaType: desc.MediaType + "+encrypted", Digest: desc.Digest}, r.layers, nil, ErrStreamProcessor},
		{"encrypted, not compressed", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer + "+encrypted", Digest: desc.Digest}, r.layers, nil, ErrStreamProcessor},
		{"no layer", ocispec.Descriptor{MediaType: "application/vnd.cncf.model", Digest: desc.Digest}, r.layers, nil, ErrStreamProcessor},
		{"no media type", ocispec.Descriptor{Digest: desc.Digest}, r.layers, nil, ErrStreamProcessor},
		{"adoption fails", desc, r.layers, broken, broken},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := New(tt.layers, failing{tt.adopt}, r.blobs)
			_, err := d.Apply(t.Context(), tt.desc, nil)
			if !errors.Is(err, tt.is) {
				t.Errorf("got %v, want %v", err, tt.is)
			}
			if err != nil && !strings.Contains(err.Error(), tt.desc.Digest.String()) {
				t.Errorf("%v does not name the layer", err)
			}
		})
	}
	if !errdefs.IsNotImplemented(ErrStreamProcessor) {
		t.Error("containerd would not ask the next differ")
	}
	if _, err := r.Compare(t.Context(), nil, nil); !errdefs.IsNotImplemented(err) {
		t.Errorf("Compare: got %v, want ErrNotImplemented", err)
	}
}

type failing struct{ err error }

// sweptOnce is an adopter whose layer file is gone at the first try.
type sweptOnce struct {
	Adopter
	tries int
}

func (s *sweptOnce) Adopt(ctx context.Context, mounts []mount.Mount, diffID digest.Digest) error {
	if s.tries++; s.tries == 1 {
		return fmt.Errorf("layer %s: %w", diffID, errdefs.ErrUnavailable)
	}
	return s.Adopter.Adopt(ctx, mounts, diffID)
}

// The last image that had the layer is removed between the unpack and its adoption.
func TestApplyOfASweptLayer(t *testing.T) {
	r := newRig(t)
	mounts, err := r.snapshots.Prepare(t.Context(), "a", "")
	if err != nil {
		t.Fatal(err)
	}
	desc := r.add(t, "layer")
	s := &sweptOnce{Adopter: r.snapshots}
	if _, err := New(r.layers, s, r.blobs).Apply(t.Context(), desc, mounts); err != nil || s.tries != 2 {
		t.Errorf("after %d tries: %v", s.tries, err)
	}
}

func (f failing) Adopt(context.Context, []mount.Mount, digest.Digest) error { return f.err }
