package registry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/cli/cli/config/configfile"
	"github.com/docker/cli/cli/config/credentials"
)

const (
	// maxDockerConfig is far above any real config.json.
	maxDockerConfig = 1 << 20
	// helperTimeout bounds a credential helper. Some ask a cloud's metadata
	// service, none has a reason to take longer.
	helperTimeout = 10 * time.Second
	// helperRest is how long a helper that hung is not asked again: each layer
	// of an image would wait for it anew.
	helperRest = 30 * time.Second
	// tokenUser is the name under which helpers keep identity tokens.
	tokenUser = "<token>"
	// hubKey is how docker's tools call Docker Hub.
	hubKey = "https://index.docker.io/v1/"
)

// DockerCredentials returns an Options.Credentials that looks into docker's
// config.json at path: what `docker login` wrote there, or the credential
// helpers (credHelpers, credsStore) that it names, which are looked for in
// PATH. The file is read each time, so a login counts at once. A file that is
// missing knows nobody; one that cannot be read or understood is an error that
// names it, and a host's credentials are then unknown, not absent. An empty
// path is a nil function. No error holds a part of the file or of a helper's output.
func DockerCredentials(path string) (func(host string) (user, secret string, err error), error) {
	if path == "" {
		return nil, nil
	}
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("credentials in %s: not an absolute path: %w", path, errdefs.ErrInvalidArgument)
	}
	return newKeychain(path, helperTimeout).credentials, nil
}

// keychain answers from one config.json.
type keychain struct {
	path    string
	timeout time.Duration

	mu   sync.Mutex
	hung map[string]time.Time // by helper: not asked before
}

func newKeychain(path string, timeout time.Duration) *keychain {
	return &keychain{path: path, timeout: timeout, hung: map[string]time.Time{}}
}

func (k *keychain) credentials(host string) (user, secret string, err error) {
	file, err := readDockerConfig(k.path)
	if err != nil {
		return "", "", fmt.Errorf("credentials for %s: %s cannot be used, correct it: %w: %w", host, k.path, err, errdefs.ErrFailedPrecondition)
	}
	keys := keysFor(host)
	if helper := helperFor(file, keys); helper != "" {
		if user, secret, err = k.ask(helper, keys[0]); err != nil {
			return "", "", fmt.Errorf("credentials for %s: %s: %w", host, k.path, err)
		}
		return user, secret, nil
	}
	entry, ok := entryFor(file, keys)
	switch {
	case !ok:
		return "", "", nil
	case entry.IdentityToken != "":
		return "", entry.IdentityToken, nil
	case entry.Password == "" && entry.RegistryToken != "":
		return "", "", fmt.Errorf("credentials for %s: %s has only a registrytoken, which is not supported: %w", host, k.path, errdefs.ErrNotImplemented)
	}
	return entry.Username, entry.Password, nil
}

// readDockerConfig returns an empty configuration for a file that is missing.
// Its errors quote nothing of the file.
func readDockerConfig(path string) (*configfile.ConfigFile, error) {
	file := configfile.New(path)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return file, nil
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("not a regular file")
	case info.Size() > maxDockerConfig:
		return nil, fmt.Errorf("%d bytes long", info.Size())
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return nil, err
	}
	return file, parseDockerConfig(file, data)
}

func parseDockerConfig(file *configfile.ConfigFile, data []byte) error {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil
	}
	// docker's package stops after the first value.
	var whole json.RawMessage
	err := json.Unmarshal(data, &whole)
	if err == nil {
		err = file.LoadFromReader(bytes.NewReader(data))
	}
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &syntax):
		return fmt.Errorf("no JSON from byte %d on", syntax.Offset)
	case errors.As(err, &kind):
		return fmt.Errorf("the value before byte %d is not of type %s", kind.Offset, kind.Type)
	}
	return errors.New("an auth in it is not base64 of user:password")
}

// keysFor returns the names that a host may have in a config.json, the one that
// docker writes first.
func keysFor(host string) []string {
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		return []string{hubKey, "index.docker.io", "docker.io", "registry-1.docker.io"}
	}
	return []string{host}
}

func helperFor(file *configfile.ConfigFile, keys []string) string {
	for _, key := range keys {
		if helper, ok := file.CredentialHelpers[key]; ok {
			return helper // an empty one turns off credsStore for this host
		}
	}
	return file.CredentialsStore
}

type dockerAuth = struct{ Username, Password, IdentityToken, RegistryToken string }

// entryFor finds what `docker login` wrote. Old files have keys with a scheme and a path.
func entryFor(file *configfile.ConfigFile, keys []string) (dockerAuth, bool) {
	entry := func(key string) dockerAuth {
		e := file.AuthConfigs[key]
		return dockerAuth{e.Username, e.Password, e.IdentityToken, e.RegistryToken}
	}
	for _, key := range keys {
		if _, ok := file.AuthConfigs[key]; ok {
			return entry(key), true
		}
	}
	for _, key := range slices.Sorted(maps.Keys(file.AuthConfigs)) {
		if slices.Contains(keys, credentials.ConvertToHostname(key)) {
			return entry(key), true
		}
	}
	return dockerAuth{}, false
}

// ask runs a credential helper, unless it hung a moment ago.
func (k *keychain) ask(suffix, server string) (user, secret string, err error) {
	name := "docker-credential-" + suffix
	if strings.ContainsAny(suffix, `/\`) {
		return "", "", fmt.Errorf("credential helper %.100q: not the name of a program in PATH: %w", name, errdefs.ErrFailedPrecondition)
	}
	k.mu.Lock()
	until, ok := k.hung[name]
	k.mu.Unlock()
	if ok && time.Now().Before(until) {
		return "", "", hungError(name, k.timeout)
	}
	user, secret, err = runHelper(name, server, k.timeout)
	k.mu.Lock()
	defer k.mu.Unlock()
	if errors.Is(err, errHung) {
		k.hung[name] = time.Now().Add(helperRest)
		return "", "", hungError(name, k.timeout)
	}
	delete(k.hung, name)
	if user == tokenUser {
		user = ""
	}
	return user, secret, err
}

func hungError(name string, after time.Duration) error {
	return fmt.Errorf("credential helper %s gave no answer within %s: %w", name, after, errHung)
}
