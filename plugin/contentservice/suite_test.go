package contentservice

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/content"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serveStore serves a store on a unix socket in dir, as gantryd does, and returns
// containerd's client of it.
func serveStore(ctx context.Context, dir string, store *content.Store) (ccontent.Store, func() error, error) {
	path := filepath.Join(dir, "g.sock")
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer(grpc.MaxRecvMsgSize(MaxMessage), grpc.WaitForHandlers(true))
	if err := New(store, nil).Register(server); err != nil {
		return nil, nil, err
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)))
	if err != nil {
		server.Stop()
		return nil, nil, errors.Join(err, <-done)
	}
	stop := func() error {
		err := conn.Close()
		server.Stop()
		return errors.Join(err, <-done)
	}
	return proxy.NewContentStore(conn), stop, nil
}

func TestProxySuite(t *testing.T) { //nolint:paralleltest // the suite counts on its order
	testsuite.ContentSuite(t, "proxy", func(ctx context.Context, root string) (context.Context, ccontent.Store, func() error, error) {
		s, err := content.NewStore(filepath.Join(root, "content"), content.Options{})
		if err != nil {
			return nil, nil, nil, err
		}
		client, stop, err := serveStore(ctx, root, s)
		return ctx, client, stop, err
	})
}

// containerd's metadata store before the proxy: what a node runs.
func TestMetadataProxySuite(t *testing.T) { //nolint:paralleltest // the suite counts on its order
	shared := behindMetadata()
	isolated := behindMetadata(metadata.WithPolicyIsolated)
	testsuite.ContentSuite(t, "metadata-proxy", shared)
	testsuite.ContentCrossNSSharedSuite(t, "metadata-proxy", shared)
	testsuite.ContentCrossNSIsolatedSuite(t, "metadata-proxy", isolated)
	testsuite.ContentSharedNSIsolatedSuite(t, "metadata-proxy", isolated)
}

func behindMetadata(opts ...metadata.DBOpt) testsuite.StoreInitFn {
	return func(ctx context.Context, root string) (context.Context, ccontent.Store, func() error, error) {
		s, err := content.NewStore(filepath.Join(root, "content"), content.Options{})
		if err != nil {
			return nil, nil, nil, err
		}
		client, stop, err := serveStore(ctx, root, s)
		if err != nil {
			return nil, nil, nil, err
		}
		db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, nil)
		if err != nil {
			return nil, nil, nil, errors.Join(err, stop())
		}
		name := testsuite.Name(ctx)
		var count atomic.Uint64
		ctx = testsuite.SetContextWrapper(ctx, func(ctx context.Context, sharedNS bool) (context.Context, func(context.Context) error, error) {
			ns := fmt.Sprintf("%s-n%d", name, count.Add(1))
			ctx = namespaces.WithNamespace(ctx, ns)
			done := func(context.Context) error { return nil }
			if !sharedNS {
				return ctx, done, nil
			}
			return ctx, done, db.Update(func(tx *bolt.Tx) error {
				return metadata.NewNamespaceStore(tx).SetLabel(ctx, ns, labels.LabelSharedNamespace, "true")
			})
		})
		cleanup := func() error { return errors.Join(db.Close(), stop()) }
		return ctx, metadata.NewDB(db, client, nil, opts...).ContentStore(), cleanup, nil
	}
}
