// Package restore brings all discarded blobs back on a node, told by `gantry content restore`: the gRPC service that
// does it and the call.
//
// The events travel as JSON within well-known protobuf types, as those of plugin/status do:
//
//	gantry.v1.Content/Restore (google.protobuf.Empty) -> stream of google.protobuf.BytesValue
package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	serviceName   = "gantry.v1.Content"
	restoreMethod = "/" + serviceName + "/Restore"
)

// Values of Event.State.
const (
	Begun    = "begun"    // what is to be done; no blob
	Restored = "restored" // the blob is there, or was deleted meanwhile
	Failed   = "failed"
)

// Event is how far a restore is. Sizes in bytes.
type Event struct {
	State   string        `json:"state"`
	Digest  digest.Digest `json:"digest,omitempty"`
	Size    int64         `json:"size"` // of the blob
	Seconds float64       `json:"seconds"`
	Error   string        `json:"error,omitempty"`
	// Done of Blobs have ended, well or not, with DoneBytes of Bytes.
	Done      int   `json:"done"`
	Blobs     int   `json:"blobs"`
	DoneBytes int64 `json:"done_bytes"`
	Bytes     int64 `json:"bytes"`
}

// Server brings the blobs back. It calls send for each event, from one goroutine at a time; an error of send ends it.
type Server interface {
	Restore(ctx context.Context, send func(Event) error) error
}

// Register adds the service to a gRPC server before it serves.
func Register(r grpc.ServiceRegistrar, s Server) { r.RegisterService(&desc, s) }

var desc = grpc.ServiceDesc{
	ServiceName: serviceName,
	HandlerType: (*Server)(nil),
	Streams:     []grpc.StreamDesc{{StreamName: "Restore", ServerStreams: true, Handler: handle}},
}

func handle(srv any, stream grpc.ServerStream) error {
	if err := stream.RecvMsg(&emptypb.Empty{}); err != nil {
		return err
	}
	return srv.(Server).Restore(stream.Context(), func(e Event) error {
		data, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("encode an event: %w", err)
		}
		return stream.SendMsg(wrapperspb.Bytes(data))
	})
}

// Call has the gantryd that conn leads to bring all blobs back and passes its events on. When ctx ends the restore ends
// too; what was fetched is kept. The error is each's, or a gRPC status: Unavailable if nothing listens there.
func Call(ctx context.Context, conn grpc.ClientConnInterface, each func(Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := conn.NewStream(ctx, &desc.Streams[0], restoreMethod)
	if err != nil {
		return err
	}
	if err := errors.Join(stream.SendMsg(&emptypb.Empty{}), stream.CloseSend()); err != nil {
		return err
	}
	for {
		msg := &wrapperspb.BytesValue{}
		if err := stream.RecvMsg(msg); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		var e Event
		if err := json.Unmarshal(msg.GetValue(), &e); err != nil {
			return fmt.Errorf("decode an event: %w", err)
		}
		if err := each(e); err != nil {
			return err
		}
	}
}
