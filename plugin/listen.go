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

// listen binds the daemon's socket. A socket that nobody answers on is replaced;
// one that is answered on is left alone.
func listen(ctx context.Context, address string) (net.Listener, error) {
	if err := vacant(ctx, address); err != nil {
		return nil, err
	}
	// Until its mode is set, a socket can be connected to by anyone who reaches
	// it, so it is bound where only root does and moved into place after that.
	dir, err := os.MkdirTemp(filepath.Dir(address), ".g")
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	l, err := bind(ctx, filepath.Join(dir, "s"), address)
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		if l != nil {
			err = errors.Join(err, l.Close())
		}
		return nil, fmt.Errorf("listen on %s: %w", address, err)
	}
	return &socket{Listener: l, path: address}, nil
}

func bind(ctx context.Context, temporary, address string) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "unix", temporary)
	if err != nil {
		return nil, err
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false) // it will have moved
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
		return fmt.Errorf("listen on %s: %w", address, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("listen on %s: it exists and is not a socket; remove it or set another address: %w", address, errdefs.ErrFailedPrecondition)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
	if err != nil {
		return nil // refused: whoever bound it is gone
	}
	return errors.Join(
		fmt.Errorf("listen on %s: another process answers there; stop it or set another address: %w", address, errdefs.ErrFailedPrecondition),
		conn.Close())
}

// socket is a listener whose path goes with it.
type socket struct {
	net.Listener
	path string
	once sync.Once
}

// Close stops listening and removes the socket, once.
func (s *socket) Close() error {
	err := net.ErrClosed
	s.once.Do(func() { err = errors.Join(os.Remove(s.path), s.Listener.Close()) })
	return err
}
