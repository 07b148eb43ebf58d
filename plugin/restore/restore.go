// Package restore brings all discarded blobs back on a node, told by `gantry content restore`: the gRPC service that
// does it and the call.
//
// The events travel as JSON within well-known protobuf types, as those of plugin/status do:
//
//	gantry.v1.Content/Restore (google.protobuf.BytesValue) -> stream of google.protobuf.BytesValue
package restore

import (
	"context"

	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/plugin/stream"
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
	Streams: []grpc.StreamDesc{stream.Desc("Restore", func(ctx context.Context, srv any, _ struct{}, send func(Event) error) error {
		return srv.(Server).Restore(ctx, send)
	})},
}

// Call has the gantryd that conn leads to bring all blobs back and passes its events on. When ctx ends the restore ends
// too; what was fetched is kept. The error is each's, or a gRPC status: Unavailable if nothing listens there.
func Call(ctx context.Context, conn grpc.ClientConnInterface, each func(Event) error) error {
	return stream.Call(ctx, conn, &desc.Streams[0], restoreMethod, struct{}{}, each)
}
