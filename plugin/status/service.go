package status

import (
	"context"
	"encoding/json"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const (
	serviceName = "gantry.v1.Status"
	getMethod   = "/" + serviceName + "/Get"
)

// Server makes the report. Get is called for each request, at any time after
// start and from several goroutines; it must not wait for a registry, for
// containerd or for an unpack.
type Server interface {
	Get(ctx context.Context) (*Report, error)
}

// Register adds the service to a gRPC server before it serves.
func Register(r grpc.ServiceRegistrar, s Server) {
	r.RegisterService(&desc, s)
}

// desc is written by hand: the messages are well-known types, so there is
// nothing for a protobuf compiler to generate.
var desc = grpc.ServiceDesc{
	ServiceName: serviceName,
	HandlerType: (*Server)(nil),
	Methods:     []grpc.MethodDesc{{MethodName: "Get", Handler: handleGet}},
}

func handleGet(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
	in := &emptypb.Empty{}
	if err := decode(in); err != nil {
		return nil, err
	}
	handler := func(ctx context.Context, _ any) (any, error) {
		report, err := srv.(Server).Get(ctx)
		if err != nil {
			return nil, err
		}
		data, err := json.Marshal(report)
		if err != nil {
			return nil, fmt.Errorf("encode the status: %w", err)
		}
		return wrapperspb.Bytes(data), nil
	}
	if interceptor == nil {
		return handler(ctx, in)
	}
	return interceptor(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: getMethod}, handler)
}

// Get fetches the report of the gantryd that conn leads to. The error is a gRPC
// status: Unavailable if nothing listens there.
func Get(ctx context.Context, conn grpc.ClientConnInterface) (*Report, error) {
	out := &wrapperspb.BytesValue{}
	if err := conn.Invoke(ctx, getMethod, &emptypb.Empty{}, out); err != nil {
		return nil, err
	}
	report := &Report{}
	if err := json.Unmarshal(out.GetValue(), report); err != nil {
		return nil, fmt.Errorf("decode the status: %w", err)
	}
	return report, nil
}
