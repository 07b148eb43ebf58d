package plugin

import (
	"context"
	"fmt"
	"path"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// maxMessage is the largest message accepted, in bytes. A client that writes a
// blob itself sends 1 MiB at a time; containerd's own limit is 16 MiB.
const maxMessage = 16 << 20

// newServer returns a gRPC server whose calls have a logger and the caller's
// namespace in their context, whose errors are gRPC's, and which survives a panic
// in a call. It sets no limit of concurrent streams: a waiting Write stream must
// not hold up others.
func newServer(logger *log.Entry) (*grpc.Server, *edge) {
	e := &edge{logger: logger, calls: &calls{}, stopping: make(chan struct{})}
	return grpc.NewServer(
		grpc.UnaryInterceptor(e.unary),
		grpc.StreamInterceptor(e.stream),
		grpc.MaxRecvMsgSize(maxMessage),
		grpc.MaxSendMsgSize(maxMessage),
	), e
}

// edge is where gRPC ends and gantry begins.
type edge struct {
	logger *log.Entry
	busy   atomic.Int64 // calls under way
	calls  *calls

	stopping chan struct{} // closed when no new calls are accepted
	stopOnce sync.Once
}

// ownServices begins the methods of gantry's own services. Their streams (a check, a restoration) may go on for hours, and
// nothing is lost when they end: a stop does not wait for them.
const ownServices = "/gantry."

var errStopping = fmt.Errorf("gantryd is stopping: %w", errdefs.ErrUnavailable)

// stop ends the streams of gantry's own services.
func (e *edge) stop() { e.stopOnce.Do(func() { close(e.stopping) }) }

// untilStop returns a context that ends when gantryd begins to stop.
func (e *edge) untilStop(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-e.stopping:
			cancel(errStopping)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// idle waits until no call is under way, and reports whether that came in time.
// gRPC's own Stop either leaves calls behind or waits for them without a bound.
func (e *edge) idle(limit time.Duration) bool {
	end := time.After(limit)
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for e.busy.Load() != 0 {
		select {
		case <-end:
			return false
		case <-ticker.C:
		}
	}
	return true
}

func (e *edge) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
	e.busy.Add(1)
	defer e.busy.Add(-1)
	ctx, m := withMeter(e.enter(ctx, info.FullMethod))
	defer func(began time.Time) { e.calls.note(shortMethod(info.FullMethod), time.Since(began), m) }(time.Now())
	defer func() { err = leave(ctx, recover(), err) }()
	return handler(ctx, req)
}

func (e *edge) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	e.busy.Add(1)
	defer e.busy.Add(-1)
	ctx, m := withMeter(e.enter(ss.Context(), info.FullMethod))
	if !info.IsClientStream && path.Base(info.FullMethod) == "List" {
		// A walk: garbage collection waits for all of it. Others last as long as their clients like.
		defer func(began time.Time) { e.calls.note(shortMethod(info.FullMethod), time.Since(began), m) }(time.Now())
	}
	if strings.HasPrefix(info.FullMethod, ownServices) {
		var cancel context.CancelFunc
		ctx, cancel = e.untilStop(ctx)
		defer cancel()
	}
	defer func() { err = leave(ctx, recover(), err) }()
	return handler(srv, &streamWithContext{ServerStream: ss, context: func() context.Context { return ctx }})
}

// enter makes the context of a call. A proxy of containerd's sends its caller's
// namespace as metadata.
func (e *edge) enter(ctx context.Context, method string) context.Context {
	logger := e.logger.WithField("method", method)
	if ns, ok := namespaces.Namespace(ctx); ok {
		ctx = namespaces.WithNamespace(ctx, ns)
		logger = logger.WithField("namespace", ns)
	}
	return log.WithLogger(ctx, logger)
}

// leave turns what a handler ended with into a gRPC status.
func leave(ctx context.Context, panicked any, err error) error {
	if panicked != nil {
		log.G(ctx).WithField("panic", panicked).Errorf("a call panicked; please report this with the stack\n%s", debug.Stack())
		err = fmt.Errorf("gantryd: panic: %v: %w", panicked, errdefs.ErrInternal)
	}
	if err == nil {
		return nil
	}
	err = toStatus(err)
	log.G(ctx).WithError(err).Debug("call failed")
	return err
}

// toStatus keeps an error's code and message. errgrpc would add details, which
// carry the parts of a joined error: containerd's clients print the parts in
// place of the message, and not every error stands being taken apart.
func toStatus(err error) error {
	if s, ok := status.FromError(err); ok {
		return status.Error(s.Code(), s.Message())
	}
	return status.Error(status.Code(errgrpc.ToGRPC(errdefs.Resolve(err))), err.Error())
}

// streamWithContext is a stream whose calls run in another context than the
// one it arrived with.
type streamWithContext struct {
	grpc.ServerStream
	context func() context.Context
}

// Context implements grpc.ServerStream.
func (s *streamWithContext) Context() context.Context { return s.context() }
