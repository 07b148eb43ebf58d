package deflate

import (
	"errors"
	"io"
	"os"
	"testing"
)

// closedWriter is a file that somebody has closed.
type closedWriter struct{}

func (closedWriter) Write([]byte) (int, error) { return 0, os.ErrClosed }

// TestCloseAfterClosedWriter: an error that looks like Close's own must not keep
// Close from ending the workers; goleak finds those left.
func TestCloseAfterClosedWriter(t *testing.T) {
	t.Parallel()
	in := squeezeGzip(t, prose(3_000_000), 6)
	src := newGrowing(in)
	src.set(len(in), nil)
	r, err := NewReaderAt(src, WithWorkers(3), withSizes(2000, smallSlab, 3))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteTo(closedWriter{}); !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if !r.e.stopped.Load() {
		t.Error("the workers go on behind Close")
	}
}

// endless is a member and zeros for ever.
type endless struct {
	head []byte
	at   int
}

func (z *endless) Read(p []byte) (int, error) {
	n := copy(p, z.head[z.at:])
	z.at += n
	clear(p[n:])
	return len(p), nil
}

// TestCloseInPadding closes a stream whose padding never ends.
func TestCloseInPadding(t *testing.T) {
	t.Parallel()
	for _, workers := range []int{2, 4} {
		r, err := NewReader(&endless{head: squeezeGzip(t, prose(10_000), 6)}, WithWorkers(workers))
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.CopyN(io.Discard, r, 10_000); err != nil {
			t.Fatal(n, err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
