package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	hostconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"

	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/config"
)

// Folder is where partial blobs are kept, and with ViaTransfers whole ones: as gantryd has it, so that it finds them.
func (p *Pull) Folder() string {
	root := p.config.Transfer.Root
	if p.config.Containerd.ContentSharingPolicy == config.PolicyIsolated {
		return filepath.Join(root, "namespaces", p.options.Namespace)
	}
	return root
}

func (p *Pull) openTransfers() (*transfer.Manager, error) {
	c := p.config.Transfer
	m, err := transfer.New(p.Folder(), transfer.Options{
		ChunkSize: c.ChunkSize, ConnectionsPerHost: c.ConnectionsPerHost, GiveUp: c.GiveUp, KeepPartial: c.KeepPartial,
	})
	if err != nil {
		return nil, fmt.Errorf("open the transfers in %s: %w", p.Folder(), asRoot(err))
	}
	return m, nil
}

func (p *Pull) credentials() (func(host string) (user, secret string, err error), error) {
	return nil, nil
}

func (p *Pull) openRegistry() (*registry.Registry, error) {
	credentials, err := p.credentials()
	if err != nil {
		return nil, err
	}
	return registry.New(registry.Options{
		ConfigPath: p.config.Registry.ConfigPath, UserAgent: "gantry/" + config.Version, Credentials: credentials,
	}), nil
}

func (p *Pull) resolver(*registry.Registry) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{Hosts: hostconfig.ConfigureHosts(context.TODO(), hostconfig.HostOptions{
		HostDir:      hostconfig.HostDirFromRoot(p.config.Registry.ConfigPath),
		UpdateClient: func(*http.Client) error { return nil },
	})})
}

var _ io.Closer
