// Package check is what `gantry check` tells: the faults of a node's stores, what they mean and how they are cured; the
// gRPC service of gantryd that looks for them, and the call. plugin does the looking, also where no gantryd runs.
//
//	gantry.v1.Check/Run (google.protobuf.BytesValue) -> stream of google.protobuf.BytesValue
package check

import (
	"context"

	"google.golang.org/grpc"

	"github.com/gantryd/gantry/plugin/stream"
)

const (
	serviceName = "gantry.v1.Check"
	runMethod   = "/" + serviceName + "/Run"
)

// Request says what is to be done.
type Request struct {
	// Repair what can be repaired.
	Repair bool `json:"repair"`
	// Workers is how many files are read at once; 0: as many as there are CPUs.
	Workers int `json:"workers,omitempty"`
}

// Values of Event.State.
const (
	Progress = "progress" // only the counts
	Found    = "found"    // a fault
	Repaired = "repaired" // one that was found before is cured
	Failed   = "failed"   // it is not
	Ended    = "ended"    // all was looked at
)

// Fault is one thing that is broken. What and Where name it, and do not change.
type Fault struct {
	What    string `json:"what"`  // blob, record, layer file, snapshot, index, mount, transfer, database or leftover
	Where   string `json:"where"` // a path
	Problem string `json:"problem"`
	Meaning string `json:"meaning"` // for whoever uses the node
	// Affected are images, "namespace/name", as far as containerd tells.
	Affected []string `json:"affected,omitempty"`
	Cure     string   `json:"cure"` // what to do, or what was done about it
}

// Event is how far a check is. Sizes in bytes.
type Event struct {
	State string `json:"state"`
	Fault *Fault `json:"fault,omitempty"`
	// Note is something that limits what the check can tell.
	Note string `json:"note,omitempty"`
	// DoneFiles of Files with DoneBytes of Bytes were read.
	Files     int   `json:"files"`
	DoneFiles int   `json:"done_files"`
	Bytes     int64 `json:"bytes"`
	DoneBytes int64 `json:"done_bytes"`
}

// Server looks for faults. It calls send from one goroutine at a time; an error of send ends it. The error is that it
// could not look, never a fault.
type Server interface {
	Run(ctx context.Context, r Request, send func(Event) error) error
}

// Register adds the service to a gRPC server before it serves.
func Register(r grpc.ServiceRegistrar, s Server) { r.RegisterService(&desc, s) }

var desc = grpc.ServiceDesc{
	ServiceName: serviceName,
	HandlerType: (*Server)(nil),
	Streams: []grpc.StreamDesc{stream.Desc("Run", func(ctx context.Context, srv any, r Request, send func(Event) error) error {
		return srv.(Server).Run(ctx, r, send)
	})},
}

// Call has the gantryd that conn leads to check its stores and passes its events on. When ctx ends the check ends too.
func Call(ctx context.Context, conn grpc.ClientConnInterface, r Request, each func(Event) error) error {
	return stream.Call(ctx, conn, &desc.Streams[0], runMethod, r, each)
}
