package harness

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// sendBuffer is what SO_SNDBUF is asked for. The kernel sets and reports twice as much, the other half for
	// its own bookkeeping (socket(7)): this many bytes of payload wait unseen by the client.
	sendBuffer = 64 << 10
	// copyStep is how much is written at once: small enough to be fair, large enough to cost little.
	copyStep = 64 << 10
	// credit is how far a bucket may run behind and catch up. Timers are late by milliseconds, more on a busy
	// machine, and without it each lateness would be lost; one that was idle must not save up as much.
	credit     = 100 * time.Millisecond
	idleCredit = 10 * time.Millisecond
)

// bucket spaces bytes out evenly. Whoever waits on it goes in the order of asking, so that all get the same.
type bucket struct {
	rate int64 // bytes a second

	mu    sync.Mutex
	next  time.Time // when what has been promised so far will have gone
	awake time.Time // when somebody was last told to go
}

// newBucket returns nil for no limit.
func newBucket(rate int64) *bucket {
	if rate <= 0 {
		return nil
	}
	return &bucket{rate: rate}
}

// step is how many bytes are best sent at once.
func (b *bucket) step() int64 { return min(max(b.rate/50, 1), copyStep) }

// wait returns when n more bytes may go, or with net.ErrClosed when done is closed before.
func (b *bucket) wait(n int64, done <-chan struct{}) error {
	d := b.promise(n)
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-done:
			return net.ErrClosed
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.awake = time.Now()
	return nil
}

// promise returns how long n more bytes have to wait.
func (b *bucket) promise(n int64) time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, most := time.Now(), credit
	if now.Sub(b.awake) > idleCredit {
		most = idleCredit
	}
	if floor := now.Add(-most); b.next.Before(floor) {
		b.next = floor
	}
	b.next = b.next.Add(time.Duration(float64(n) / float64(b.rate) * float64(time.Second)))
	return b.next.Sub(now)
}

// countedListener accepts connections that count what is written to them, and keep to the limits.
type countedListener struct {
	*net.TCPListener
	sent          *atomic.Int64
	total         *bucket // nil: no limit
	perConnection int64   // 0: no limit
}

func (l *countedListener) Accept() (net.Conn, error) {
	tcp, err := l.AcceptTCP()
	if err != nil {
		return nil, err
	}
	if err := tcp.SetWriteBuffer(sendBuffer); err != nil {
		return nil, err
	}
	c := &countedConn{TCPConn: tcp, sent: l.sent, closed: make(chan struct{})}
	for _, b := range []*bucket{newBucket(l.perConnection), l.total} {
		if b != nil {
			c.limits = append(c.limits, b)
		}
	}
	return c, nil
}

// countedConn is a connection of a countedListener. net/http writes to it in two ways, and both count:
// Write, and ReadFrom for files, which the kernel sends (sendfile).
type countedConn struct {
	*net.TCPConn
	sent   *atomic.Int64
	limits []*bucket
	once   sync.Once
	closed chan struct{}
}

func (c *countedConn) take(n int64) error {
	for _, b := range c.limits {
		if err := b.wait(n, c.closed); err != nil {
			return err
		}
	}
	return nil
}

func (c *countedConn) Write(p []byte) (written int, err error) {
	for written < len(p) {
		part := p[written:min(len(p), written+copyStep)]
		if err := c.take(int64(len(part))); err != nil {
			return written, err
		}
		n, err := c.TCPConn.Write(part)
		written += n
		c.sent.Add(int64(n))
		if err != nil {
			return written, err
		}
	}
	return written, nil
}

// ReadFrom is only called with what [exchange.room] allows, at most copyStep bytes of a file.
func (c *countedConn) ReadFrom(r io.Reader) (int64, error) {
	part, ok := r.(*io.LimitedReader)
	if !ok || part.N > copyStep {
		return io.Copy(writeOnly{c}, r)
	}
	if err := c.take(part.N); err != nil {
		return 0, err
	}
	n, err := c.TCPConn.ReadFrom(part)
	c.sent.Add(n)
	return n, err
}

type writeOnly struct{ io.Writer }

// Close also ends what waits for a limit.
func (c *countedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.TCPConn.Close()
}

type connKey struct{}

// connOf returns the connection that a request came by.
func connOf(ctx context.Context) *countedConn { return ctx.Value(connKey{}).(*countedConn) }
