package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// listen returns the daemon's socket: the one that systemd kept and passed, or a new one.
func listen(ctx context.Context, address string, passed []*os.File) (net.Listener, error) {
	l := kept(ctx, address, passed)
	if l == nil {
		var err error
		if l, err = create(ctx, address); err != nil {
			return nil, fmt.Errorf("listen on %s: %w", address, err)
		}
	}
	return &socket{UnixListener: l, path: address, stays: keep(ctx, l)}, nil
}

// create binds a new socket. One that nobody answers on is replaced; one that is
// answered on is left alone.
func create(ctx context.Context, address string) (*net.UnixListener, error) {
	if err := vacant(ctx, address); err != nil {
		return nil, err
	}
	// Until its mode is set, a socket can be connected to by anyone who reaches
	// it, so it is bound where only root does and moved into place after that.
	dir, err := os.MkdirTemp(filepath.Dir(address), ".g")
	if err != nil {
		return nil, err
	}
	l, err := bind(filepath.Join(dir, "s"), address)
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		if l != nil {
			err = errors.Join(err, l.Close())
		}
		return nil, err
	}
	return l, nil
}

func bind(temporary, address string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it will have moved
	if err := os.Chmod(temporary, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	if err := os.Rename(temporary, address); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// vacant checks that nobody answers at address.
func vacant(ctx context.Context, address string) error {
	info, err := os.Lstat(address)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("it exists and is not a socket; remove it or set another address: %w", errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
	if err != nil {
		return nil // refused: whoever bound it is gone
	}
	return errors.Join(
		fmt.Errorf("another process answers there; stop it or set another address: %w", errdefs.ErrFailedPrecondition),
		conn.Close())
}

// socket is a listener whose path goes with it, unless systemd keeps it.
type socket struct {
	*net.UnixListener
	path  string
	stays bool
	once  sync.Once
}

// Close stops listening and removes the socket, once.
func (s *socket) Close() error {
	err := net.ErrClosed
	s.once.Do(func() {
		err = nil
		if !s.stays {
			err = os.Remove(s.path)
		}
		err = errors.Join(err, s.UnixListener.Close())
	})
	return err
}
