package integration

import (
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// TestLogin pulls from a registry that lets nobody in without a login, which
// gantry finds in docker's config.json or gets from a credential helper: no
// byte of a layer goes to containerd.
func TestLogin(t *testing.T) {
	user, secret, _ := strings.Cut(login, ":")
	helpers := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\necho '{\"Username\": %q, \"Secret\": %q}'\n", user, secret)
	if err := os.WriteFile(filepath.Join(helpers, "docker-credential-gantrytest"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", helpers+":"+os.Getenv("PATH"))
	for name, config := range map[string]string{
		"config.json": `{"auths": {%q: {"auth": "` + base64.StdEncoding.EncodeToString([]byte(login)) + `"}}}`,
		"helper":      `{"credHelpers": {%q: "gantrytest"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			r := newRegistry(t)
			p := newProxy(t, r)
			n := newNode(t, harness.Options{})
			if err := n.AddRegistry("http", p.Host()); err != nil {
				t.Fatal(err)
			}
			im, ref := push(t, r, p.Host(), "login", small(31, 8<<20))
			p.SetRule(func(*http.Request) *harness.Fault { return &harness.Fault{Login: login} })
			// The daemon runs already: a login counts from the next pull on.
			if err := os.WriteFile(filepath.Join(n.Dir, "docker.json"), fmt.Appendf(nil, config, p.Host()), 0o600); err != nil {
				t.Fatal(err)
			}
			mustPull(t, n, "default", ref, "--user", login)
			checkImage(t, n, "default", ref)
			fetcher, other := harness.Gantry, "containerd"
			if snapshotter != harness.Gantry {
				fetcher, other = other, fetcher
			}
			for i, l := range im.Layers {
				if got := p.BlobBytes()[l.Digest]; got[fetcher] != l.Size || got[other] != 0 {
					t.Errorf("layer %d (%d bytes) was sent as %v, want all of it to %s", i, l.Size, got, fetcher)
				}
			}
		})
	}
}
