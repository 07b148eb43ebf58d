package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content"
)

// surveyWithin bounds what a check asks containerd.
const surveyWithin = 30 * time.Second

// known is what containerd has in its database, asked once for a check.
type known struct {
	namespaces []string
	blobs      map[digest.Digest][]owned
	images     []namedImage
}

// owned is a blob in a namespace.
type owned struct {
	namespace string
	size      int64
}

// namedImage is an image, with all that is known to belong to it.
type namedImage struct {
	name  string // namespace/name
	parts map[string]bool
}

// survey asks containerd for all blobs and images. containerd answers from its own database, also where gantryd does not
// run.
func (c *containerd) survey(ctx context.Context, store *content.Store) (*known, error) {
	ctx, cancel := context.WithTimeout(ctx, surveyWithin)
	defer cancel()
	reply, err := namespacesapi.NewNamespacesClient(c.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its namespaces: %w", errgrpc.ToNative(err))
	}
	k := &known{blobs: map[digest.Digest][]owned{}}
	for _, ns := range reply.GetNamespaces() {
		k.namespaces = append(k.namespaces, ns.GetName())
		if err := c.surveyBlobs(ctx, ns.GetName(), k); err != nil {
			return nil, err
		}
		if err := c.surveyImages(ctx, ns.GetName(), store, k); err != nil {
			return nil, err
		}
	}
	return k, nil
}

func (c *containerd) surveyBlobs(ctx context.Context, namespace string, k *known) error {
	stream, err := c.content.List(namespaces.WithNamespace(ctx, namespace), &contentapi.ListContentRequest{})
	for err == nil {
		var page *contentapi.ListContentResponse
		if page, err = stream.Recv(); err != nil {
			break
		}
		for _, i := range page.GetInfo() {
			d := digest.Digest(i.GetDigest())
			k.blobs[d] = append(k.blobs[d], owned{namespace, i.GetSize()})
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return fmt.Errorf("ask containerd for the content of namespace %s: %w", namespace, errgrpc.ToNative(err))
}

func (c *containerd) surveyImages(ctx context.Context, namespace string, store *content.Store, k *known) error {
	reply, err := imagesapi.NewImagesClient(c.conn).List(namespaces.WithNamespace(ctx, namespace), &imagesapi.ListImagesRequest{})
	if err != nil {
		return fmt.Errorf("ask containerd for the images of namespace %s: %w", namespace, errgrpc.ToNative(err))
	}
	for _, i := range reply.GetImages() {
		image := namedImage{name: namespace + "/" + i.GetName(), parts: map[string]bool{}}
		image.add(ctx, store, digest.Digest(i.GetTarget().GetDigest()), 0)
		k.images = append(k.images, image)
	}
	return nil
}

// Indexes may hold manifests and, as far as anybody has seen, no indexes.
const (
	maxDepth    = 3
	maxDocument = 8 << 20 // bytes, as plugin/pull has it
)

// add notes a blob and what it names: other blobs, DiffIDs and chain IDs. What cannot be read names nothing.
func (i namedImage) add(ctx context.Context, store *content.Store, d digest.Digest, depth int) {
	if i.parts[d.String()] || depth > maxDepth {
		return
	}
	i.parts[d.String()] = true
	var doc struct {
		Manifests []ocispec.Descriptor `json:"manifests"`
		Config    ocispec.Descriptor   `json:"config"`
		Layers    []ocispec.Descriptor `json:"layers"`
		RootFS    struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if info, err := store.Info(ctx, d); err != nil || info.Size > maxDocument || store.Discarded(d) {
		return
	}
	ra, err := store.ReaderAt(ctx, ocispec.Descriptor{Digest: d})
	if err != nil {
		return
	}
	defer ra.Close()
	if json.NewDecoder(io.NewSectionReader(ra, 0, ra.Size())).Decode(&doc) != nil {
		return
	}
	for _, m := range doc.Manifests {
		i.add(ctx, store, m.Digest, depth+1)
	}
	for _, l := range doc.Layers {
		i.parts[l.Digest.String()] = true
	}
	if doc.Config.Digest != "" {
		i.add(ctx, store, doc.Config.Digest, depth+1)
	}
	for _, id := range doc.RootFS.DiffIDs {
		i.parts[id.String()] = true
	}
	for _, id := range identity.ChainIDs(slices.Clone(doc.RootFS.DiffIDs)) {
		i.parts[id.String()] = true
	}
}

// affected names the images that any of the parts belongs to: digests of blobs and layers, names of snapshots.
func (k *known) affected(parts ...string) []string {
	if k == nil {
		return nil
	}
	var names []string
	for _, i := range k.images {
		if slices.ContainsFunc(parts, func(p string) bool { return i.parts[p] }) {
			names = append(names, i.name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// owners are the namespaces that have a blob.
func (k *known) owners(d digest.Digest) []owned {
	if k == nil {
		return nil
	}
	return k.blobs[d]
}

// has asks anew whether a namespace has a blob.
func (c *containerd) has(ctx context.Context, namespace string, d digest.Digest) (bool, error) {
	_, err := c.Labels(ctx, namespace, d)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// forget makes containerd forget a blob in a namespace, so that its next pull asks for it again.
func (c *containerd) forget(ctx context.Context, namespace string, d digest.Digest) error {
	_, err := c.content.Delete(namespaces.WithNamespace(ctx, namespace), &contentapi.DeleteContentRequest{Digest: d.String()})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("have containerd forget %s in namespace %s: %w", d, namespace, err)
	}
	return nil
}

// snapshotName splits what containerd calls a snapshot for gantry: number/namespace/name.
func snapshotName(key string) (namespace, name string) {
	parts := strings.SplitN(key, "/", 3)
	if len(parts) < 3 {
		return "", key
	}
	return parts[1], parts[2]
}
