package harness

import (
	stdgzip "compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pierrec/lz4/v4"
	"golang.org/x/sync/errgroup"
)

// Compression names how a layer's tar is packed.
type Compression string

// The compressions that images use. The zero value is Gzip.
const (
	Gzip         Compression = "gzip"
	GzipFast     Compression = "gzip-1"  // the fastest level, for what is large
	GzipGo       Compression = "gzip-go" // by Go's own package, with which docker and BuildKit pack layers; slower, and it stores fewer blocks
	Zstd         Compression = "zstd"
	Uncompressed Compression = "none"
	LZ4          Compression = "lz4" // which containerd's own differ does not know
)

// LayerSpec describes one layer.
type LayerSpec struct {
	Tar         TarFunc
	Compression Compression
	// Packed writes the blob itself, in place of Tar and Compression (which still decides the media type), and returns
	// the DiffID.
	Packed func(w io.Writer) (digest.Digest, error)
	// Mangle changes the compressed file before its digest is taken: a blob
	// that is sent as the manifest says, and is broken inside.
	Mangle func(f *os.File) error
}

// ImageSpec describes an image. The same description gives the same digests.
type ImageSpec struct {
	Layers []LayerSpec
	Docker bool // media types of Docker's schema 2 instead of OCI's
	Config ocispec.ImageConfig
	// Edit changes manifest and config before they are written, for images that lie.
	// The config's descriptor in the manifest is filled in afterwards.
	Edit func(m *ocispec.Manifest, c *ocispec.Image)
}

// Image is a built image: its blobs are files, named by digest, in one folder.
type Image struct {
	dir      string
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	Layers   []ocispec.Descriptor // as the manifest lists them
	DiffIDs  []digest.Digest      // as the config lists them
}

// Docker's names for what OCI has media types of its own.
const (
	dockerManifest  = "application/vnd.docker.distribution.manifest.v2+json"
	dockerConfig    = "application/vnd.docker.container.image.v1+json"
	dockerLayer     = "application/vnd.docker.image.rootfs.diff.tar"
	dockerLayerGzip = "application/vnd.docker.image.rootfs.diff.tar.gzip"
)

// Dir returns the folder of the image's blobs.
func (im *Image) Dir() string { return im.dir }

// Size returns the compressed size of all layers in bytes.
func (im *Image) Size() int64 {
	var n int64
	for _, l := range im.Layers {
		n += l.Size
	}
	return n
}

// Build makes an image and leaves its blobs in dir, which it creates.
func Build(ctx context.Context, dir string, spec ImageSpec) (*Image, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	im := &Image{dir: dir, Layers: make([]ocispec.Descriptor, len(spec.Layers)), DiffIDs: make([]digest.Digest, len(spec.Layers))}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.NumCPU())
	for i, l := range spec.Layers {
		g.Go(func() (err error) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			im.Layers[i], im.DiffIDs[i], err = im.layer(l, spec.Docker)
			if err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return im, im.describe(spec)
}

// describe writes config and manifest.
func (im *Image) describe(spec ImageSpec) error {
	created := Epoch
	config := ocispec.Image{
		Created:  &created,
		Platform: ocispec.Platform{OS: runtime.GOOS, Architecture: runtime.GOARCH},
		Config:   spec.Config,
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: im.DiffIDs},
	}
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Layers:    im.Layers,
	}
	configType := ocispec.MediaTypeImageConfig
	if spec.Docker {
		manifest.MediaType, configType = dockerManifest, dockerConfig
	}
	if spec.Edit != nil {
		spec.Edit(&manifest, &config)
	}
	var err error
	if im.Config, err = im.json(configType, config); err != nil {
		return err
	}
	manifest.Config, im.Layers, im.DiffIDs = im.Config, manifest.Layers, config.RootFS.DiffIDs
	im.Manifest, err = im.json(manifest.MediaType, manifest)
	return err
}

func (im *Image) json(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, os.WriteFile(im.path(desc.Digest), data, 0o600)
}

func (im *Image) path(d digest.Digest) string { return filepath.Join(im.dir, d.Encoded()) }

// layer writes one layer's blob and returns its descriptor and DiffID.
func (im *Image) layer(spec LayerSpec, docker bool) (desc ocispec.Descriptor, diffID digest.Digest, err error) {
	f, err := os.CreateTemp(im.dir, "layer-")
	if err != nil {
		return desc, "", err
	}
	defer f.Close()
	if diffID, err = spec.write(f); err != nil {
		return desc, "", err
	}
	if spec.Mangle != nil {
		if err := spec.Mangle(f); err != nil {
			return desc, "", err
		}
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return desc, "", err
	}
	blob := digest.SHA256.Digester()
	size, err := io.Copy(blob.Hash(), f)
	if err != nil {
		return desc, "", err
	}
	desc = ocispec.Descriptor{MediaType: spec.mediaType(docker), Digest: blob.Digest(), Size: size}
	return desc, diffID, os.Rename(f.Name(), im.path(desc.Digest))
}

// write packs the tar into w and returns the digest of what was packed.
func (spec LayerSpec) write(w io.Writer) (digest.Digest, error) {
	if spec.Packed != nil {
		return spec.Packed(w)
	}
	var packer io.WriteCloser
	var err error
	switch spec.Compression {
	case Gzip, "":
		packer, err = gzip.NewWriterLevel(w, 5)
	case GzipFast:
		packer, err = gzip.NewWriterLevel(w, gzip.BestSpeed)
	case GzipGo:
		packer = stdgzip.NewWriter(w)
	case Zstd:
		packer, err = zstd.NewWriter(w, zstd.WithEncoderConcurrency(1))
	case LZ4:
		packer = lz4.NewWriter(w)
	case Uncompressed:
		packer = nopCloser{w}
	default:
		err = fmt.Errorf("unknown compression %q", spec.Compression)
	}
	if err != nil {
		return "", err
	}
	diffID := digest.SHA256.Digester()
	if err := spec.Tar(io.MultiWriter(diffID.Hash(), packer)); err != nil {
		return "", err
	}
	return diffID.Digest(), packer.Close()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func (spec LayerSpec) mediaType(docker bool) string {
	switch {
	case spec.Compression == Zstd:
		return ocispec.MediaTypeImageLayerZstd // Docker's schema never got one of its own
	case spec.Compression == LZ4:
		return ocispec.MediaTypeImageLayer + "+lz4"
	case spec.Compression == Uncompressed && docker:
		return dockerLayer
	case spec.Compression == Uncompressed:
		return ocispec.MediaTypeImageLayer
	case docker:
		return dockerLayerGzip
	default:
		return ocispec.MediaTypeImageLayerGzip
	}
}
