package harness

import (
	"context"
	"errors"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// faultServer is what [Proxy] and [FaultRegistry] have in common: listeners that
// count what they write, the rule that breaks replies, and the record of all requests.
type faultServer struct {
	perConnection int64         // bytes a second; 0: no limit
	total         *bucket       // of all connections; nil: no limit
	latency       time.Duration // before each answer

	rule     atomic.Pointer[Rule]
	sent     atomic.Int64
	handlers sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	servers  []*http.Server
	serving  []chan error
	requests []*Request
}

// listen opens a loopback port where answer is called for what the rule lets
// through, and returns its address. The exchange is in the request's context too.
func (s *faultServer) listen(ctx context.Context, answer func(w http.ResponseWriter, r *http.Request, x *exchange)) (string, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	server := &http.Server{
		Handler:           s.handler(answer),
		ReadHeaderTimeout: time.Minute,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	serve := make(chan error, 1)
	counted := &countedListener{TCPListener: l.(*net.TCPListener), sent: &s.sent, total: s.total, perConnection: s.perConnection}
	go func() { serve <- server.Serve(counted) }()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.servers, s.serving = append(s.servers, server), append(s.serving, serve)
	return l.Addr().String(), nil
}

func (s *faultServer) handler(answer func(w http.ResponseWriter, r *http.Request, x *exchange)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := &exchange{record: newRequest(r)}
		if !s.begin(x.record) {
			return
		}
		defer s.handlers.Done()
		defer func() {
			now := time.Now()
			x.record.ended.Store(&now)
		}()
		if rule := s.rule.Load(); rule != nil {
			if f := (*rule)(r); f != nil {
				x.fault, x.pace = *f, newBucket(f.BytesPerSecond)
			}
		}
		if pause(r.Context(), s.latency+x.fault.Latency) != nil {
			return
		}
		if status := x.fault.refuse(w, r); status != 0 {
			x.answer(w, status)
			return
		}
		answer(w, r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x)), x)
	})
}

// answer writes the header and notes the status.
func (x *exchange) answer(w http.ResponseWriter, status int) {
	x.record.status.Store(int64(status))
	w.WriteHeader(status)
}

// begin notes the request, unless the server is being closed.
func (s *faultServer) begin(r *Request) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.handlers.Add(1)
	s.requests = append(s.requests, r)
	return true
}

// SetRule replaces the rule; nil lets everything pass.
func (s *faultServer) SetRule(rule Rule) {
	if rule == nil {
		s.rule.Store(nil)
		return
	}
	s.rule.Store(&rule)
}

// Close ends all connections, stalled ones too, and returns when nobody is being answered any more.
// A second call does nothing.
func (s *faultServer) Close() error {
	s.mu.Lock()
	servers, serving := s.servers, s.serving
	s.closed, s.servers, s.serving = true, nil, nil
	s.mu.Unlock()
	var errs []error
	for i, server := range servers {
		errs = append(errs, server.Close())
		if err := <-serving[i]; !errors.Is(err, http.ErrServerClosed) {
			errs = append(errs, err)
		}
	}
	s.handlers.Wait()
	return errors.Join(errs...)
}

// Sent returns how many bytes were written to sockets so far: bodies and headers, to all clients.
func (s *faultServer) Sent() int64 { return s.sent.Load() }

// Requests returns every request so far, in the order of their coming.
func (s *faultServer) Requests() []*Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Forget empties the list of requests, and with it what was sent.
func (s *faultServer) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests = nil
	s.sent.Store(0)
}

// BlobBytes returns how many bytes of each blob went to each client so far.
func (s *faultServer) BlobBytes() map[digest.Digest]map[string]int64 {
	sums := map[digest.Digest]map[string]int64{}
	for _, r := range s.Requests() {
		dgst, ok := r.Blob()
		if !ok || r.Method != http.MethodGet {
			continue
		}
		if sums[dgst] == nil {
			sums[dgst] = map[string]int64{}
		}
		sums[dgst][r.Client()] += r.Bytes()
	}
	return sums
}

// SentTo returns how many bytes of all blobs went to a client so far.
func (s *faultServer) SentTo(client string) int64 {
	var n int64
	for _, clients := range s.BlobBytes() {
		n += clients[client]
	}
	return n
}

// SentBlob returns how many bytes of a blob went to all clients so far.
func (s *faultServer) SentBlob(dgst digest.Digest) int64 {
	var n int64
	for _, bytes := range s.BlobBytes()[dgst] {
		n += bytes
	}
	return n
}
