package transfer

import (
	"context"
	"io"
)

// Source is one place that serves the bytes of a blob. Implemented by content/registry.
type Source interface {
	// Host names the place in logs and errors.
	Host() string
	// Open requests n bytes from off; one HTTP request.
	Open(ctx context.Context, off, n int64) (Body, error)
}

// Body is the reply of a Source. Off and N say what the host really sends: a host that ignores ranges answers Off 0, N size.
type Body struct {
	io.ReadCloser
	Off, N int64
}
