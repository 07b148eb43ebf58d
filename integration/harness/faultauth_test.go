package harness

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"testing"
	"time"
)

func basic(login string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(login)) }

func TestBasic(t *testing.T) {
	f, im, layer := served(t, FaultOptions{Basic: "me:secret"})
	for _, header := range [][]string{nil, {"Authorization", basic("me:other")}} {
		g := fetch(t.Context(), t, http.MethodGet, f.layerURL(im), header...)
		wantStatus(t, g, 401)
		if got := g.Header.Get("WWW-Authenticate"); !strings.HasPrefix(got, "Basic ") {
			t.Errorf("the challenge is %q", got)
		}
	}
	g := fetch(t.Context(), t, http.MethodGet, f.layerURL(im), "Authorization", basic("me:secret"))
	if wantStatus(t, g, 200); !bytes.Equal(g.body, layer) {
		t.Error("wrong bytes")
	}
}

var challenge = regexp.MustCompile(`^Bearer realm="(http://.+)",service="(.+)",scope="(.+)"$`)

// token asks where the challenge of a refused request says.
func token(t *testing.T, refused got, login string) got {
	t.Helper()
	wantStatus(t, refused, 401)
	m := challenge.FindStringSubmatch(refused.Header.Get("WWW-Authenticate"))
	if m == nil {
		t.Fatalf("the challenge is %q", refused.Header.Get("WWW-Authenticate"))
	}
	return fetch(t.Context(), t, http.MethodGet, m[1]+"?"+url.Values{"service": {m[2]}, "scope": {m[3]}}.Encode(), "Authorization", basic(login))
}

func TestBearer(t *testing.T) {
	const life = 100 * time.Millisecond
	f, im, layer := served(t, FaultOptions{Basic: "me:secret", Bearer: true, TokenLife: life})
	refused := fetch(t.Context(), t, http.MethodGet, f.layerURL(im))
	wantStatus(t, token(t, refused, "me:other"), 401)
	begin := time.Now()
	reply := token(t, refused, "me:secret")
	wantStatus(t, reply, 200)
	if reply.Request.URL.Host != f.TokenHost() || f.TokenHost() == f.Host() {
		t.Errorf("the token is from %s", reply.Request.URL.Host)
	}
	var given struct{ Token string }
	if err := json.Unmarshal(reply.body, &given); err != nil {
		t.Fatal(err)
	}
	header := []string{"Authorization", "Bearer " + given.Token}
	if g := fetch(t.Context(), t, http.MethodGet, f.layerURL(im), header...); time.Since(begin) < life && (g.StatusCode != 200 || !bytes.Equal(g.body, layer)) {
		t.Errorf("with a fresh token: %s", g.Status)
	}
	other := strings.Replace(f.layerURL(im), "some/image", "other/image", 1)
	wantStatus(t, fetch(t.Context(), t, http.MethodGet, other, header...), 401)
	time.Sleep(time.Until(begin.Add(2 * life)))
	wantStatus(t, fetch(t.Context(), t, http.MethodGet, f.layerURL(im), header...), 401)
}

func TestRedirect(t *testing.T) {
	const life = 100 * time.Millisecond
	f, im, layer := served(t, FaultOptions{Redirect: true, SignatureLife: life})
	begin := time.Now()
	first := fetch(t.Context(), t, http.MethodGet, f.layerURL(im), "Range", "bytes=5-9")
	wantStatus(t, first, 307)
	link, err := first.Location()
	if err != nil || link.Host != f.StorageHost() || link.Host == f.Host() {
		t.Fatalf("leads to %s (%v)", link, err)
	}
	g := fetch(t.Context(), t, http.MethodGet, link.String(), "Range", "bytes=5-9", "Authorization", "Bearer x")
	if time.Since(begin) < life && (g.StatusCode != 206 || !bytes.Equal(g.body, layer[5:10])) {
		t.Errorf("the link gives %s and %q", g.Status, g.body)
	}
	last := f.Requests()[1]
	if dgst, ok := last.Blob(); !ok || dgst != im.Layers[0].Digest || last.Host != f.StorageHost() || !last.Login || f.Requests()[0].Login {
		t.Errorf("recorded: %+v", last)
	}
	wantStatus(t, fetch(t.Context(), t, http.MethodGet, strings.Replace(link.String(), "signature=", "signature=0", 1)), 403)
	time.Sleep(time.Until(begin.Add(2 * life)))
	wantStatus(t, fetch(t.Context(), t, http.MethodGet, link.String()), 403)
	wantStatus(t, fetch(t.Context(), t, http.MethodGet, strings.Replace(link.String(), "expires=", "expires=9", 1)), 403)
	if manifest := fetch(t.Context(), t, http.MethodGet, "http://"+f.Host()+"/v2/some/image/manifests/v1"); manifest.StatusCode != 200 {
		t.Errorf("the manifest: %s", manifest.Status)
	}
}
