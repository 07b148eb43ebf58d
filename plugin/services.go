// Package plugin makes one daemon of gantry's parts. It is the only place that
// wires them together and the only one that speaks gRPC: every part is a
// registration of github.com/containerd/plugin, made in the order of what it
// requires and closed in the opposite one.
package plugin

import (
	"fmt"
	"path/filepath"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/diffservice"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/plugins"
	cplugin "github.com/containerd/plugin"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/registry"
	"github.com/gantryd/gantry/content/sha256x2"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/check"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/contentservice"
	"github.com/gantryd/gantry/plugin/pull"
	"github.com/gantryd/gantry/plugin/restore"
	"github.com/gantryd/gantry/plugin/setup"
	"github.com/gantryd/gantry/plugin/status"
	"github.com/gantryd/gantry/snapshotter"
	"github.com/gantryd/gantry/snapshotter/differ"
	"github.com/gantryd/gantry/snapshotter/layer"
)

// Types of gantry's own parts. What containerd has a type for (content,
// snapshots, diff, gRPC services) is registered under containerd's.
const (
	ContainerdPlugin cplugin.Type = "io.gantry.containerd.v1"
	LayerPlugin      cplugin.Type = "io.gantry.layer.v1"
	TransferPlugin   cplugin.Type = "io.gantry.transfer.v1"
	RegistryPlugin   cplugin.Type = "io.gantry.registry.v1"
	PullPlugin       cplugin.Type = "io.gantry.pull.v1"
)

// id is what every part is called: there is one of each type but services.
const id = "gantry"

// service is an instance of a GRPCPlugin: it adds itself to the server.
type service func(*grpc.Server)

// registrations returns all parts. Each InitFn finds its settings in
// ic.Config and an instance that implements io.Closer is closed with the daemon.
func registrations() cplugin.Registry {
	var all cplugin.Registry
	for _, r := range []cplugin.Registration{
		{Type: ContainerdPlugin, ID: id, InitFn: initContainerd},
		{Type: LayerPlugin, ID: id, InitFn: initLayers, Requires: []cplugin.Type{TransferPlugin}},
		{Type: TransferPlugin, ID: id, InitFn: initTransfers},
		{Type: RegistryPlugin, ID: id, InitFn: initRegistry},
		{Type: PullPlugin, ID: id, InitFn: initPull,
			Requires: []cplugin.Type{ContainerdPlugin, LayerPlugin, TransferPlugin, RegistryPlugin}},
		{Type: plugins.ContentPlugin, ID: id, InitFn: initContent, Requires: []cplugin.Type{PullPlugin}},
		{Type: plugins.SnapshotPlugin, ID: id, InitFn: initSnapshotter, Requires: []cplugin.Type{LayerPlugin, PullPlugin}},
		{Type: plugins.DiffPlugin, ID: id, InitFn: initDiffer,
			Requires: []cplugin.Type{PullPlugin, plugins.ContentPlugin, plugins.SnapshotPlugin}},
		{Type: plugins.GRPCPlugin, ID: "content", InitFn: serveContent, Requires: []cplugin.Type{plugins.ContentPlugin}},
		{Type: plugins.GRPCPlugin, ID: "snapshots", InitFn: serveSnapshots, Requires: []cplugin.Type{plugins.SnapshotPlugin}},
		{Type: plugins.GRPCPlugin, ID: "diff", InitFn: serveDiff, Requires: []cplugin.Type{plugins.DiffPlugin}},
		{Type: plugins.GRPCPlugin, ID: "restore", InitFn: serveRestore, Requires: []cplugin.Type{plugins.ContentPlugin}},
		{Type: plugins.GRPCPlugin, ID: "check", InitFn: serveCheck,
			Requires: []cplugin.Type{ContainerdPlugin, LayerPlugin, TransferPlugin, PullPlugin, plugins.ContentPlugin, plugins.SnapshotPlugin}},
		{Type: plugins.GRPCPlugin, ID: "status", InitFn: serveStatus,
			Requires: []cplugin.Type{TransferPlugin, PullPlugin, plugins.ContentPlugin, plugins.SnapshotPlugin}},
	} {
		all = all.Register(&r)
	}
	return all
}

// part returns the one instance of a type, as what it is needed for.
func part[T any](ic *cplugin.InitContext, t cplugin.Type) (T, error) {
	var none T
	v, err := ic.GetSingle(t)
	if err != nil {
		return none, err
	}
	instance, ok := v.(T)
	if !ok {
		return none, fmt.Errorf("plugin %s is a %T, not a %T", t, v, none)
	}
	return instance, nil
}

// settings is what each part finds in ic.Config.
type settings struct {
	*config.Config
	calls *calls // of the server
}

func configOf(ic *cplugin.InitContext) *config.Config { return ic.Config.(*settings).Config }

func callsOf(ic *cplugin.InitContext) *calls { return ic.Config.(*settings).calls }

func initContainerd(ic *cplugin.InitContext) (any, error) {
	return dialContainerd(configOf(ic).Containerd.Address)
}

