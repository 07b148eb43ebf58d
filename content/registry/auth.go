package registry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// auth holds containerd's authorizer for one repository on one endpoint, and
// keeps it from what it does not stand when it lives for long: it keeps a
// failed or cancelled token request as the answer for ever, and waits for
// another caller's request without minding the context. So calls go through it
// one at a time, and it is replaced whenever it fails or its token is refused.
type auth struct {
	ep         *endpoint
	repository string
	turn       chan struct{} // holds one token while cur and gen are in use
	cur        docker.Authorizer
	gen        int // counts the authorizers
}

func newAuth(ep *endpoint, repository string) *auth {
	a := &auth{ep: ep, repository: repository, turn: make(chan struct{}, 1)}
	a.renew(nil)
	return a
}

// lookup is what Options.Credentials is, too.
type lookup = func(host string) (user, secret string, err error)

// renew is called with the turn held, or before anybody else knows a. creds is
// asked while the authorizer learns from a 401.
func (a *auth) renew(creds lookup) {
	ep := a.ep
	client := &http.Client{Transport: ep.transport, CheckRedirect: keepHost}
	header := ep.header.Clone()
	if header.Get("User-Agent") == "" {
		header.Set("User-Agent", ep.opts.UserAgent)
	}
	options := []docker.AuthorizerOpt{docker.WithAuthClient(client), docker.WithAuthHeader(header)}
	if creds != nil {
		options = append(options, docker.WithAuthCreds(creds))
	}
	a.cur = docker.NewDockerAuthorizer(options...)
	a.gen++
}

// credentials asks Options.Credentials, but no longer than ctx lasts: a helper
// that somebody else waits for may be run.
func (a *auth) credentials(ctx context.Context) lookup {
	ask := a.ep.opts.Credentials
	if ask == nil {
		return nil
	}
	type answer struct {
		user, secret string
		err          error
	}
	return func(host string) (string, string, error) {
		answers := make(chan answer, 1)
		go func() {
			user, secret, err := ask(host)
			answers <- answer{user, secret, err}
		}()
		select {
		case found := <-answers:
			if found.err != nil {
				return "", "", &credentialsError{found.err}
			}
			return found.user, found.secret, nil
		case <-ctx.Done():
			return "", "", context.Cause(ctx)
		}
	}
}

// credentialsError says that nobody knows whether there are credentials. It
// hides what it wraps from those who look for a failure of the network.
type credentialsError struct{ error }

var errElsewhere = errors.New("the token server redirects to another host, which is refused")

// keepHost follows redirects of a token server within its host only: Go sends
// the form with the password along.
func keepHost(req *http.Request, via []*http.Request) error {
	from := via[len(via)-1].URL
	if len(via) > maxHops || req.URL.Hostname() != from.Hostname() || req.URL.Port() != from.Port() || req.URL.Scheme != from.Scheme {
		return errElsewhere
	}
	return nil
}

func (a *auth) lock(ctx context.Context) error {
	select {
	case a.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (a *auth) unlock() { <-a.turn }

// tokenContext is for what the authorizer may request, one at a time.
func (a *auth) tokenContext(ctx context.Context) (context.Context, *policy, context.CancelFunc) {
	p := *a.ep.policy
	p.token = true
	ctx = docker.ContextWithAppendPullRepositoryScope(withPolicy(ctx, &p), a.repository)
	ctx, cancel := context.WithTimeout(ctx, a.ep.opts.TokenTimeout)
	return ctx, &p, cancel
}

// authorize adds to req what the host has asked for so far, which may take a
// request to a token server. gen is for challenge.
func (a *auth) authorize(ctx context.Context, req *http.Request) (gen int, err error) {
	if err := a.lock(ctx); err != nil {
		return 0, err
	}
	defer a.unlock()
	tctx, p, cancel := a.tokenContext(ctx)
	defer cancel()
	gen = a.gen
	if err := a.cur.Authorize(tctx, req); err != nil {
		a.renew(nil)
		return gen, a.explain(ctx, p, err)
	}
	return gen, nil
}

// challenge learns from a 401 how the host wants to be asked. gen is what the
// refused request's authorize returned: of many refused at once, the first
// renews for all.
func (a *auth) challenge(ctx context.Context, gen int, resp *http.Response) error {
	if err := a.lock(ctx); err != nil {
		return err
	}
	defer a.unlock()
	if a.gen != gen {
		return nil
	}
	tctx, p, cancel := a.tokenContext(ctx)
	defer cancel()
	a.renew(a.credentials(tctx))
	if err := a.cur.AddResponses(tctx, []*http.Response{resp}); err != nil {
		return a.explain(ctx, p, err)
	}
	return nil
}

// explain classifies an error of the authorizer. A token server's status says
// as much as the registry's would; everything else that is no failure of the
// network means that nobody was let in.
func (a *auth) explain(ctx context.Context, p *policy, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var status remoteerrors.ErrUnexpectedStatus
	var creds *credentialsError
	switch {
	case errors.As(err, &creds):
		return fmt.Errorf("%w: %s", errdefs.ErrUnauthenticated, clean(creds.Error()))
	case errors.As(err, &status):
		kind := kindOfStatus(status.StatusCode)
		if status.StatusCode != http.StatusForbidden && !errors.Is(kind, errdefs.ErrUnavailable) {
			kind = errdefs.ErrUnauthenticated
		}
		err := fmt.Errorf("token server answers %s%s: %w", clean(status.Status), detail(status.Body), kind)
		if p.after > 0 && errors.Is(kind, errdefs.ErrUnavailable) {
			return &retryError{err, p.after}
		}
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("no token within %s: %w", a.ep.opts.TokenTimeout, errdefs.ErrUnavailable)
	}
	if kind := kindOfTransport(err); kind != nil {
		return fmt.Errorf("token server: %w: %w", kind, quiet{withoutURL(err)})
	}
	if errdefs.IsNotImplemented(err) {
		return fmt.Errorf("a login is needed, which gantry does not have: %w", errdefs.ErrUnauthenticated)
	}
	return fmt.Errorf("%w: %s", errdefs.ErrUnauthenticated, clean(withoutURL(err).Error()))
}

// needsLogin says whether a 401 can be answered at all.
func needsLogin(resp *http.Response) bool {
	return resp.StatusCode == http.StatusUnauthorized &&
		strings.TrimSpace(resp.Header.Get("WWW-Authenticate")) != ""
}
