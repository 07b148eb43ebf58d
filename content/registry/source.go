package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content/transfer"
)

const (
	// maxHops bounds a chain of redirects.
	maxHops = 5
	// maxPlaces bounds how many remembered places one request tries. Others renew
	// them meanwhile; where none lasts, the host is asked.
	maxPlaces = 5
	// maxLogins bounds how often one request is asked to prove who it is: a
	// stale token, and the race with another request's new one.
	maxLogins = 2
	// turnWait is how long a request waits for another one to find out where
	// the blob lies. A host that takes longer is asked by both.
	turnWait = 5 * time.Second
	// farewell bounds reading what a refusal or a redirect has to say.
	farewell = 2 * time.Second
)

// Source is one blob on one host. It is safe for concurrent use.
//
// The first request finds out whether the host sends the blob itself or points
// elsewhere, while others wait for it; the place is then remembered until it
// answers anything but the blob, and found out anew.
type Source struct {
	ep     *endpoint
	auth   *auth
	url    *url.URL
	digest digest.Digest
	size   int64
	accept string
	turn   chan struct{} // holds one token while somebody finds the place

	mu     sync.Mutex
	place  *place // where the host points to
	direct bool   // the host sends the blob itself
}

var _ transfer.Source = (*Source)(nil)

// manifestTypes are what a digest of an image may name.
var manifestTypes = strings.Join([]string{
	ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex,
	images.MediaTypeDockerSchema2Manifest, images.MediaTypeDockerSchema2ManifestList,
}, ", ")

// place is where a redirect led. Only on the host's own origin may
// Authorization and the headers of hosts.toml be sent.
type place struct {
	url *url.URL
	own bool
}

func newSource(ep *endpoint, a *auth, b blobKey) (*Source, error) {
	u := blobURL(ep, b)
	if _, err := url.Parse(u.String()); err != nil {
		return nil, fmt.Errorf("blob %s: address at %s: %w: %w", b.digest, ep.name, errdefs.ErrFailedPrecondition, err)
	}
	accept := "*/*"
	if b.manifest {
		accept = manifestTypes + ", */*" // some registries send only what is named
	}
	return &Source{ep: ep, auth: a, url: u, digest: b.digest, size: b.size, accept: accept, turn: make(chan struct{}, 1)}, nil
}

// Host names the host, and its path where that is not the usual one.
func (s *Source) Host() string { return s.ep.name }

// Tier is 0 for a mirror and 1 for the server that the mirrors stand for, which
// is wanted when they fail.
func (s *Source) Tier() int { return s.ep.tier }

// Open requests n bytes from off, the whole blob without a word of ranges. It is
// one request unless the host asks for a login or points elsewhere. ctx governs
// the body too, until it is closed. The body ends after Body.N bytes, or with an
// error: ErrUnavailable when the connection breaks, or brings nothing for the
// time of Options.StallTimeout. Part of a blob that is empty is given without a
// request. Errors name neither blob nor host: the transfer does, for all it tells.
func (s *Source) Open(ctx context.Context, off, n int64) (transfer.Body, error) {
	if s.size == 0 && off == 0 && n == 0 {
		return transfer.Body{ReadCloser: http.NoBody}, nil
	}
	if off < 0 || n <= 0 || off > s.size-n {
		return transfer.Body{}, fmt.Errorf("%d bytes from %d of %d: %w", n, off, s.size, errdefs.ErrInvalidArgument)
	}
	asked := span{off, n}
	r, err := s.request(ctx, asked)
	if err != nil {
		return transfer.Body{}, err
	}
	if r.resp.StatusCode > 299 {
		return transfer.Body{}, r.refused(statusError)
	}
	var got span
	err = r.from(func(resp *http.Response) (err error) {
		got, err = checkReply(resp, asked, s.size)
		return err
	})
	if err != nil {
		r.abandon()
		return transfer.Body{}, err
	}
	return transfer.Body{ReadCloser: newBody(r, got.n, s.ep.opts.StallTimeout), Off: got.off, N: got.n}, nil
}

// request goes to the remembered place, or asks the host for it.
func (s *Source) request(ctx context.Context, asked span) (*reply, error) {
	for range maxPlaces {
		p, release, err := s.route(ctx)
		if err != nil {
			return nil, err
		}
		if p == nil {
			defer release()
			return s.ask(ctx, asked)
		}
		r, err := s.send(ctx, p, asked)
		if err != nil {
			s.forget(p)
			return nil, err
		}
		switch code := r.resp.StatusCode; {
		case code == http.StatusTooManyRequests || code < 300:
			return r, nil
		case code >= 500:
			s.forget(p)
			return r, nil
		}
		// Expired, most likely: stores answer that with 403, 400 or 404.
		log.G(ctx).WithField("digest", s.digest).WithField("host", s.ep.name).
			Debugf("%s answers %s, asking for a new address", p.url.Host, clean(r.resp.Status))
		s.forget(p)
		r.dismiss()
	}
	return s.ask(ctx, asked)
}

