// Package contentservice serves gantry's content store over containerd's content
// API. Everything but Write and Abort is containerd's own server.
package contentservice

import (
	"context"
	"errors"
	"io"
	"time"

	api "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/containerd/v2/plugins/services/content/contentserver"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/content"
)

// MaxMessage is the size in bytes of the largest message a server of this
// service should accept: a client that writes sends up to 8 MiB of data in one.
const MaxMessage = 16 << 20

// Service is containerd's content service on a gantry store.
type Service struct {
	api.ContentServer // containerd's, for all but Write and Abort

	store *content.Store
	note  func(message string, took, synced time.Duration)
}

// The messages of a Write stream within which containerd holds its database's lock.
const (
	Open   = "OPEN" // the first one, whatever it is
	Commit = "COMMIT"
)

// New returns the service of a store. note, if not nil, is told what each Open and Commit took, and how much of it the
// disk was synced. The server needs grpc.WaitForHandlers, so that Stop returns when the last stream has closed its ingest.
func New(store *content.Store, note func(message string, took, synced time.Duration)) *Service {
	if note == nil {
		note = func(string, time.Duration, time.Duration) {}
	}
	return &Service{ContentServer: contentserver.New(store), store: store, note: note}
}

// Register adds the service to a gRPC server.
func (s *Service) Register(server *grpc.Server) error {
	api.RegisterContentServer(server, s)
	return nil
}

// Abort ends the ingest of a ref. containerd's garbage collection stops at an
// error and may ask for what a restart has cleaned, so an unknown ref is fine.
func (s *Service) Abort(ctx context.Context, req *api.AbortRequest) (*emptypb.Empty, error) {
	if err := s.store.Abort(ctx, req.Ref); err != nil && !errdefs.IsNotFound(err) {
		return nil, errgrpc.ToGRPC(err)
	}
	return &emptypb.Empty{}, nil
}

// Write is one client's stream: each message is answered before the next is read.
// The first answer never waits, the first STAT after it may.
func (s *Service) Write(stream api.Content_WriteServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	ctx := log.WithLogger(stream.Context(), log.G(stream.Context()).WithField("ref", req.Ref))
	began := time.Now()
	session, err := s.store.Open(ctx, req.Ref, req.Total, digest.Digest(req.Expected))
	s.note(Open, time.Since(began), 0)
	if err != nil {
		return errgrpc.ToGRPC(err)
	}
	defer func() {
		if err := session.Close(); err != nil {
			log.G(ctx).WithError(err).Warn("closing an ingest")
		}
	}()
	err = s.serve(ctx, stream, session, req)
	if err != nil && !errdefs.IsAlreadyExists(err) {
		log.G(ctx).WithError(err).Info("a write ended")
	}
	return toGRPC(err)
}

// toGRPC leaves what gRPC itself reported as it is.
func toGRPC(err error) error {
	if _, ok := status.FromError(err); ok {
		return err
	}
	return errgrpc.ToGRPC(err)
}

// serve answers until COMMIT or until the client is done. req is the message
// that opened the session.
func (s *Service) serve(ctx context.Context, stream api.Content_WriteServer, session *content.Session, req *api.WriteContentRequest) error {
	for first := true; ; first = false {
		began, before := time.Now(), session.Synced()
		reply, err := answer(ctx, session, req, first)
		if req.Action == api.WriteAction_COMMIT {
			s.note(Commit, time.Since(began), session.Synced()-before)
		}
		if err != nil {
			return err
		}
		if err := stream.Send(reply); err != nil || req.Action == api.WriteAction_COMMIT {
			return err
		}
		req, err = stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// answer carries out one message. Every reply has the digest of the bytes so far:
// containerd uses it after an AlreadyExists from COMMIT.
func answer(ctx context.Context, session *content.Session, req *api.WriteContentRequest, first bool) (*api.WriteContentResponse, error) {
	reply := &api.WriteContentResponse{Action: req.Action}
	var err error
	switch req.Action {
	case api.WriteAction_STAT:
		st := session.Stat()
		if !first {
			st, err = session.Status(ctx)
		}
		reply.Offset, reply.Total = st.Offset, st.Total
		reply.StartedAt, reply.UpdatedAt = protobuf.ToTimestamp(st.StartedAt), protobuf.ToTimestamp(st.UpdatedAt)
	case api.WriteAction_WRITE:
		reply.Offset, err = session.Write(ctx, req.Offset, req.Data)
	case api.WriteAction_COMMIT:
		reply.Offset, err = commit(ctx, session, req)
	default:
		err = status.Errorf(codes.InvalidArgument, "unknown write action %v", req.Action)
	}
	if err != nil {
		return nil, err
	}
	reply.Digest = session.Digest().String()
	return reply, nil
}

// commit writes the data that a COMMIT may carry, and commits.
func commit(ctx context.Context, session *content.Session, req *api.WriteContentRequest) (int64, error) {
	off := req.Offset
	if len(req.Data) > 0 {
		var err error
		if off, err = session.Write(ctx, off, req.Data); err != nil {
			return 0, err
		}
	}
	return session.Commit(ctx, off, req.Total, digest.Digest(req.Expected), req.Labels)
}
