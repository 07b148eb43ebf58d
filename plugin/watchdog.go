package plugin

import (
	"context"
	"errors"
	"fmt"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/coreos/go-systemd/v22/daemon"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/plugin/status"
)

// notify tells systemd, if it started this process.
func notify(ctx context.Context, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.G(ctx).WithError(err).Warnf("tell systemd %s", state)
	}
}

// feedWatchdog tells systemd's watchdog that gantryd is alive, for as long as it
// answers the calls that containerd makes while it holds its own locks. A gantryd
// that hangs there stops all of containerd; systemd then ends it.
func (d *Daemon) feedWatchdog(ctx context.Context) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.G(ctx).WithError(err).Warn("systemd's watchdog is not used")
	}
	if err != nil || interval <= 0 {
		return
	}
	ticker := time.NewTicker(interval / 3)
	defer ticker.Stop()
	for {
		if err := probe(ctx, d.config.Address, interval/3); err == nil {
			notify(ctx, daemon.SdNotifyWatchdog)
		} else if ctx.Err() == nil {
			log.G(ctx).WithError(err).Error("gantryd does not answer itself; systemd will restart it if this lasts")
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// probe asks the daemon at address, as containerd would, and fails if it does
// not answer in time.
func probe(ctx context.Context, address string, limit time.Duration) (err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %s", limit))
	defer cancel()
	conn, err := dialSocket(address)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	if _, err := status.Get(ctx, conn); err != nil {
		return fmt.Errorf("status: %w", err)
	}
	ctx = namespaces.WithNamespace(ctx, namespaces.Default)
	// What does not exist is the quickest thing to ask for, and takes the same locks.
	absent := digest.FromString("gantryd asks itself")
	_, err = contentapi.NewContentClient(conn).Info(ctx, &contentapi.InfoRequest{Digest: absent.String()})
	if err := errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("content: %w", err)
	}
	_, err = snapshotsapi.NewSnapshotsClient(conn).Stat(ctx, &snapshotsapi.StatSnapshotRequest{Key: absent.String()})
	if err := errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("snapshots: %w", err)
	}
	return nil
}
