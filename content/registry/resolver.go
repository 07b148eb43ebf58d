package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
)

// Resolver finds out what a reference means and fetches manifests, through the
// hosts, connections, credentials and tokens that Sources uses. It is
// containerd's own resolver, for pulls alone.
func (r *Registry) Resolver() remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Hosts:   r.registryHosts,
		Headers: http.Header{"User-Agent": {r.opts.UserAgent}},
	})
}

// registryHosts is a docker.RegistryHosts, which knows no context. It reads
// files and connects to nothing.
func (r *Registry) registryHosts(host string) ([]docker.RegistryHost, error) {
	if !isHost(host) {
		return nil, fmt.Errorf("registry host %.100q is not a valid name: %w", host, errdefs.ErrInvalidArgument)
	}
	set, err := r.hostSet(context.Background(), host)
	if err != nil {
		return nil, err
	}
	var hosts []docker.RegistryHost
	for _, ep := range set.endpoints {
		hosts = append(hosts, docker.RegistryHost{
			Client:       &http.Client{Transport: following{ep}},
			Authorizer:   scoped{ep},
			Host:         ep.host,
			Scheme:       ep.scheme,
			Path:         ep.path,
			Capabilities: ep.capabilities & (docker.HostCapabilityPull | docker.HostCapabilityResolve),
		})
	}
	return hosts, nil
}

// scoped finds the tokens for a request of containerd's resolver: its context
// says which repository it is about.
type scoped struct{ ep *endpoint }

var _ docker.Authorizer = scoped{}

// genKey is for the generation of the authorizer that a request was made with.
type genKey struct{}

// Authorize implements docker.Authorizer.
func (s scoped) Authorize(ctx context.Context, req *http.Request) error {
	if req.URL.Host != s.ep.host {
		return nil
	}
	gen, err := s.auth(ctx).authorize(ctx, req)
	*req = *req.WithContext(context.WithValue(ctx, genKey{}, gen))
	return err
}

// AddResponses implements docker.Authorizer.
func (s scoped) AddResponses(ctx context.Context, responses []*http.Response) error {
	last := responses[len(responses)-1]
	refused := 0
	for _, r := range responses {
		if r.StatusCode == http.StatusUnauthorized {
			refused++
		}
	}
	switch {
	case last.Request.URL.Host != s.ep.host:
		return errdefs.ErrNotImplemented // it is another host's, and stands
	case refused > maxLogins || !needsLogin(last):
		return fmt.Errorf("host %s answers %s: %w", s.ep.name, clean(last.Status), errdefs.ErrUnauthenticated)
	}
	gen, _ := last.Request.Context().Value(genKey{}).(int)
	return s.auth(ctx).challenge(ctx, gen, last)
}

func (s scoped) auth(ctx context.Context) *auth {
	for _, scope := range docker.GetTokenScopes(ctx, nil) {
		if repository, ok := strings.CutSuffix(strings.TrimPrefix(scope, "repository:"), ":pull"); ok {
			return s.ep.authFor(repository)
		}
	}
	return s.ep.authFor("")
}

// following makes the requests of containerd's resolver as send makes those for
// blobs. It follows redirects itself, so that neither the address that one
// leads to nor a header of hosts.toml gets into containerd's errors and logs.
type following struct{ ep *endpoint }

// RoundTrip implements http.RoundTripper.
func (f following) RoundTrip(req *http.Request) (*http.Response, error) {
	at := &place{url: req.URL, own: true}
	for range maxHops + 1 {
		r, err := f.send(req, at)
		if err != nil {
			return nil, err
		}
		if !isRedirect(r.resp) {
			r.resp.Body = newWatched(r, f.ep.opts.StallTimeout)
			return r.resp, nil
		}
		at, err = follow(r.resp, at)
		r.dismiss()
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("more than %d redirects: %w", maxHops, errdefs.ErrFailedPrecondition)
}

func (f following) send(req *http.Request, at *place) (*reply, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	r := &reply{cancel: cancel, cause: func() error { return context.Cause(ctx) }}
	if at.url.Host != f.ep.host {
		r.via = at.url.Host
	}
	out := req.Clone(withPolicy(ctx, f.ep.policy))
	out.URL, out.Host = at.url, ""
	if at.own {
		addHeader(out.Header, f.ep.header)
	} else {
		out.Header.Del("Authorization")
	}
	var err error
	if r.resp, err = f.ep.transport.RoundTrip(out); err != nil {
		cancel(nil)
		return nil, r.named(transportError(req.Context(), err))
	}
	return r, nil
}

// addHeader adds the header of hosts.toml, whose user agent goes before
// gantry's, and whose login does not go before a token.
func addHeader(header, private http.Header) {
	for key, values := range private {
		if _, ok := header[key]; !ok || key == "User-Agent" {
			header[key] = values
		}
	}
}

// watched is a body that ends with an error when nothing comes for a while.
type watched struct {
	r     *reply
	body  io.ReadCloser
	stall time.Duration
	timer *time.Timer
}

func newWatched(r *reply, stall time.Duration) *watched {
	w := &watched{r: r, body: r.resp.Body, stall: stall}
	w.timer = time.AfterFunc(stall, func() { r.cancel(errStalled) })
	w.timer.Stop()
	return w
}

func (w *watched) Read(p []byte) (int, error) {
	w.timer.Reset(w.stall)
	defer w.timer.Stop()
	n, err := w.body.Read(p)
	if err != nil && errors.Is(w.r.cause(), errStalled) {
		err = w.r.named(fmt.Errorf("no byte for %s: %w", w.stall, errdefs.ErrUnavailable))
	}
	return n, err
}

func (w *watched) Close() error {
	w.timer.Stop()
	w.r.cancel(errClosed)
	return w.body.Close()
}
