package harness

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// Proxy stands before a registry on a port of its own. It counts what it sends
// and breaks what its [Rule] says. Real connections, so that a cut is a cut.
type Proxy struct {
	addr   string
	server *http.Server
	serve  chan error
	rule   atomic.Pointer[Rule]

	mu       sync.Mutex
	requests []*Request
}

// Rule looks at a request before it is passed on and says what is to go wrong; nil is nothing.
// It is called from many goroutines at once.
type Rule func(r *http.Request) *Fault

// Fault is what goes wrong with one request. Zero fields change nothing.
type Fault struct {
	Status         int           // answer this, without asking the registry
	Login          string        // ask for basic auth of "user:secret" and pass on what has it
	Latency        time.Duration // wait before anything else
	IgnoreRange    bool          // drop the Range header: the whole blob is sent with status 200
	BytesPerSecond int64         // send no faster
	CutAfter       int64         // break the connection after so many bytes of the body
	StallAfter     int64         // send nothing more after so many bytes, until the client goes
	Corrupt        func(p []byte, off int64)
	// ^ change bytes on their way; off is the position in the body, not in the blob
}

// Request is one request as it came by.
type Request struct {
	Method    string
	Path      string
	Range     string // the request's header, "" for the whole
	UserAgent string

	status atomic.Int64
	bytes  atomic.Int64
}

// Client returns the User-Agent up to its first slash.
func (r *Request) Client() string { return clientName(r.UserAgent) }

// Blob returns the digest of the blob that was asked for, if one was.
func (r *Request) Blob() (digest.Digest, bool) { return blobOf(r.Path) }

// Status returns the status of the reply, 0 before it.
func (r *Request) Status() int { return int(r.status.Load()) }

// Bytes returns how many bytes of the body were sent.
func (r *Request) Bytes() int64 { return r.bytes.Load() }

// StartProxy listens on a loopback port and passes everything on to host, an address of the form host:port.
func StartProxy(ctx context.Context, host string) (*Proxy, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	p := &Proxy{addr: l.Addr().String(), serve: make(chan error, 1)}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: host})
			r.Out.Host = r.In.Host // the registry makes absolute links of it: they must lead here
		},
		ModifyResponse: p.modify,
		FlushInterval:  -1,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			w.WriteHeader(http.StatusBadGateway)
		},
	}
	p.server = &http.Server{Handler: p.handler(forward), ReadHeaderTimeout: time.Minute}
	go func() { p.serve <- p.server.Serve(l) }()
	return p, nil
}

// Host returns the address, host:port, as it stands in image references.
func (p *Proxy) Host() string { return p.addr }

// SetRule replaces the rule; nil lets everything pass.
func (p *Proxy) SetRule(rule Rule) {
	if rule == nil {
		p.rule.Store(nil)
		return
	}
	p.rule.Store(&rule)
}

// Close ends all connections.
func (p *Proxy) Close() error {
	err := p.server.Close()
	if serveErr := <-p.serve; !errors.Is(serveErr, http.ErrServerClosed) {
		err = errors.Join(err, serveErr)
	}
	return err
}

// Requests returns every request so far, in the order of their coming.
func (p *Proxy) Requests() []*Request {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.requests)
}

// Forget empties the list of requests.
func (p *Proxy) Forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.requests = nil
}

// BlobBytes returns how many bytes of each blob went to each client so far.
func (p *Proxy) BlobBytes() map[digest.Digest]map[string]int64 {
	sums := map[digest.Digest]map[string]int64{}
	for _, r := range p.Requests() {
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
func (p *Proxy) SentTo(client string) int64 {
	var n int64
	for _, clients := range p.BlobBytes() {
		n += clients[client]
	}
	return n
}

// exchange travels in the request's context from handler to modify.
type exchange struct {
	record *Request
	fault  Fault
}

type exchangeKey struct{}

func (p *Proxy) handler(forward http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		x := &exchange{record: &Request{Method: r.Method, Path: r.URL.Path, Range: r.Header.Get("Range"), UserAgent: r.UserAgent()}}
		if rule := p.rule.Load(); rule != nil {
			if f := (*rule)(r); f != nil {
				x.fault = *f
			}
		}
		p.mu.Lock()
		p.requests = append(p.requests, x.record)
		p.mu.Unlock()
		if pause(r.Context(), x.fault.Latency) != nil {
			return
		}
		if status := x.fault.refuse(w, r); status != 0 {
			x.record.status.Store(int64(status))
			w.WriteHeader(status)
			return
		}
		if x.fault.IgnoreRange {
			r.Header.Del("Range")
		}
		forward.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x)))
	})
}

// refuse returns the status to answer instead of passing the request on, or 0.
func (f *Fault) refuse(w http.ResponseWriter, r *http.Request) int {
	if f.Login != "" {
		user, secret, _ := r.BasicAuth()
		if user+":"+secret != f.Login {
			w.Header().Set("WWW-Authenticate", `Basic realm="proxy"`)
			return http.StatusUnauthorized
		}
		r.Header.Del("Authorization") // meant for us; the registry has no login
	}
	return f.Status
}

func (p *Proxy) modify(resp *http.Response) error {
	x := resp.Request.Context().Value(exchangeKey{}).(*exchange)
	x.record.status.Store(int64(resp.StatusCode))
	resp.Body = &body{ReadCloser: resp.Body, ctx: resp.Request.Context(), exchange: x, start: time.Now()}
	return nil
}

// body is a reply's body with the fault built in.
type body struct {
	io.ReadCloser
	*exchange
	ctx   context.Context //nolint:containedctx // io.Reader has no other way to get the request's
	start time.Time
	sent  int64
}

var errCut = errors.New("cut by the proxy's rule")

func (b *body) Read(p []byte) (int, error) {
	limit := int64(len(p))
	if b.fault.BytesPerSecond > 0 {
		due := time.Duration(float64(b.sent) / float64(b.fault.BytesPerSecond) * float64(time.Second))
		if err := pause(b.ctx, due-time.Since(b.start)); err != nil {
			return 0, err
		}
		limit = min(limit, max(b.fault.BytesPerSecond/20, 1))
	}
	if b.fault.CutAfter > 0 {
		if limit = min(limit, b.fault.CutAfter-b.sent); limit == 0 {
			return 0, errCut
		}
	}
	if b.fault.StallAfter > 0 {
		if limit = min(limit, b.fault.StallAfter-b.sent); limit == 0 {
			<-b.ctx.Done()
			return 0, context.Cause(b.ctx)
		}
	}
	n, err := b.ReadCloser.Read(p[:limit])
	if b.fault.Corrupt != nil {
		b.fault.Corrupt(p[:n], b.sent)
	}
	b.sent += int64(n)
	b.record.bytes.Add(int64(n))
	return n, err
}

// pause waits for d or the end of ctx, whose cause it returns then.
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
