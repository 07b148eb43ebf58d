package plugin

import (
	"cmp"
	"context"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	cplugin "github.com/containerd/plugin"

	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/pull"
	"github.com/gantryd/gantry/plugin/status"
	"github.com/gantryd/gantry/snapshotter"
)

// reporter collects the status of the parts. None of them waits for anything.
type reporter struct {
	config    *config.Config
	started   time.Time
	transfers *transfers
	puller    *pull.Puller
	snapshots *snapshotter.Snapshotter
}

var _ status.Server = (*reporter)(nil)

func newReporter(ic *cplugin.InitContext) (*reporter, error) {
	r := &reporter{config: configOf(ic), started: time.Now()}
	var err error
	if r.transfers, err = part[*transfers](ic, TransferPlugin); err != nil {
		return nil, err
	}
	if r.puller, err = part[*pull.Puller](ic, PullPlugin); err != nil {
		return nil, err
	}
	if r.snapshots, err = part[*snapshotter.Snapshotter](ic, plugins.SnapshotPlugin); err != nil {
		return nil, err
	}
	return r, nil
}

// Get implements status.Server.
func (r *reporter) Get(context.Context) (*status.Report, error) {
	now := time.Now()
	mount := r.snapshots.Status()
	report := &status.Report{
		Version: config.Version, PID: os.Getpid(), Started: r.started, Root: r.config.Root,
		Mount:     status.Mount{Mode: string(mount.Mode), Reason: mount.Reason},
		Transfers: []status.Transfer{}, Unpacks: []status.Unpack{}, Recent: []status.Layer{},
	}
	for _, t := range r.transfers.list() {
		report.Transfers = append(report.Transfers, reportTransfer(t))
	}
	slices.SortStableFunc(report.Transfers, func(a, b status.Transfer) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Digest, b.Digest))
	})
	for _, u := range r.puller.Unpacks() {
		report.Unpacks = append(report.Unpacks, reportUnpack(u, now))
	}
	for _, f := range slices.Backward(r.puller.Recent()) {
		report.Recent = append(report.Recent, reportLayer(f))
	}
	return report, nil
}

func reportTransfer(t transfer.Status) status.Transfer {
	return status.Transfer{
		Digest: t.Digest, Size: t.Size, Frontier: t.Frontier, Received: t.Received, Rate: t.Rate,
		Phase: string(t.Phase), Hosts: t.Hosts, Waiters: t.Waiters, Started: t.Started, Error: message(t.Err),
	}
}

func reportUnpack(u pull.Unpacking, now time.Time) status.Unpack {
	s := status.Unpack{
		Digest: u.Digest, Size: u.Size, Read: u.Read, Written: u.Written,
		Phase: string(u.Phase), Started: u.Started,
	}
	if t := now.Sub(u.Started).Seconds(); t > 0 {
		s.Rate = float64(u.Written) / t
	}
	return s
}

func reportLayer(f pull.Finished) status.Layer {
	return status.Layer{
		Namespace: f.Namespace, Image: f.Ref, Digest: f.Digest, DiffID: f.DiffID,
		Size: f.Size, Written: f.Unpacked, Started: f.Started, Error: message(f.Err),
		Seconds: status.Seconds{
			Total: f.Total.Seconds(), Queued: f.Queued.Seconds(), Wait: f.Wait.Seconds(),
			Download: f.Download.Seconds(), Starved: f.Starved.Seconds(), Decompress: f.Inflate.Seconds(),
			Write: f.Write.Seconds(), Verify: f.Verify.Seconds(), Commit: f.Commit.Seconds(),
		},
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
