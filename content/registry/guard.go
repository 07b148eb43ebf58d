package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// policy says what a request made on behalf of an endpoint may do, wherever
// containerd's authorizer or a fallback to http may take it. It travels in the
// request's context.
type policy struct {
	host   string      // the endpoint's own host[:port]
	plain  bool        // http is allowed
	header http.Header // of hosts.toml: for the own host only
	token  bool        // a request to a token server

	after time.Duration // out: when the token server, which refused, wants to be asked again
}

// near says whether a token server is on the machine that may be asked over
// http, or on this one. Only there may a password go in the clear.
func (p *policy) near(token *url.URL) bool {
	own := url.URL{Host: p.host}
	return token.Hostname() == own.Hostname() || docker.IsLocalhost(token.Host)
}

// hasSecret says whether a request to a token server proves who asks.
func hasSecret(req *http.Request) bool {
	return req.Method != http.MethodGet || req.Header.Get("Authorization") != ""
}

type (
	policyKey struct{}
	askedKey  struct{}
)

func withPolicy(ctx context.Context, p *policy) context.Context {
	return context.WithValue(ctx, policyKey{}, p)
}

// asking notes the scheme that was asked for, above containerd's transport that
// goes from https to http where a port speaks no TLS.
type asking struct{ http.RoundTripper }

func (a asking) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx := context.WithValue(req.Context(), askedKey{}, req.URL.Scheme)
	return a.RoundTripper.RoundTrip(req.WithContext(ctx))
}

// errPlain refuses a request in the clear.
var errPlain = errors.New("plain http is refused: neither hosts.toml nor the rule for localhost allows it here")

// maxToken bounds a token server's reply, in bytes.
const maxToken = 1 << 20

// guard is the last to see a request before it goes out.
type guard struct{ *http.Transport }

func (g guard) RoundTrip(req *http.Request) (*http.Response, error) {
	p, _ := req.Context().Value(policyKey{}).(*policy)
	if p == nil {
		return nil, errors.New("request without a policy")
	}
	own := req.URL.Host == p.host
	if !own && len(p.header) > 0 {
		req = req.Clone(req.Context())
		removeValues(req.Header, p.header)
	}
	if req.URL.Scheme != "https" {
		// A fallback is for the endpoint itself, not for those it points to.
		fellBack := req.Context().Value(askedKey{}) == "https"
		if !p.plain || fellBack && !own || p.token && hasSecret(req) && !p.near(req.URL) {
			return nil, fmt.Errorf("%s: %w", req.URL.Host, errPlain)
		}
	}
	resp, err := g.Transport.RoundTrip(req)
	if err == nil && p.token {
		p.after = 0
		if resp.StatusCode > 299 {
			p.after = parseRetryAfter(resp.Header.Get("Retry-After"), time.Now())
		}
		resp.Body = struct {
			io.Reader
			io.Closer
		}{io.LimitReader(resp.Body, maxToken), resp.Body}
	}
	return resp, err
}

// removeValues takes the values of private out of header. A value that only
// has the same name, such as a Basic login meant for a token server, stays.
func removeValues(header, private http.Header) {
	for key, values := range private {
		left := slices.DeleteFunc(header[key], func(v string) bool { return slices.Contains(values, v) })
		if len(left) == 0 {
			delete(header, key)
		} else {
			header[key] = left
		}
	}
}
