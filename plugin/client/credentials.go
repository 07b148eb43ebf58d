package client

import (
	"context"
	"sync"

	cregistry "github.com/containerd/containerd/v2/core/transfer/registry"
)

// credentials answer containerd when a registry asks it for a login. containerd waits for an answer without end, so
// there always is one; what went wrong is told when the pull fails.
type credentials struct {
	lookup func(host string) (user, secret string, err error)

	mu  sync.Mutex
	err error
}

// GetCredentials implements registry.CredentialHelper of containerd's transfer service.
func (c *credentials) GetCredentials(_ context.Context, _, host string) (cregistry.Credentials, error) {
	user, secret, err := c.lookup(host)
	if err != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.err = err
	}
	return cregistry.Credentials{Host: host, Username: user, Secret: secret}, nil
}

// failure is the last look-up's that failed.
func (c *credentials) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}
