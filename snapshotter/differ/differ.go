// Package differ is containerd's diff service for layers that gantry holds: it
// has the snapshotter adopt the layer file instead of unpacking it again.
package differ

import (
	"context"
	"fmt"
	"slices"
	"strings"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// ErrStreamProcessor is returned by Apply for a media type that one of
// containerd's stream processors has to turn into a tar, such as an encrypted
// layer. They run in containerd only; with it in the list of differs, its own
// walking differ is asked next.
var ErrStreamProcessor = fmt.Errorf("needs a stream processor, which only containerd's own differ runs (differ = \"walking\" in the unpack configuration): %w", errdefs.ErrNotImplemented)

// Layers finds the layer file of a blob.
type Layers interface {
	// Layer returns the DiffID of a blob and the size of the uncompressed tar
	// in bytes, when the layer file is there: it waits for an unpack under way,
	// or unpacks. The namespace is in ctx. It must compute the DiffID from the
	// verified blob, never from a label.
	Layer(ctx context.Context, desc ocispec.Descriptor) (diffID digest.Digest, size int64, err error)
}

// Adopter makes a layer file the content of an active snapshot.
type Adopter interface {
	// Adopt returns ErrNotFound for mounts that are not its own,
	// ErrFailedPrecondition for a snapshot that has content already, and
	// ErrUnavailable if the layer file is gone.
	Adopt(ctx context.Context, mounts []mount.Mount, diffID digest.Digest) error
}

// Differ implements containerd's diff.Applier and diff.Comparer.
type Differ struct {
	layers   Layers
	adopter  Adopter
	fallback diff.Applier
}

var (
	_ diff.Applier  = (*Differ)(nil)
	_ diff.Comparer = (*Differ)(nil)
)

// New returns a Differ that reads blobs only where no snapshot can adopt.
func New(layers Layers, a Adopter, blobs ccontent.Provider) *Differ {
	return &Differ{layers: layers, adopter: a, fallback: apply.NewFileSystemApplier(blobs)}
}

// adoptTries bounds how often the layer file may be swept before it is linked:
// the last image that had it is removed while this one is pulled.
const adoptTries = 3

// Apply makes the layer desc the content of the snapshot behind mounts, and
// returns the uncompressed layer: its DiffID and size. Where the mounts cannot
// adopt, the blob is unpacked onto them as containerd does it. A media type that
// needs a stream processor gives ErrStreamProcessor; the payloads that CRI sends
// with every layer are for those processors and ignored otherwise.
func (d *Differ) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	var config diff.ApplyConfig
	for _, o := range opts {
		if err := o(ctx, desc, &config); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
	}
	if !isTar(ctx, desc.MediaType) {
		err := fmt.Errorf("layer %s: media type %q %w", desc.Digest, desc.MediaType, ErrStreamProcessor)
		// containerd's transfer service replaces what is not implemented by an error that says neither layer nor reason.
		log.G(ctx).WithError(err).Warn("a layer is not unpacked here")
		return ocispec.Descriptor{}, err
	}
	var diffID digest.Digest
	var size int64
	var err error
	for range adoptTries {
		if diffID, size, err = d.layers.Layer(ctx, desc); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: unpack: %w", desc.Digest, err)
		}
		if err = d.adopter.Adopt(ctx, mounts, diffID); !errdefs.IsUnavailable(err) {
			break
		}
	}
	if errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
		log.G(ctx).WithField("digest", desc.Digest).WithError(err).Debug("differ: unpacking onto the mounts")
		return d.unpack(ctx, desc, mounts, diffID, opts)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	if config.Progress != nil {
		config.Progress(desc.Size)
	}
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: diffID, Size: size}, nil
}

func (d *Differ) unpack(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, diffID digest.Digest, opts []diff.ApplyOpt) (ocispec.Descriptor, error) {
	if strings.HasSuffix(desc.MediaType, "+"+lz4) {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: lz4 can only be unpacked into one of gantry's snapshots that is empty: %w", desc.Digest, errdefs.ErrNotImplemented)
	}
	got, err := d.fallback.Apply(ctx, desc, mounts, opts...)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: unpack onto its mounts: %w", desc.Digest, err)
	}
	if got.Digest != diffID {
		return ocispec.Descriptor{}, fmt.Errorf("layer %s: unpacked to %s, expected %s: %w", desc.Digest, got.Digest, diffID, errdefs.ErrDataLoss)
	}
	return got, nil
}

// lz4 is the suffix of a media type that containerd's unpacker lets through, but
// whose layers its own differs take for plain tars.
const lz4 = "lz4"

// isTar says whether a blob of this type is a tar, compressed or not. A suffix
// that is no compression, such as +encrypted, wraps the tar in something else.
func isTar(ctx context.Context, mediaType string) bool {
	if _, err := images.DiffCompression(ctx, mediaType); err != nil {
		return false
	}
	_, suffixes, _ := strings.Cut(mediaType, "+")
	return suffixes == "" || slices.Contains([]string{"gzip", "zstd", lz4}, suffixes)
}

// Compare returns ErrNotImplemented: containerd's walking differ does it.
func (d *Differ) Compare(context.Context, []mount.Mount, []mount.Mount, ...diff.Opt) (ocispec.Descriptor, error) {
	return ocispec.Descriptor{}, fmt.Errorf("compare: use containerd's walking differ: %w", errdefs.ErrNotImplemented)
}
