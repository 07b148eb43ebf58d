// Proxied serves containerd's own overlayfs snapshotter and content store on a socket, for a containerd that uses them
// as proxy plugins: what is slower there than in containerd itself is what the way through the socket costs.
//
//	proxied SOCKET ROOT
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

// maxMessage is the largest message accepted, in bytes: containerd's own limit.
const maxMessage = 16 << 20

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "proxied:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
}

func run(ctx context.Context, socket, root string) error {
	blobs, err := local.NewStore(filepath.Join(root, "content"))
	if err != nil {
		return err
	}
	// As containerd makes it without any settings.
	snapshots, err := overlay.NewSnapshotter(filepath.Join(root, "overlayfs"), overlay.AsynchronousRemove, overlay.WithRemapIDs)
	if err != nil {
		return err
	}
	defer snapshots.Close()
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	contentapi.RegisterContentServer(server, contentserver.New(blobs))
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshots))
	l, err := new(net.ListenConfig).Listen(ctx, "unix", socket)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, server.Stop)
	return server.Serve(l)
}
