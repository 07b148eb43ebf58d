package plugin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
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
	// snapshotter is containerd's name of gantryd's; "" if it has none.
	snapshotter string
	unpacked    map[string]bool // namespace/config digest
}

// owned is a blob in a namespace.
type owned struct {
	namespace string
	size      int64
}

// namedImage is an image, with all that is known to belong to it.
type namedImage struct {
	namespace string
	name      string // namespace/name
	parts     map[string]bool
	// chains are the chain IDs of what is unpacked with gantryd's snapshotter, parents first.
	chains []string
}

// survey asks containerd for all blobs and images. containerd answers from its own database, also where gantryd does not
// run. It fails if containerd does not use the gantryd at address.
func (c *containerd) survey(ctx context.Context, store *content.Store, address string) (*known, error) {
	ctx, cancel := context.WithTimeout(ctx, surveyWithin)
	defer cancel()
	snapshotter, err := c.uses(ctx, address)
	if err != nil {
		return nil, err
	}
	reply, err := namespacesapi.NewNamespacesClient(c.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its namespaces: %w", errgrpc.ToNative(err))
	}
	k := &known{blobs: map[digest.Digest][]owned{}, snapshotter: snapshotter, unpacked: map[string]bool{}}
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

// uses fails unless containerd keeps its content in the gantryd at address. What another containerd has on record lies
// elsewhere: it is not missing here, and must not be forgotten there. snapshotter is what it calls gantryd's.
func (c *containerd) uses(ctx context.Context, address string) (snapshotter string, err error) {
	reply, err := introspectionapi.NewIntrospectionClient(c.conn).Plugins(ctx, &introspectionapi.PluginsRequest{})
	if err != nil {
		return "", fmt.Errorf("containerd does not answer: ask for its plugins: %w", errgrpc.ToNative(err))
	}
	var others []string
	ours := false
	for _, p := range reply.GetPlugins() {
		at := strings.TrimPrefix(p.GetExports()["address"], "unix://")
		same := p.GetInitErr() == nil && sameSocket(at, address)
		switch {
		case same && p.GetType() == string(plugins.SnapshotPlugin):
			snapshotter = p.GetID()
		case same && p.GetType() == string(plugins.ContentPlugin):
			ours = true
		case p.GetInitErr() == nil && p.GetType() == string(plugins.ContentPlugin):
			others = append(others, strings.TrimSpace(p.GetID()+" "+at))
		}
	}
	if ours {
		return snapshotter, nil
	}
	return "", fmt.Errorf("the containerd at %s keeps its content elsewhere (%s) and not in the gantryd at %s (containerd.address in gantryd's configuration names another containerd, or it has not been told: gantry config containerd): %w",
		strings.TrimPrefix(c.address, "unix://"), strings.Join(others, ", "), address, errdefs.ErrFailedPrecondition)
}

// sameSocket says whether both paths lead to one socket, also while nobody listens.
func sameSocket(a, b string) bool {
	if a == "" || b == "" {
		return false
	}
	for _, p := range []*string{&a, &b} {
		if dir, err := filepath.EvalSymlinks(filepath.Dir(*p)); err == nil {
			*p = filepath.Join(dir, filepath.Base(*p))
		}
	}
	return filepath.Clean(a) == filepath.Clean(b)
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
			if k.snapshotter != "" && i.GetLabels()[snapshotLabel+k.snapshotter] != "" {
				k.unpacked[namespace+"/"+i.GetDigest()] = true
			}
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
		image := namedImage{namespace: namespace, name: namespace + "/" + i.GetName(), parts: map[string]bool{}}
		image.add(ctx, store, digest.Digest(i.GetTarget().GetDigest()), 0, k.unpacked)
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
func (i *namedImage) add(ctx context.Context, store *content.Store, d digest.Digest, depth int, unpacked map[string]bool) {
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
		i.add(ctx, store, m.Digest, depth+1, unpacked)
	}
	for _, l := range doc.Layers {
		i.parts[l.Digest.String()] = true
	}
	if doc.Config.Digest != "" {
		i.add(ctx, store, doc.Config.Digest, depth+1, unpacked)
	}
	for _, id := range doc.RootFS.DiffIDs {
		i.parts[id.String()] = true
	}
	for _, id := range identity.ChainIDs(slices.Clone(doc.RootFS.DiffIDs)) {
		i.parts[id.String()] = true
		if unpacked[i.namespace+"/"+d.String()] {
			i.chains = append(i.chains, id.String())
		}
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

// owners asks anew which namespaces have a blob: a check may have taken hours.
func (c *containerd) owners(ctx context.Context, d digest.Digest) ([]owned, error) {
	ctx, cancel := context.WithTimeout(ctx, surveyWithin)
	defer cancel()
	reply, err := namespacesapi.NewNamespacesClient(c.conn).List(ctx, &namespacesapi.ListNamespacesRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask containerd for its namespaces: %w", errgrpc.ToNative(err))
	}
	var found []owned
	for _, ns := range reply.GetNamespaces() {
		info, err := c.content.Info(namespaces.WithNamespace(ctx, ns.GetName()), &contentapi.InfoRequest{Digest: d.String()})
		if err = errgrpc.ToNative(err); errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("ask containerd for %s in namespace %s: %w", d, ns.GetName(), err)
		}
		found = append(found, owned{ns.GetName(), info.GetInfo().GetSize()})
	}
	return found, nil
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

// snapshotName splits what containerd calls a snapshot for gantry: namespace/number/name.
func snapshotName(key string) (namespace, name string) {
	parts := strings.SplitN(key, "/", 3)
	if len(parts) < 3 {
		return "", key
	}
	return parts[0], parts[2]
}
