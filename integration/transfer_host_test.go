package integration

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// asked is how many bytes a request's Range header names.
func asked(r *harness.Request) int64 {
	var first, last int64
	if n, _ := fmt.Sscanf(r.Range, "bytes=%d-%d", &first, &last); n != 2 {
		return 0
	}
	return last - first + 1
}

// TestRetryAfter wants a host that asks for three seconds to be left alone for as long, by all transfers.
func TestRetryAfter(t *testing.T) {
	const wanted = 3 * time.Second
	im := random(t, 20, 60, 60)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	var seen atomic.Int64
	f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault {
		if seen.Add(1) == 4 {
			return &harness.Fault{Status: http.StatusTooManyRequests, RetryAfter: wanted}
		}
		return nil
	}))
	mustPull(t, n, "default", ref)
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	requests := f.Requests()
	i := slices.IndexFunc(requests, func(r *harness.Request) bool { return r.Status() == http.StatusTooManyRequests })
	if i < 0 {
		t.Fatal("nothing was answered 429")
	}
	pause := requests[i].Ended()
	after := 0
	for _, r := range requests {
		// What was under way when the answer came is not to blame.
		since := r.Time.Sub(pause)
		if r.Client() == harness.Gantry && since > 250*time.Millisecond && since < wanted-100*time.Millisecond {
			t.Errorf("a request for %s of %s came %s after Retry-After: 3", r.Range, r.Path, since)
		}
		if since >= wanted-100*time.Millisecond {
			after++
		}
	}
	if after == 0 {
		t.Error("no request came after the pause: it was not in the middle of the pull")
	}
	checkSent(t, f, im, 1.02)
}

// knowsLogin writes the config.json of docker's that the node's gantryd reads.
func knowsLogin(t *testing.T, n *harness.Node, host, login string) {
	t.Helper()
	config := fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, host, base64.StdEncoding.EncodeToString([]byte(login)))
	if err := os.WriteFile(filepath.Join(n.Dir, "docker.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
}

// smallChunks makes many requests of a blob, so that what is to expire expires between two of them.
const smallChunks = "[transfer]\nchunk_size = '1MiB'\n"

// TestLogins pulls from registries that want a login, of which gantry learns from docker's config.json. Tokens expire
// during the pull.
func TestLogins(t *testing.T) {
	for name, o := range map[string]harness.FaultOptions{
		"basic":             {Basic: login},
		"bearer":            {Basic: login, Bearer: true, TokenLife: time.Second, Total: 20_000_000},
		"bearer, anonymous": {Bearer: true, TokenLife: time.Second, Total: 20_000_000},
	} {
		t.Run(name, func(t *testing.T) {
			im := random(t, 21, 40, 20)
			f, n, ref := faulty(t, im, o, harness.Options{GantryExtra: smallChunks})
			knowsLogin(t, n, f.Host(), login)
			mustPull(t, n, "default", ref, "--user", login)
			checkWhole(t, n, "default", ref, im)
			checkFetcher(t, f, im)
			checkSent(t, f, im, 1.02)
			if f.TokenHost() == "" {
				return
			}
			tokens := 0
			for _, r := range f.Requests() {
				if r.Host == f.TokenHost() && r.Client() == harness.Gantry && r.Status() == http.StatusOK {
					tokens++
				}
			}
			t.Logf("%d tokens", tokens)
			if tokens < 2 || tokens > 20 {
				t.Errorf("gantry got %d tokens, want one for each second", tokens)
			}
		})
	}
}

// TestExpiringRedirects pulls from a registry that keeps blobs elsewhere: the link is asked for once and used until
// it expires, and the storage never sees the login.
func TestExpiringRedirects(t *testing.T) {
	const life = time.Second
	im := random(t, 22, 40, 20)
	f, n, ref := faulty(t, im, harness.FaultOptions{Basic: login, Redirect: true, SignatureLife: life, Total: 20_000_000}, harness.Options{GantryExtra: smallChunks})
	knowsLogin(t, n, f.Host(), login)
	mustPull(t, n, "default", ref, "--user", login)
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	for i, l := range im.Layers {
		var stored int64
		var links []time.Time
		expired := 0
		for _, r := range requestsOf(f.Requests(), l.Digest) {
			switch {
			case r.Host == f.StorageHost() && r.Login:
				t.Error("the storage was sent an Authorization header")
			case r.Host == f.StorageHost():
				stored += r.Bytes()
				if r.Status() == http.StatusForbidden {
					expired++
				}
			case r.Status() == http.StatusTemporaryRedirect:
				links = append(links, r.Time)
			case r.Bytes() > 0:
				t.Errorf("%d bytes came from the registry itself", r.Bytes())
			}
		}
		t.Logf("layer %d: %d links, %d requests after their end", i, len(links), expired)
		if stored != l.Size {
			t.Errorf("layer %d: the storage sent %d bytes, want %d", i, stored, l.Size)
		}
		for k := 1; k < len(links); k++ {
			if apart := links[k].Sub(links[k-1]); apart < life {
				t.Errorf("layer %d: a link was asked for %s after the one before, which was good for %s", i, apart, life)
			}
		}
		if expired == 0 {
			t.Errorf("layer %d: no link expired", i)
		}
	}
	checkSent(t, f, im, 1.02)
}
