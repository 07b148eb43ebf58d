package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	hostconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	ctransfer "github.com/containerd/containerd/v2/core/transfer"
	cimage "github.com/containerd/containerd/v2/core/transfer/image"
	cregistry "github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/setup"
	"github.com/gantryd/gantry/plugin/status"
)

const (
	// answerWithin is how long a daemon may take for a question that it need not think about.
	answerWithin = 10 * time.Second
	// maxMessage is containerd's own limit for a gRPC message, in bytes. A report of gantryd's may be longer.
	maxMessage = 64 << 20
)

// throughContainerd lets containerd pull, and gantryd with it.
func (p *Pull) throughContainerd(ctx context.Context) (_ *Summary, err error) {
	ctx = namespaces.WithNamespace(ctx, p.options.Namespace)
	conn, err := dial(p.config.Containerd.Address)
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", p.config.Containerd.Address, err)
	}
	client, err := containerd.NewWithConn(conn, containerd.WithDefaultPlatform(platforms.Only(p.platform)))
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	defer func() { err = errors.Join(err, client.Close()) }()
	if err := p.ready(ctx, client); err != nil {
		return nil, err
	}
	gantryd, err := dial(p.config.Address)
	if err != nil {
		return nil, fmt.Errorf("gantryd at %s: %w", p.config.Address, err)
	}
	defer func() { err = errors.Join(err, gantryd.Close()) }()
	f := &following{
		pull: p, state: p.state(ViaContainerd), store: client.ContentStore(),
		report: func(ctx context.Context) (*status.Report, error) { return status.Get(ctx, gantryd) },
		latest: &status.Report{}, events: events{}, loaded: map[digest.Digest]bool{}, seen: map[seenKey]seen{},
	}
	sum, err := p.transfer(ctx, client, f)
	if err != nil {
		return nil, p.explain(p.withoutGantryd(ctx, err), f.failed(ctx, err))
	}
	return sum, nil
}

// ready checks that containerd answers, that it uses gantry and that gantryd runs.
func (p *Pull) ready(ctx context.Context, client *containerd.Client) error {
	const instead = "--no-containerd fetches without it"
	address := p.config.Containerd.Address
	ctx, cancel := context.WithTimeoutCause(ctx, answerWithin, fmt.Errorf("no answer within %s", answerWithin))
	defer cancel()
	found, err := client.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", plugins.SnapshotPlugin, config.SnapshotterName))
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("containerd at %s: %w; %s", address, context.Cause(ctx), instead)
	case err != nil:
		return fmt.Errorf("containerd at %s: %w; %s", address, err, instead)
	case len(found.GetPlugins()) == 0:
		return fmt.Errorf("containerd at %s runs without gantry: it has no snapshotter %q. "+
			"Give it what `gantry config containerd` prints (see gantry help config containerd) and restart it; %s: %w",
			address, config.SnapshotterName, instead, errdefs.ErrFailedPrecondition)
	}
	switch running, err := listens(ctx, p.config.Address); {
	case err != nil:
		return fmt.Errorf("gantryd at %s: %w", p.config.Address, asRoot(err))
	case !running:
		return fmt.Errorf("gantryd is not running, and containerd cannot pull without it: nobody answers at %s (systemctl start gantryd); %s: %w",
			p.config.Address, instead, errdefs.ErrUnavailable)
	}
	return nil
}

// transfer runs containerd's transfer service while f tells how far it is.
func (p *Pull) transfer(ctx context.Context, client *containerd.Client, f *following) (*Summary, error) {
	source, credentials, err := p.source(ctx)
	if err != nil {
		return nil, err
	}
	target := cimage.NewStore(p.named.String(),
		cimage.WithPlatforms(p.platform), cimage.WithUnpack(p.platform, config.SnapshotterName))
	leased, lease, err := p.lease(ctx, client.LeasesService())
	if err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() {
		ended <- patiently(leased, func() error { return client.Transfer(leased, source, target, ctransfer.WithProgress(f.event)) })
	}()
	if err := f.until(ctx, ended); err != nil {
		if !f.resolved() { // nothing was fetched that is worth keeping
			err = errors.Join(err, lease.release(context.WithoutCancel(ctx)))
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, errors.Join(err, credentials.failure())
	}
	if err := lease.releaseAll(ctx); err != nil {
		return nil, err
	}
	return p.pulled(ctx, client, f)
}

// pulled sums up what containerd has now.
func (p *Pull) pulled(ctx context.Context, client *containerd.Client, f *following) (*Summary, error) {
	image, err := client.GetImage(ctx, p.named.String())
	if err != nil {
		return nil, err
	}
	f.target(image.Target())
	state, err := f.finish(ctx)
	if err != nil {
		return nil, err
	}
	sum := summary(state)
	sum.Namespace = p.options.Namespace
	if sum.Unpacked, err = image.IsUnpacked(ctx, config.SnapshotterName); err != nil {
		return nil, fmt.Errorf("whether it is unpacked: %w", err)
	}
	p.tell(state)
	return sum, nil
}

// source is the registry as containerd is to ask it: by the same hosts files and as the same user as gantry.
func (p *Pull) source(ctx context.Context) (*cregistry.OCIRegistry, *credentials, error) {
	lookup, err := setup.Credentials(p.config)
	if err != nil {
		return nil, nil, err
	}
	c := &credentials{lookup: lookup}
	var options []cregistry.Opt
	if lookup != nil {
		options = append(options, cregistry.WithCredentials(c))
	}
	dir, err := hostDir(p.config.Registry.ConfigPath, reference.Domain(p.named))
	if err != nil {
		return nil, nil, err
	}
	if dir != "" {
		options = append(options, cregistry.WithHostDir(dir))
	}
	source, err := cregistry.NewOCIRegistry(ctx, p.named.String(), options...)
	return source, c, err
}

// hostDir returns the first of several folders of hosts files that knows the host: containerd takes one.
func hostDir(configPath, host string) (string, error) {
	for _, root := range filepath.SplitList(configPath) {
		if root == "" {
			continue
		}
		_, err := hostconfig.HostDirFromRoot(root)(host)
		if err == nil {
			return root, nil
		}
		if !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("hosts files for %s: %w", host, err)
		}
	}
	return "", nil
}

// listens says whether a process accepts connections at the unix socket.
func listens(ctx context.Context, address string) (bool, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
	switch {
	case err == nil:
		return true, conn.Close()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return false, nil
	}
	return false, err
}

// dial returns a client of a unix socket. It connects with the first call. containerd's own dialer goes on trying in
// the background when a call is over.
func dial(address string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///localhost",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage)),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", address)
		}))
}

// asRoot adds what helps where something is not permitted.
func asRoot(err error) error {
	if errors.Is(err, fs.ErrPermission) || errdefs.IsPermissionDenied(errgrpc.ToNative(err)) {
		return fmt.Errorf("%w; run as root", err)
	}
	return err
}
