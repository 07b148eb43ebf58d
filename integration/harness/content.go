package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// PullClient pulls with the Go client, which fetches and unpacks in the calling
// process and, unlike the transfer service, takes no lock by digest.
func (n *Node) PullClient(ctx context.Context, namespace, ref string) error {
	client, err := n.Client()
	if err != nil {
		return err
	}
	_, err = client.Pull(namespaces.WithNamespace(ctx, namespace), ref,
		containerd.WithPullSnapshotter(n.Snapshotter), containerd.WithPullUnpack,
		containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{
			Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts)),
		})))
	return err
}

// Complete says whether all content of an image is there and it is unpacked;
// the error names what is missing.
func (n *Node) Complete(ctx context.Context, namespace, ref string) error {
	ctx = namespaces.WithNamespace(ctx, namespace)
	client, err := n.Client()
	if err != nil {
		return err
	}
	image, err := client.GetImage(ctx, ref)
	if err != nil {
		return err
	}
	diffIDs, err := image.RootFS(ctx)
	if err != nil {
		return err
	}
	manifest, err := images.Manifest(ctx, client.ContentStore(), image.Target(), image.Platform())
	if err != nil {
		return err
	}
	for _, desc := range append(manifest.Layers, manifest.Config) {
		info, err := client.ContentStore().Info(ctx, desc.Digest)
		if err != nil {
			return fmt.Errorf("%s in namespace %s: blob %s: %w", ref, namespace, desc.Digest, err)
		}
		if info.Size != desc.Size {
			return fmt.Errorf("%s in namespace %s: blob %s has %d bytes, want %d", ref, namespace, desc.Digest, info.Size, desc.Size)
		}
	}
	chain := identity.ChainID(diffIDs).String()
	if _, err := client.SnapshotService(n.Snapshotter).Stat(ctx, chain); err != nil {
		return fmt.Errorf("%s in namespace %s: snapshot %s: %w", ref, namespace, chain, err)
	}
	return nil
}

// Tree mounts the image's file system read-only, reads all of it, and undoes the mount.
func (n *Node) Tree(ctx context.Context, namespace string, im *Image) (tree FileTree, err error) {
	err = n.WithRootfs(ctx, namespace, im.DiffIDs, func(root string) error {
		tree, err = WalkTree(root)
		return err
	})
	return tree, err
}

// WithRootfs calls fn with the folder where a read-only view of the chain of layers is mounted.
func (n *Node) WithRootfs(ctx context.Context, namespace string, diffIDs []digest.Digest, fn func(root string) error) (err error) {
	ctx = namespaces.WithNamespace(ctx, namespace)
	client, err := n.Client()
	if err != nil {
		return err
	}
	ctx, done, err := client.WithLease(ctx, leases.WithRandomID(), leases.WithExpiration(time.Hour))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done(context.WithoutCancel(ctx))) }()
	s := client.SnapshotService(n.Snapshotter)
	key := fmt.Sprintf("view-%d", time.Now().UnixNano())
	mounts, err := s.View(ctx, key, identity.ChainID(diffIDs).String())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Remove(context.WithoutCancel(ctx), key)) }()
	root := filepath.Join(n.Dir, key)
	if err := os.Mkdir(root, 0o700); err != nil {
		return err
	}
	if err := mount.All(mounts, root); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, mount.UnmountRecursive(root, 0), os.Remove(root)) }()
	return fn(root)
}

// RemoveImage removes the image and waits for the garbage collection that takes its content away.
func (n *Node) RemoveImage(ctx context.Context, namespace, ref string) error {
	_, err := n.Ctr(ctx, namespace, "image", "rm", "--sync", ref)
	return err
}

// CollectGarbage makes containerd collect now and returns when it is done: that
// is what removing a lease synchronously means.
func (n *Node) CollectGarbage(ctx context.Context) error {
	ctx = namespaces.WithNamespace(ctx, "default")
	client, err := n.Client()
	if err != nil {
		return err
	}
	lease, err := client.LeasesService().Create(ctx, leases.WithRandomID())
	if err != nil {
		return err
	}
	return client.LeasesService().Delete(ctx, lease, leases.SynchronousDelete)
}