func initLayers(ic *cplugin.InitContext) (any, error) {
	blobs, err := part[*transfers](ic, TransferPlugin)
	if err != nil {
		return nil, err
	}
	return layer.Open(filepath.Join(configOf(ic).Root, "layers"), layer.Options{NewHash: sha256x2.New, MakeRoom: blobs.makeRoom})
}

func initTransfers(ic *cplugin.InitContext) (any, error) {
	return openTransfers(configOf(ic))
}

func initRegistry(ic *cplugin.InitContext) (any, error) {
	return setup.Registry(configOf(ic))
}

func initPull(ic *cplugin.InitContext) (any, error) {
	layers, err := part[*layer.Cache](ic, LayerPlugin)
	if err != nil {
		return nil, err
	}
	blobs, err := part[*transfers](ic, TransferPlugin)
	if err != nil {
		return nil, err
	}
	sources, err := part[*registry.Registry](ic, RegistryPlugin)
	if err != nil {
		return nil, err
	}
	client, err := part[*containerd](ic, ContainerdPlugin)
	if err != nil {
		return nil, err
	}
	return newPull(configOf(ic), blobs.of, sources, layers, client)
}

// newPull is the one call of plugin/pull's constructor.
func newPull(
	c *config.Config, transfers func(string) (*transfer.Manager, error),
	sources *registry.Registry, layers *layer.Cache, client pull.Containerd,
) (*pull.Puller, error) {
	return pull.New(pull.Options{
		Transfers: transfers, Registry: sources, Layers: layers, Containerd: client,
		Isolated: c.Isolated(), Discard: c.Content.Retain == config.RetainNone, Workers: c.UnpackWorkers(),
	})
}

func initContent(ic *cplugin.InitContext) (any, error) {
	puller, err := part[*pull.Puller](ic, PullPlugin)
	if err != nil {
		return nil, err
	}
	c := configOf(ic)
	store, err := content.NewStore(c.Content.Root, content.Options{
		Fetcher: puller, Observer: puller, Refetcher: puller,
		Isolated: c.Isolated(), GiveUp: c.Transfer.GiveUp,
	})
	if err != nil {
		return nil, err
	}
	// The puller reads manifests from the store, and the store asks the puller
	// for layers: the circle is closed here.
	puller.Start(ic.Context, store)
	return store, nil
}

func initSnapshotter(ic *cplugin.InitContext) (any, error) {
	puller, err := part[*pull.Puller](ic, PullPlugin)
	if err != nil {
		return nil, err
	}
	layers, err := part[*layer.Cache](ic, LayerPlugin)
	if err != nil {
		return nil, err
	}
	c := configOf(ic)
	return snapshotter.New(ic.Context, c.Root, layers, snapshotter.Options{
		Mount: snapshotter.Mode(c.Snapshotter.Mount), Observer: puller, Spent: spent,
		Upper: snapshotter.Upper(c.Snapshotter.Upper), UpperSize: c.Snapshotter.UpperSize,
	})
}

func initDiffer(ic *cplugin.InitContext) (any, error) {
	puller, err := part[*pull.Puller](ic, PullPlugin)
	if err != nil {
		return nil, err
	}
	store, err := part[*content.Store](ic, plugins.ContentPlugin)
	if err != nil {
		return nil, err
	}
	snapshots, err := part[*snapshotter.Snapshotter](ic, plugins.SnapshotPlugin)
	if err != nil {
		return nil, err
	}
	return differ.New(puller, snapshots, store), nil
}

func serveContent(ic *cplugin.InitContext) (any, error) {
	store, err := part[*content.Store](ic, plugins.ContentPlugin)
	if err != nil {
		return nil, err
	}
	return service(func(s *grpc.Server) {
		contentapi.RegisterContentServer(s, contentservice.New(store, callsOf(ic).wrote))
	}), nil
}

func serveSnapshots(ic *cplugin.InitContext) (any, error) {
	snapshots, err := part[*snapshotter.Snapshotter](ic, plugins.SnapshotPlugin)
	if err != nil {
		return nil, err
	}
	return service(func(s *grpc.Server) {
		snapshotsapi.RegisterSnapshotsServer(s, snapshotservice.FromSnapshotter(snapshots))
	}), nil
}

func serveDiff(ic *cplugin.InitContext) (any, error) {
	d, err := part[*differ.Differ](ic, plugins.DiffPlugin)
	if err != nil {
		return nil, err
	}
	return service(func(s *grpc.Server) { diffapi.RegisterDiffServer(s, diffservice.FromApplierAndComparer(d, d)) }), nil
}

func serveRestore(ic *cplugin.InitContext) (any, error) {
	store, err := part[*content.Store](ic, plugins.ContentPlugin)
	if err != nil {
		return nil, err
	}
	return service(func(s *grpc.Server) { restore.Register(s, restorer{store}) }), nil
}

func serveCheck(ic *cplugin.InitContext) (any, error) {
	c, err := newChecker(ic)
	if err != nil {
		return nil, err
	}
	return service(func(s *grpc.Server) { check.Register(s, c) }), nil
}

func serveStatus(ic *cplugin.InitContext) (any, error) {
	r, err := newReporter(ic)
	if err != nil {
		return nil, err
	}
	return service(func(s *grpc.Server) { status.Register(s, r) }), nil
}
