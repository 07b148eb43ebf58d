package harness

import (
	"cmp"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"
)

// hasLogin says whether the request proves by basic auth to be from "user:secret".
func hasLogin(r *http.Request, login string) bool {
	user, secret, ok := r.BasicAuth()
	return ok && user+":"+secret == login
}

func askLogin(w http.ResponseWriter) { w.Header().Set("WWW-Authenticate", `Basic realm="faults"`) }

// admit says whether the request may see the repository, and if not puts into the header how to prove it.
func (f *FaultRegistry) admit(w http.ResponseWriter, r *http.Request, repository string) bool {
	if f.tokens != nil {
		return f.tokens.admit(w, r, repository)
	}
	if f.options.Basic == "" || hasLogin(r, f.options.Basic) {
		return true
	}
	askLogin(w)
	return false
}

// tokenServer gives out tokens on a port of its own, as registries in the field do.
type tokenServer struct {
	addr  string
	login string // "" for everybody
	life  time.Duration

	mu     sync.Mutex
	tokens map[string]grant
}

type grant struct {
	scopes []string
	until  time.Time
}

func newTokenServer(o FaultOptions) *tokenServer {
	return &tokenServer{login: o.Basic, life: cmp.Or(o.TokenLife, time.Minute), tokens: map[string]grant{}}
}

// answer gives a token for the scopes asked for. Only the GET of the distribution specification: a POST, as OAuth has
// it, gets the 405 of a server that does not know it.
func (s *tokenServer) answer(w http.ResponseWriter, r *http.Request, x *exchange) {
	if r.Method != http.MethodGet {
		x.answer(w, http.StatusMethodNotAllowed)
		return
	}
	if s.login != "" && !hasLogin(r, s.login) {
		askLogin(w)
		x.answer(w, http.StatusUnauthorized)
		return
	}
	token, now := rand.Text(), time.Now()
	s.mu.Lock()
	s.tokens[token] = grant{r.URL.Query()["scope"], now.Add(s.life)}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	x.answer(w, http.StatusOK)
	_ = json.NewEncoder(w).Encode(map[string]any{ // who does not read it asks again
		"token": token, "expires_in": int(s.life / time.Second), "issued_at": now.UTC().Format(time.RFC3339),
	})
}

// admit wants a token that has not expired and is for the repository.
func (s *tokenServer) admit(w http.ResponseWriter, r *http.Request, repository string) bool {
	scope := "repository:" + repository + ":pull"
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	g := s.tokens[token]
	s.mu.Unlock()
	if time.Now().Before(g.until) {
		for _, granted := range g.scopes {
			// containerd puts several scopes into one parameter.
			if repository == "" || strings.Contains(" "+granted+" ", " "+scope+" ") {
				return true
			}
		}
	}
	challenge := fmt.Sprintf(`Bearer realm="http://%s/token",service="faults"`, s.addr)
	if repository != "" {
		challenge += fmt.Sprintf(`,scope=%q`, scope)
	}
	w.Header().Set("WWW-Authenticate", challenge)
	return false
}
