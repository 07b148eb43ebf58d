package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/containerd/log"
	"golang.org/x/sys/unix"
)

const (
	// storeName is what systemd calls the socket while it keeps it.
	storeName = "gantry"
	// siocUnixFile is SIOCUNIXFILE of linux/un.h: it opens the file that a socket is bound to, as O_PATH.
	siocUnixFile = 0x89e0
)

// kept returns the socket at address if it is among the files that systemd passed, and closes the others. systemd keeps
// it while gantryd restarts (FileDescriptorStoreMax in the unit), so whoever connects meanwhile waits for the new
// gantryd and is not refused. nil: none of them is it.
func kept(ctx context.Context, address string, passed []*os.File) *net.UnixListener {
	var found *net.UnixListener
	for _, f := range passed {
		l, err := listenerAt(address, f)
		switch {
		case err != nil:
			log.G(ctx).WithError(err).WithField("file", f.Name()).Info("systemd passed a file that is not gantryd's socket")
			forget(ctx)
		case found == nil:
			found = l
		default:
			_ = l.Close()
		}
		_ = f.Close()
	}
	return found
}

// listenerAt returns a copy of f if it is the socket that whoever connects to address reaches.
func listenerAt(address string, f *os.File) (*net.UnixListener, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var bound int
	if cerr := raw.Control(func(fd uintptr) { bound, err = unix.IoctlRetInt(int(fd), siocUnixFile) }); cerr != nil || err != nil {
		return nil, fmt.Errorf("the file it is bound to: %w", errors.Join(cerr, err))
	}
	path := os.NewFile(uintptr(bound), address)
	defer func() { _ = path.Close() }()
	there, err := os.Lstat(address)
	if err != nil {
		return nil, err
	}
	if is, err := path.Stat(); err != nil || !os.SameFile(is, there) {
		return nil, errors.Join(fmt.Errorf("it is not bound to %s", address), err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil // nothing else has a file
}

// keep has systemd keep the socket, and reports whether there is a systemd to do so.
func keep(ctx context.Context, l *net.UnixListener) bool {
	manager := os.Getenv("NOTIFY_SOCKET")
	if manager == "" {
		return false
	}
	if err := send(manager, l); err != nil {
		log.G(ctx).WithError(err).Warn("systemd cannot keep the socket while gantryd restarts")
		return false
	}
	return true
}

// send passes the socket to the manager, whose address NOTIFY_SOCKET names. daemon.SdNotify sends no files.
func send(manager string, l *net.UnixListener) error {
	to, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(to) }()
	raw, err := l.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) {
		err = unix.Sendmsg(to, []byte("FDSTORE=1\nFDNAME="+storeName), unix.UnixRights(int(fd)), &unix.SockaddrUnix{Name: manager}, 0)
	})
	return errors.Join(cerr, err)
}

// turnAway gives up what systemd passed to a gantryd that cannot start: who connects is refused at once.
func turnAway(ctx context.Context, passed []*os.File) {
	for _, f := range passed {
		_ = f.Close()
		forget(ctx)
	}
}

// forget has systemd close what it keeps for gantryd.
func forget(ctx context.Context) { notify(ctx, "FDSTOREREMOVE=1\nFDNAME="+storeName) }
