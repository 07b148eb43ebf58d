package client

import (
	"context"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"

	"github.com/gantryd/gantry/plugin/setup"
)

// told is an error in words for people. What it wraps says what kind it is.
type told struct {
	text string
	err  error
}

func (t *told) Error() string { return t.text }
func (t *told) Unwrap() error { return t.err }

// explain makes of a failed pull's error what a person can act on: the image once, nothing twice, and what to do
// where a login was refused. Lines are separate things to know.
func (p *Pull) explain(err error, layers []Layer) error {
	lines := []string{fmt.Sprintf("image %s: %s", p.named, plain(err, p.named.String()))}
	if about := p.aboutLayer(lines[0], layers); about != "" {
		lines = append(lines, about)
	}
	if about := p.aboutLogin(err); about != "" {
		lines = append(lines, about)
	} else if errdefs.IsNotFound(err) && !strings.Contains(lines[0], "sha256:") {
		lines = append(lines, fmt.Sprintf("%s has no such repository or tag, or hides it from who may not read it", reference.Domain(p.named)))
	}
	return &told{strings.Join(lines, "\n"), err}
}

// plain is the text of an error in one line, in which nothing stands twice. Those that come from containerd join the
// same error once for each of its layers of errors.
func plain(err error, ref string) string {
	var parts []string
	whole := ""
	for part := range strings.SplitSeq(err.Error(), "\n") {
		if part = strings.TrimSpace(part); part == "" || strings.Contains(whole, part) {
			continue
		}
		parts = append(parts, part)
		whole += part + "\n"
	}
	text := strings.Join(parts, "; ")
	return strings.ReplaceAll(strings.TrimPrefix(text, ref+": "), ": "+ref+": ", ": ")
}

// aboutLayer adds what gantryd knows of the layer that containerd could not get: the host, and what it said.
func (p *Pull) aboutLayer(text string, layers []Layer) string {
	for _, l := range layers {
		if l.Error != "" && strings.Contains(text, l.Digest.String()) && !strings.Contains(text, l.Error) {
			return "gantryd: " + strings.ReplaceAll(l.Error, "\n", "; ")
		}
	}
	return ""
}

// withoutGantryd says so where a pull failed for want of gantryd: of that containerd knows only a broken connection.
func (p *Pull) withoutGantryd(ctx context.Context, err error) error {
	running, _ := listens(ctx, p.config.Address)
	switch {
	case ctx.Err() != nil:
		return err
	case !running:
		return fmt.Errorf("gantryd has ended, nobody answers at %s any more (systemctl status gantryd): %w", p.config.Address, err)
	case strings.Contains(err.Error(), p.config.Address):
		return fmt.Errorf("containerd has not found gantryd again since it was away, pull again in some seconds: %w", err)
	}
	return err
}

// aboutLogin says which login a registry refused, and where it comes from.
func (p *Pull) aboutLogin(err error) string {
	if !refused(err) {
		return ""
	}
	host, path := reference.Domain(p.named), p.config.Registry.Credentials
	lookup, failure := setup.Credentials(p.config)
	if lookup == nil || failure != nil {
		return fmt.Sprintf("no login is known for %s: registry.credentials names no file", host)
	}
	switch user, secret, failure := lookup(host); {
	case failure != nil && strings.Contains(err.Error(), failure.Error()):
		return ""
	case failure != nil:
		return failure.Error()
	case user == "" && secret == "":
		return fmt.Sprintf("%s has no login for %s (docker login %s)", path, host, host)
	case user == "":
		return fmt.Sprintf("the token for %s in %s was refused (docker login %s)", host, path, host)
	default:
		return fmt.Sprintf("the login of %q for %s in %s was refused, or may not read this image (docker login %s)", user, host, path, host)
	}
}

// refused says whether a registry wants another login. containerd passes on only the text of its errors.
func refused(err error) bool {
	if errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) {
		return true
	}
	for _, text := range []string{"401 Unauthorized", "403 Forbidden", "authorization failed", "insufficient_scope"} {
		if strings.Contains(err.Error(), text) {
			return true
		}
	}
	return false
}

// noted returns the layers after a pull that failed: those that containerd could not get are named in its error.
func noted(layers []Layer, err error) []Layer {
	for i := range layers {
		l := &layers[i]
		if l.Phase.Ended() || !strings.Contains(err.Error(), l.Digest.String()) {
			continue
		}
		l.Phase, l.Rate = PhaseFailed, 0
		if l.Error == "" {
			l.Error = plain(err, "")
		}
	}
	return layers
}