// route returns the remembered place; or nil if the host is to be asked, and
// release is to be called once it has answered.
func (s *Source) route(ctx context.Context) (p *place, release func(), err error) {
	none := func() {}
	if p, known := s.known(); known {
		return p, none, nil
	}
	wait := time.NewTimer(turnWait)
	defer wait.Stop()
	select {
	case s.turn <- struct{}{}:
		release = func() { <-s.turn }
	case <-wait.C:
		release = none
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
	if p, known := s.known(); known {
		release()
		return p, none, nil
	}
	return nil, release, nil
}

func (s *Source) known() (*place, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.place, s.place != nil || s.direct
}

func (s *Source) remember(p *place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.place, s.direct = p, p == nil
}

func (s *Source) forget(p *place) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.place == p { // else another request has found a new one
		s.place, s.direct = nil, false
	}
}

// ask requests from the host itself, logs in if told to, goes where it points,
// and remembers where the blob was.
func (s *Source) ask(ctx context.Context, asked span) (*reply, error) {
	at := &place{url: s.url, own: true}
	logins := 0
	for hop := 0; ; {
		r, err := s.send(ctx, at, asked)
		if err != nil {
			return nil, err
		}
		switch {
		case at.own && logins < maxLogins && needsLogin(r.resp):
			err := s.auth.challenge(ctx, r.gen, r.resp)
			r.dismiss()
			if err != nil {
				return nil, err
			}
			logins++
		case isRedirect(r.resp):
			next, err := follow(r.resp, at)
			r.dismiss()
			if err != nil {
				return nil, err
			}
			if hop++; hop > maxHops {
				return nil, fmt.Errorf("more than %d redirects: %w", maxHops, errdefs.ErrFailedPrecondition)
			}
			at = next
		default:
			if r.resp.StatusCode < 300 {
				if hop == 0 {
					s.remember(nil)
				} else {
					s.remember(at)
				}
			}
			return r, nil
		}
	}
}

func isRedirect(resp *http.Response) bool {
	switch resp.StatusCode {
	case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		return true
	}
	return false
}

// follow reads where a redirect leads. Once away from the host's own origin,
// nothing leads back into its confidence; from https nothing leads to http.
func follow(resp *http.Response, at *place) (*place, error) {
	here := resp.Request.URL // not at.url: containerd's transport may have gone from https to http
	location := resp.Header.Get("Location")
	next, err := here.Parse(location)
	if err != nil || location == "" || next.Scheme != "http" && next.Scheme != "https" || next.Host == "" {
		return nil, fmt.Errorf("%d with a location that is no http or https address: %w", resp.StatusCode, errdefs.ErrFailedPrecondition)
	}
	if here.Scheme == "https" && next.Scheme == "http" {
		return nil, fmt.Errorf("redirect from https to plain http at %s, which is refused: %w", clean(next.Host), errdefs.ErrFailedPrecondition)
	}
	next.User, next.Fragment, next.RawFragment = nil, "", ""
	return &place{url: next, own: at.own && next.Host == here.Host && next.Scheme == here.Scheme}, nil
}

// send makes one HTTP request.
func (s *Source) send(ctx context.Context, to *place, asked span) (*reply, error) {
	rctx, cancel := context.WithCancelCause(ctx)
	r := &reply{cancel: cancel, cause: func() error { return context.Cause(rctx) }}
	if to.url.Host != s.ep.host {
		r.via = to.url.Host
	}
	req, err := http.NewRequestWithContext(withPolicy(rctx, s.ep.policy), http.MethodGet, to.url.String(), nil)
	if err != nil {
		cancel(nil)
		return nil, fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, withoutURL(err))
	}
	if to.own {
		req.Header = s.ep.header.Clone()
		if r.gen, err = s.auth.authorize(ctx, req); err != nil {
			cancel(nil)
			return nil, err
		}
	}
	if req.Header.Get("User-Agent") == "" {
		req.Header.Set("User-Agent", s.ep.opts.UserAgent)
	}
	req.Header.Set("Accept", s.accept)
	req.Header.Set("Accept-Encoding", "identity")
	if asked.n < s.size {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", asked.off, asked.off+asked.n-1))
	}
	if r.resp, err = s.ep.transport.RoundTrip(req); err != nil {
		cancel(nil)
		return nil, r.named(transportError(ctx, err))
	}
	return r, nil
}

// reply is a response and what it takes to be rid of it.
type reply struct {
	resp   *http.Response
	gen    int    // of the authorizer that was used
	via    string // the other host that sent it, empty if none
	cancel context.CancelCauseFunc
	cause  func() error // why the request's context ended
}

// named says in err which other host it is about.
func (r *reply) named(err error) error {
	if err == nil || r.via == "" {
		return err
	}
	return fmt.Errorf("redirected to %s: %w", clean(r.via), err)
}

func (r *reply) from(check func(*http.Response) error) error { return r.named(check(r.resp)) }

// abandon closes the connection unless the body was read to its end.
func (r *reply) abandon() {
	r.cancel(errClosed)
	_ = r.resp.Body.Close() // nothing was written, so nothing can be lost
}

// refused lets describe read from the body for a moment, and abandons it.
func (r *reply) refused(describe func(*http.Response) error) error {
	timer := time.AfterFunc(farewell, func() { r.cancel(errStalled) })
	defer timer.Stop()
	defer r.abandon()
	return r.from(describe)
}

// dismiss reads a short body away, so that the connection can be used again.
func (r *reply) dismiss() {
	_ = r.refused(func(resp *http.Response) error {
		_, err := io.CopyN(io.Discard, resp.Body, 4<<10)
		return err
	})
}

var (
	errClosed  = errors.New("reply closed")
	errStalled = errors.New("nothing was sent")
)
