package pull

import (
	"io"
	"sync"
	"time"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// clock tells waiting for compressed bytes from decompressing them, as the layer
// cache feels it. A decompressor may read ahead: only while the layer cache waits
// too does a wait for bytes count.
type clock struct {
	mu       sync.Mutex
	since    time.Time // when one of the two last changed
	outputs  int       // the layer cache waits for the stream
	inputs   int       // the stream waits for bytes
	starved  time.Duration
	decoding time.Duration
}

// output and input count one more waiting in, or out, with a negative n.
func (c *clock) output(n int) { c.change(n, 0) }
func (c *clock) input(n int)  { c.change(0, n) }

func (c *clock) change(outputs, inputs int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	switch {
	case c.outputs > 0 && c.inputs > 0:
		c.starved += now.Sub(c.since)
	case c.outputs > 0:
		c.decoding += now.Sub(c.since)
	}
	c.since, c.outputs, c.inputs = now, c.outputs+outputs, c.inputs+inputs
}

// spent returns how long the layer cache waited for bytes to arrive, and for
// those that had to be decompressed.
func (c *clock) spent() (starved, decoding time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.starved, c.decoding
}

// stream is what a decompressor offers: its own buffers.
type stream interface {
	io.Reader
	layer.Blocks
}

// timed has the clock run while r is waited for.
func (c *clock) timed(r stream) stream { return timed{r, c} }

type timed struct {
	r     stream
	clock *clock
}

var _ layer.Blocks = timed{}

// Next implements layer.Blocks.
func (t timed) Next() ([]byte, func(), error) {
	t.clock.output(1)
	defer t.clock.output(-1)
	return t.r.Next()
}

// Read implements io.Reader.
func (t timed) Read(p []byte) (int, error) {
	t.clock.output(1)
	defer t.clock.output(-1)
	return t.r.Read(p)
}
