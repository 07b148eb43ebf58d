package harness

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/url"
)

// Proxy stands before a registry on a port of its own. It counts what it sends
// and breaks what its [Rule] says. Real connections, so that a cut is a cut.
type Proxy struct {
	faultServer
	addr string
}

// StartProxy listens on a loopback port and passes everything on to host, an address of the form host:port.
func StartProxy(ctx context.Context, host string) (*Proxy, error) {
	p := &Proxy{}
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(&url.URL{Scheme: "http", Host: host})
			r.Out.Host = r.In.Host // the registry makes absolute links of it: they must lead here
		},
		ModifyResponse: modify,
		FlushInterval:  -1,
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, _ error) {
			w.WriteHeader(http.StatusBadGateway)
		},
	}
	var err error
	p.addr, err = p.listen(ctx, func(w http.ResponseWriter, r *http.Request, x *exchange) {
		if x.fault.IgnoreRange {
			r.Header.Del("Range")
		}
		forward.ServeHTTP(w, r)
	})
	return p, err
}

// Host returns the address, host:port, as it stands in image references.
func (p *Proxy) Host() string { return p.addr }

func modify(resp *http.Response) error {
	ctx := resp.Request.Context()
	x := ctx.Value(exchangeKey{}).(*exchange)
	x.record.status.Store(int64(resp.StatusCode))
	b := &body{ReadCloser: resp.Body, exchange: x, ctx: ctx}
	// A reply without the header is the whole blob, or none.
	_, _ = fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-", &b.start)
	resp.Body = b
	return nil
}

// body is a reply's body with the fault built in.
type body struct {
	io.ReadCloser
	*exchange
	ctx   context.Context //nolint:containedctx // io.Reader has no other way to get the request's
	start int64           // in the blob
}

func (b *body) Read(p []byte) (int, error) {
	room, err := b.room(b.ctx, int64(len(p)))
	if err != nil {
		return 0, err
	}
	n, err := b.ReadCloser.Read(p[:room])
	if b.fault.Corrupt != nil {
		b.fault.Corrupt(p[:n], b.start+b.sent)
	}
	if paced := b.went(b.ctx, int64(n)); paced != nil {
		return n, paced
	}
	return n, err
}
