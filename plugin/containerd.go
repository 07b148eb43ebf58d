package plugin

import (
	"context"
	"fmt"
	"net"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs/pkg/errgrpc"
	digest "github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/pull"
)

// answerWithin bounds a question to containerd: a pull that cannot be told where
// its image is from falls back to containerd's own fetch within seconds.
const answerWithin = 5 * time.Second

// containerd is a client of the containerd that gantryd serves. It connects when
// it is first asked and again whenever containerd comes back.
type containerd struct {
	address string
	conn    *grpc.ClientConn
	content contentapi.ContentClient
}

var _ pull.Containerd = (*containerd)(nil)

// dialContainerd makes no connection yet, so that neither daemon has to be
// started before the other.
func dialContainerd(address string) (*containerd, error) {
	retry := backoff.DefaultConfig
	retry.MaxDelay = 3 * time.Second
	conn, err := dialSocket(address, grpc.WithConnectParams(grpc.ConnectParams{Backoff: retry}))
	if err != nil {
		return nil, fmt.Errorf("containerd at %s: %w", address, err)
	}
	return &containerd{address: address, conn: conn, content: contentapi.NewContentClient(conn)}, nil
}

// Labels implements pull.Containerd. It waits for a containerd that is just
// coming up, and fails with errdefs.ErrUnavailable or a deadline after seconds.
func (c *containerd) Labels(ctx context.Context, namespace string, d digest.Digest) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(ctx, namespace), answerWithin)
	defer cancel()
	reply, err := c.content.Info(ctx, &contentapi.InfoRequest{Digest: d.String()}, grpc.WaitForReady(true))
	if err != nil {
		return nil, fmt.Errorf("ask containerd for %s in namespace %s: %w", d, namespace, errgrpc.ToNative(err))
	}
	return reply.GetInfo().GetLabels(), nil
}

// Close ends the connection.
func (c *containerd) Close() error { return c.conn.Close() }

// dialSocket returns a client of a unix socket. It connects with the first call.
// containerd's own dialer goes on trying in the background when a call is over.
func dialSocket(path string, opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///localhost", append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}),
	}, opts...)...)
}
