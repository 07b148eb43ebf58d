package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxDocument bounds what is read as an index, a manifest or a config, in bytes. It is containerd's own limit.
const maxDocument = 8 << 20

// Media types of manifests that list no digests of layers which containerd could use.
var schema1 = []string{images.MediaTypeDockerSchema1Manifest, "application/vnd.docker.distribution.manifest.v1+json"}

// documents reads small blobs of one repository into memory, verified. It is what containerd's own choice of a manifest
// reads, so that both choose the same one.
type documents struct {
	fetcher remotes.Fetcher
	read    map[digest.Digest][]byte
}

var _ ccontent.Provider = (*documents)(nil)

// ReaderAt implements content.Provider.
func (d *documents) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error) {
	data, ok := d.read[desc.Digest]
	if !ok {
		var err error
		if data, err = d.fetch(ctx, desc); err != nil {
			return nil, fmt.Errorf("%s %s: %w", kind(desc.MediaType), desc.Digest, err)
		}
		d.read[desc.Digest] = data
	}
	return document{bytes.NewReader(data)}, nil
}

func (d *documents) fetch(ctx context.Context, desc ocispec.Descriptor) (_ []byte, err error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	if desc.Size < 0 || desc.Size > maxDocument {
		return nil, fmt.Errorf("%d bytes, more than the %d that are read: %w", desc.Size, maxDocument, errdefs.ErrInvalidArgument)
	}
	body, err := d.fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	// One byte more, so that a body that goes on is told from one that ends.
	data, err := io.ReadAll(io.LimitReader(body, desc.Size+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) != desc.Size {
		return nil, fmt.Errorf("the registry sent another size than the %d bytes it stated: %w", desc.Size, errdefs.ErrDataLoss)
	}
	if got := desc.Digest.Algorithm().FromBytes(data); got != desc.Digest {
		return nil, fmt.Errorf("the registry sent something else, with digest %s: %w", got, errdefs.ErrDataLoss)
	}
	return data, nil
}

func kind(mediaType string) string {
	switch {
	case images.IsIndexType(mediaType):
		return "index"
	case images.IsManifestType(mediaType):
		return "manifest"
	}
	return "document"
}

// document implements content.ReaderAt.
type document struct{ *bytes.Reader }

func (document) Close() error { return nil }

// manifest chooses what is to be pulled from what the reference stands for. An image that is no choice of several must be for
// the platform that was asked for; without a wish any will do, as for other clients.
func (p *Pull) manifest(ctx context.Context, provider ccontent.Provider, target ocispec.Descriptor) (*ocispec.Manifest, error) {
	m, err := manifestOf(ctx, provider, target, p.platform)
	if err != nil || p.options.Platform == "" || !images.IsManifestType(target.MediaType) || !images.IsConfigType(m.Config.MediaType) {
		return m, err
	}
	there, err := images.ConfigPlatform(ctx, provider, m.Config)
	if err != nil {
		return nil, fmt.Errorf("which platform it is for: %w", err)
	}
	if there.Architecture == "" || platforms.Only(p.platform).Match(there) { // it may say nothing
		return m, nil
	}
	return nil, otherPlatform(p.platform, platforms.Format(there))
}

// otherPlatform is the error of an image that is for the platforms there alone.
func otherPlatform(wanted ocispec.Platform, there string) error {
	return fmt.Errorf("no image for platform %s, there is %s (choose with --platform): %w", platforms.Format(wanted), there, errdefs.ErrNotFound)
}

// manifestOf chooses the manifest for the platform from what a reference stands for.
func manifestOf(ctx context.Context, provider ccontent.Provider, target ocispec.Descriptor, platform ocispec.Platform) (*ocispec.Manifest, error) {
	switch {
	case slices.Contains(schema1, target.MediaType):
		return nil, fmt.Errorf("its manifest has Docker's schema 1, which containerd no longer pulls either; push the image again with a newer tool: %w", errdefs.ErrNotImplemented)
	case !images.IsManifestType(target.MediaType) && !images.IsIndexType(target.MediaType):
		return nil, fmt.Errorf("%s is no image: its media type is %q: %w", target.Digest, target.MediaType, errdefs.ErrNotImplemented)
	}
	m, err := images.Manifest(ctx, provider, target, platforms.Only(platform))
	if errdefs.IsNotFound(err) && images.IsIndexType(target.MediaType) {
		if there := platformsOf(ctx, provider, target); there != "" {
			return nil, otherPlatform(platform, there)
		}
	}
	if err != nil {
		return nil, err
	}
	return &m, nil
}

// platformsOf lists what an index offers, for an error; empty if it does not say.
func platformsOf(ctx context.Context, provider ccontent.Provider, target ocispec.Descriptor) string {
	data, err := ccontent.ReadBlob(ctx, provider, target)
	if err != nil {
		return ""
	}
	var index ocispec.Index
	if json.Unmarshal(data, &index) != nil {
		return ""
	}
	var names []string
	for _, m := range index.Manifests {
		if m.Platform != nil && m.Platform.OS != "unknown" { // attestations
			names = append(names, platforms.Format(*m.Platform))
		}
	}
	slices.Sort(names)
	return strings.Join(slices.Compact(names), ", ")
}
