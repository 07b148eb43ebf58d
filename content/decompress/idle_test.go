package decompress

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
)

// Who has to wait for memory does so within idle, and only then; when idle fails nothing is kept.
func TestIdle(t *testing.T) {
	t.Parallel()
	b := NewBudget(4 << 20)
	lent := 0
	var first *Reader
	idle := func(_ context.Context, wait func() error) error {
		if lent++; lent == 1 {
			return wait()
		}
		return errors.Join(first.Close(), wait(), io.ErrClosedPipe)
	}
	open := func(ctx context.Context) (*Reader, error) {
		return NewReader(ctx, strings.NewReader("plain"), WithBudget(b), WithIdle(idle))
	}
	var err error
	if first, err = open(t.Context()); err != nil || lent != 0 {
		t.Fatalf("there is memory: %v, lent %d times", err, lent)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	why := errors.New("given up")
	cancel(why)
	if _, err := open(ctx); !errors.Is(err, why) || lent != 1 {
		t.Errorf("got %v after lending %d times, want %v after 1", err, lent, why)
	}
	if _, err := open(t.Context()); !errors.Is(err, io.ErrClosedPipe) || lent != 2 || b.Held() != 0 {
		t.Errorf("got %v after lending %d times, %d bytes are held; want what idle failed with", err, lent, b.Held())
	}
}
