// Package setup makes what gantryd and `gantry pull` both need from one configuration, so that each finds what the
// other has left and asks the same hosts as the same user.
package setup

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/sha256x2"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/snapshotter"
)

// Registry returns the registries as c describes them.
func Registry(c *config.Config) (*registry.Registry, error) {
	credentials, err := Credentials(c)
	if err != nil {
		return nil, err
	}
	return registry.New(registry.Options{
		ConfigPath:  c.Registry.ConfigPath,
		UserAgent:   "gantry/" + config.Version,
		Credentials: credentials,
	}), nil
}

// Credentials returns the look-up of logins; nil if there is none.
func Credentials(c *config.Config) (func(host string) (user, secret string, err error), error) {
	return registry.DockerCredentials(c.Registry.Credentials)
}

// TransferFolder is where the blobs of a namespace are fetched to; all namespaces share one unless content is isolated.
// The namespace must be a valid one: it becomes a folder.
func TransferFolder(c *config.Config, namespace string) string {
	if c.Isolated() {
		return filepath.Join(NamespaceFolders(c), namespace)
	}
	return c.Transfer.Root
}

// NamespaceFolders is where the folders of namespaces are.
func NamespaceFolders(c *config.Config) string { return filepath.Join(c.Transfer.Root, "namespaces") }

// TransferOptions are those of all transfer managers of a process, made once: what is known of hosts and the limits of
// connections are shared by those who share them, also where namespaces share no content.
func TransferOptions(c *config.Config) transfer.Options {
	return transfer.Options{
		ChunkSize:   c.Transfer.ChunkSize,
		Hosts:       transfer.NewHosts(transfer.HostLimits{PerHost: c.Transfer.ConnectionsPerHost, Total: c.Transfer.Connections}),
		GiveUp:      c.Transfer.GiveUp,
		KeepPartial: c.Transfer.KeepPartial,
		NewHash:     sha256x2.New,
	}
}

// IDMapped returns why the gantryd that c configures would not map layers for user namespaces on this host, nil if it
// would. It tries on the file system of its root, in a folder that goes again.
func IDMapped(ctx context.Context, c *config.Config) (err error) {
	dir := c.Root
	for dir != "/" {
		if _, err := os.Stat(dir); err == nil || !errors.Is(err, fs.ErrNotExist) {
			break
		}
		dir = filepath.Dir(dir)
	}
	dir, err = os.MkdirTemp(dir, ".gantry-probe-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(dir)) }()
	return snapshotter.ProbeIDMapped(ctx, dir, snapshotter.Mode(c.Snapshotter.Mount))
}
