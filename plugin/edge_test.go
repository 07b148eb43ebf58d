package plugin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/gantryd/gantry/plugin/status"
)

func testLogger() *log.Entry {
	logger := logrus.New()
	logger.SetOutput(&bytes.Buffer{})
	return logrus.NewEntry(logger)
}

type serverFunc func(context.Context) (*status.Report, error)

func (f serverFunc) Get(ctx context.Context) (*status.Report, error) { return f(ctx) }

// serveEdge serves f behind an edge and returns its address.
func serveEdge(t *testing.T, logger *log.Entry, f serverFunc) string {
	t.Helper()
	address := filepath.Join(t.TempDir(), "s")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", address)
	if err != nil {
		t.Fatal(err)
	}
	srv, _ := newServer(logger)
	status.Register(srv, f)
	srv.RegisterService(&grpc.ServiceDesc{ServiceName: "test", HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{
		StreamName: "S", ServerStreams: true,
		Handler: func(_ any, ss grpc.ServerStream) error {
			_, err := f(ss.Context())
			return err
		},
	}}}, f)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-done //nolint:errcheck // only its end counts
	})
	return address
}

func TestEdge(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		f    serverFunc
		want codes.Code
		text string
	}{
		"namespace": {func(ctx context.Context) (*status.Report, error) {
			ns, err := namespaces.NamespaceRequired(ctx)
			if err != nil || ns != "here" {
				return nil, fmt.Errorf("the namespace is %q, %w", ns, err)
			}
			return &status.Report{}, nil
		}, codes.OK, ""},
		"sentinel": {func(context.Context) (*status.Report, error) {
			return nil, fmt.Errorf("blob x: %w", errdefs.ErrNotFound)
		}, codes.NotFound, "blob x"},
		// errgrpc does not stand an Unwrap that returns nil, as net.DNSError's does, in an error that wraps several.
		"host without an address": {func(context.Context) (*status.Report, error) {
			return nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, &net.DNSError{Err: "no such host", Name: "x", IsNotFound: true})
		}, codes.Unavailable, "no such host"},
		"canceled": {func(context.Context) (*status.Report, error) {
			return nil, fmt.Errorf("blob x: %w", context.Canceled)
		}, codes.Canceled, "blob x"},
		"status": {func(context.Context) (*status.Report, error) {
			return nil, fmt.Errorf("blob x: %w", grpcstatus.Error(codes.NotFound, "gone"))
		}, codes.NotFound, "blob x: "},
		"unknown": {func(context.Context) (*status.Report, error) { return nil, errors.New("blob x") }, codes.Unknown, "blob x"},
		"panic":   {func(context.Context) (*status.Report, error) { panic("oh no") }, codes.Internal, "oh no"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			logger := logrus.New()
			logger.SetOutput(&out)
			conn := dial(t, serveEdge(t, logrus.NewEntry(logger), tc.f))
			ctx := namespaces.WithNamespace(t.Context(), "here")
			// Twice: a call that failed must not end the server.
			for range 2 {
				_, err := status.Get(ctx, conn)
				checkStatus(t, "unary", err, tc.want, tc.text)
				s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/test/S")
				if err != nil {
					t.Fatal(err)
				}
				if err := s.CloseSend(); err != nil {
					t.Fatal(err)
				}
				if err = s.RecvMsg(nil); errors.Is(err, io.EOF) {
					err = nil
				}
				checkStatus(t, "stream", err, tc.want, tc.text)
			}
			if name == "panic" && !strings.Contains(out.String(), "edge_test.go") {
				t.Errorf("the log has no stack: %s", out.String())
			}
		})
	}
}

func checkStatus(t *testing.T, what string, err error, want codes.Code, text string) {
	t.Helper()
	if code := grpcstatus.Code(err); code != want || (err != nil && !strings.Contains(err.Error(), text)) {
		t.Errorf("%s: got %v, want %v with %q", what, err, want, text)
	}
}

func TestProbeOfAHangingDaemon(t *testing.T) {
	t.Parallel()
	address := serveEdge(t, testLogger(), func(ctx context.Context) (*status.Report, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	})
	if err := probe(t.Context(), address, 50*time.Millisecond); err == nil {
		t.Error("a daemon that does not answer passes for alive")
	}
}

// TestSystemd sets the environment, so it does not run in parallel.
func TestSystemd(t *testing.T) {
	dir, err := os.MkdirTemp("", "gantry")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: dir + "/n", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	t.Setenv("NOTIFY_SOCKET", dir+"/n")
	t.Setenv("WATCHDOG_USEC", "300000")
	t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
	_, stop := run(t, testConfig(t, ""))

	expect := func(want string) {
		t.Helper()
		buf := make([]byte, 100)
		for {
			n, err := l.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			if string(buf[:n]) == want {
				return
			}
		}
	}
	expect("READY=1")
	expect("WATCHDOG=1")
	expect("WATCHDOG=1")
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1")
}
