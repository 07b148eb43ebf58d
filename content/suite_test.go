package content

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/content/testsuite"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// The suites of containerd's own stores, unmodified.

func TestContentSuite(t *testing.T) { //nolint:paralleltest // the suite counts on its order
	testsuite.ContentSuite(t, "gantry", func(ctx context.Context, root string) (context.Context, ccontent.Store, func() error, error) {
		s, err := NewStore(root, Options{})
		return ctx, s, func() error { return nil }, err
	})
}

func TestMetadataSuite(t *testing.T) { //nolint:paralleltest // the suite counts on its order
	shared := behindMetadata()
	isolated := behindMetadata(metadata.WithPolicyIsolated)
	testsuite.ContentSuite(t, "metadata", shared)
	testsuite.ContentCrossNSSharedSuite(t, "metadata", shared)
	testsuite.ContentCrossNSIsolatedSuite(t, "metadata", isolated)
	testsuite.ContentSharedNSIsolatedSuite(t, "metadata", isolated)
}

// behindMetadata puts containerd's metadata store before a gantry store.
func behindMetadata(opts ...metadata.DBOpt) testsuite.StoreInitFn {
	return func(ctx context.Context, root string) (context.Context, ccontent.Store, func() error, error) {
		s, err := NewStore(root, Options{})
		if err != nil {
			return nil, nil, nil, err
		}
		db, err := bolt.Open(filepath.Join(root, "metadata.db"), 0o600, nil)
		if err != nil {
			return nil, nil, nil, err
		}
		name := testsuite.Name(ctx)
		var count atomic.Uint64
		ctx = testsuite.SetContextWrapper(ctx, func(ctx context.Context, sharedNS bool) (context.Context, func(context.Context) error, error) {
			ctx = namespaces.WithNamespace(ctx, fmt.Sprintf("%s-n%d", name, count.Add(1)))
			done := func(context.Context) error { return nil }
			if !sharedNS {
				return ctx, done, nil
			}
			return ctx, done, shareNamespace(ctx, db)
		})
		return ctx, metadata.NewDB(db, s, nil, opts...).ContentStore(), db.Close, nil
	}
}

func shareNamespace(ctx context.Context, db *bolt.DB) error {
	ns, ok := namespaces.Namespace(ctx)
	if !ok {
		return errors.New("no namespace")
	}
	return db.Update(func(tx *bolt.Tx) error {
		return metadata.NewNamespaceStore(tx).SetLabel(ctx, ns, labels.LabelSharedNamespace, "true")
	})
}
