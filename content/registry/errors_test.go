package registry

import (
	"errors"
	"net"
	"net/url"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// TestHostWithoutAddress hands the error of a lookup to errgrpc, as each of containerd's services does with what it
// returns. errgrpc does not stand an Unwrap that returns nil, as net.DNSError's does.
func TestHostWithoutAddress(t *testing.T) {
	t.Parallel()
	lookup := &net.DNSError{Err: "no such host", Name: "storage.invalid", IsNotFound: true}
	err := transportError(t.Context(), &url.Error{Op: "Get", URL: "http://storage.invalid/x", Err: &net.OpError{Op: "dial", Net: "tcp", Err: lookup}})
	var found *net.DNSError
	if !errors.As(err, &found) || found != lookup || !errdefs.IsUnavailable(err) {
		t.Fatalf("got %v, want an unavailable net.DNSError", err)
	}
	if got := errgrpc.ToNative(errgrpc.ToGRPC(err)); !errdefs.IsUnavailable(got) {
		t.Errorf("got %v, want what is unavailable", got)
	}
}
