package client

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
)

// Labels of a pull's lease.
const (
	labelPull = "gantry.dev/pull" // the whole reference
	labelPID  = "gantry.dev/pid"  // of the command
)

// lease holds what a pull fetched when it fails, or ends with the command: containerd's collection would remove it, and
// with it the finished transfers.
type lease struct {
	manager leases.Manager
	id      string
	pull    string
}

// lease makes one that lasts as long as partial transfers do. The context is for containerd's calls.
func (p *Pull) lease(ctx context.Context, m leases.Manager) (context.Context, *lease, error) {
	l, err := m.Create(ctx, leases.WithRandomID(), leases.WithExpiration(p.config.Transfer.KeepPartial),
		leases.WithLabels(map[string]string{labelPull: p.named.String(), labelPID: strconv.Itoa(os.Getpid())}))
	if err != nil {
		return nil, nil, fmt.Errorf("containerd's lease: %w", err)
	}
	return leases.WithLease(ctx, l.ID), &lease{m, l.ID, p.named.String()}, nil
}

func (l *lease) release(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	if err := l.manager.Delete(ctx, leases.Lease{ID: l.id}); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("release containerd's lease %s: %w", l.id, err)
	}
	return nil
}

// releaseAll is for a pull that succeeded: what those before it had left is in the image now, and would only outlive it.
// The leases of commands that still run are theirs.
func (l *lease) releaseAll(ctx context.Context) error {
	err := l.release(ctx)
	left, listErr := l.manager.List(ctx, fmt.Sprintf("labels.%q==%q", labelPull, l.pull))
	if listErr != nil {
		return errors.Join(err, fmt.Errorf("list containerd's leases: %w", listErr))
	}
	for _, old := range left {
		if pid, e := strconv.Atoi(old.Labels[labelPID]); e == nil && !runs(pid) {
			err = errors.Join(err, (&lease{manager: l.manager, id: old.ID}).release(ctx))
		}
	}
	return err
}

// runs says whether there is such a process.
func runs(pid int) bool { return !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) }
