package status

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

type serverFunc func(context.Context) (*Report, error)

func (f serverFunc) Get(ctx context.Context) (*Report, error) { return f(ctx) }

// serve runs the service and returns a connection to it.
func serve(t *testing.T, s Server, opts ...grpc.ServerOption) *grpc.ClientConn {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(opts...)
	Register(srv, s)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		<-done //nolint:errcheck // only its end counts
	})
	return conn
}

func TestGet(t *testing.T) {
	t.Parallel()
	blob := digest.FromString("blob")
	now := time.Now().UTC().Round(0)
	want := &Report{
		Version: "v1", PID: 7, Started: now, Root: "/r", Mount: Mount{Mode: "loop", Reason: "kernel 6.8 mounts no files", NotIDMapped: "so"},
		// More than a float64 holds exactly: the report must not go through one.
		Transfers: []Transfer{{Digest: blob, Size: 1<<60 + 1, Frontier: 3, Received: 4, Rate: 5.5, Phase: "fetching", Hosts: []string{"a"}, Connections: 7, Waiters: 2, Started: now}},
		Unpacks:   []Unpack{{Digest: blob, Size: 9, Read: 1, Written: 2, Phase: "unpacking", Started: now}},
		Recent:    []Layer{{Namespace: "n", Image: "i", Digest: blob, DiffID: blob, Started: now, Seconds: Seconds{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, TailSeconds: 0.25}},
	}
	seen := ""
	conn := serve(t, serverFunc(func(context.Context) (*Report, error) { return want, nil }),
		grpc.UnaryInterceptor(func(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			seen = info.FullMethod
			return h(ctx, req)
		}))
	got, err := Get(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if seen != "/gantry.v1.Status/Get" {
		t.Errorf("the interceptor saw %q", seen)
	}
}

func TestGetFails(t *testing.T) {
	t.Parallel()
	conn := serve(t, serverFunc(func(context.Context) (*Report, error) { return nil, errors.New("out of order") }))
	if _, err := Get(t.Context(), conn); err == nil || !strings.Contains(err.Error(), "out of order") {
		t.Errorf("got %v, want the server's error", err)
	}
}
