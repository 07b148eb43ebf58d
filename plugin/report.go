package plugin

import (
	"cmp"
	"context"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	cplugin "github.com/containerd/plugin"

	"github.com/gantryd/gantry/content"
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
	store     discarded
	calls     *calls
}

var _ status.Server = (*reporter)(nil)

func newReporter(ic *cplugin.InitContext) (*reporter, error) {
	r := &reporter{config: configOf(ic), started: time.Now(), calls: callsOf(ic)}
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
	if r.store, err = part[*content.Store](ic, plugins.ContentPlugin); err != nil {
		return nil, err
	}
	return r, nil
}

// Get implements status.Server.
func (r *reporter) Get(context.Context) (*status.Report, error) {
	mount := r.snapshots.Status()
	report := &status.Report{
		Version: config.Version, PID: os.Getpid(), Started: r.started, Root: r.config.Root,
		Mount:     status.Mount{Mode: string(mount.Mode), Reason: mount.Reason, IDMapped: mount.IDMapped, NotIDMapped: mount.NotIDMapped},
		Process:   processReport(),
		Calls:     r.calls.report(),
		Upper:     status.Upper{Kind: string(mount.Upper), Size: mount.UpperSize, Files: mount.UpperFiles},
		Transfers: []status.Transfer{}, Unpacks: r.puller.Unpacks(), Recent: r.puller.Recent(),
	}
	for _, t := range r.transfers.list() {
		report.Transfers = append(report.Transfers, reportTransfer(t))
	}
	for _, b := range r.store.DiscardedBlobs() {
		report.Discarded.Blobs++
		report.Discarded.Size += b.Size
	}
	slices.SortStableFunc(report.Transfers, func(a, b status.Transfer) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Digest, b.Digest))
	})
	return report, nil
}

func reportTransfer(t transfer.Status) status.Transfer {
	return status.Transfer{
		Digest: t.Digest, Size: t.Size, Frontier: t.Frontier, Received: t.Received, Fetched: t.Fetched, Rate: t.Rate,
		Phase: string(t.Phase), Hosts: t.Hosts, Connections: t.Connections, Waiters: t.Waiters, Started: t.Started, Error: message(t.Err),
	}
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
