// Package stream serves and calls methods of gantry's own gRPC services that answer one request with events. Both travel
// as JSON within well-known protobuf types, so that any gRPC client can use them without generated code:
//
//	(google.protobuf.BytesValue) -> stream of google.protobuf.BytesValue
package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Desc describes a method. run gets the server that was registered; it calls send from one goroutine at a time, and an
// error of send ends it.
func Desc[Request, Event any](name string, run func(ctx context.Context, server any, r Request, send func(Event) error) error) grpc.StreamDesc {
	return grpc.StreamDesc{StreamName: name, ServerStreams: true, Handler: func(server any, s grpc.ServerStream) error {
		in := &wrapperspb.BytesValue{} // an Empty on the wire is one, too
		if err := s.RecvMsg(in); err != nil {
			return err
		}
		var r Request
		if data := in.GetValue(); len(data) > 0 {
			if err := json.Unmarshal(data, &r); err != nil {
				return fmt.Errorf("decode the request: %w", err)
			}
		}
		return run(s.Context(), server, r, func(e Event) error {
			data, err := json.Marshal(e)
			if err != nil {
				return fmt.Errorf("encode an event: %w", err)
			}
			return s.SendMsg(wrapperspb.Bytes(data))
		})
	}}
}

// Call calls a method at path and passes its events on. When ctx ends the method ends too. The error is each's, or a gRPC
// status: Unavailable if nothing listens there.
func Call[Request, Event any](ctx context.Context, conn grpc.ClientConnInterface, desc *grpc.StreamDesc, path string, r Request, each func(Event) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	request, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode the request: %w", err)
	}
	s, err := conn.NewStream(ctx, desc, path)
	if err != nil {
		return err
	}
	if err := errors.Join(s.SendMsg(wrapperspb.Bytes(request)), s.CloseSend()); err != nil {
		return err
	}
	for {
		msg := &wrapperspb.BytesValue{}
		if err := s.RecvMsg(msg); errors.Is(err, io.EOF) {
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
		if err := ctx.Err(); err != nil { // what has arrived already would be passed on
			return status.FromContextError(err).Err()
		}
	}
}
