package registry

import (
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	toml "github.com/pelletier/go-toml/v2"
)

// maxHostsFile is far above any real hosts.toml.
const maxHostsFile = 1 << 20

// hostsFile mirrors what containerd reads from a hosts.toml. It is parsed here
// only to be checked: containerd answers a mistake in the file by logging it
// and using the host without its mirrors, certificates and headers.
type hostsFile struct {
	hostFile
	Server string              `toml:"server"`
	Host   map[string]hostFile `toml:"host"`
}

type hostFile struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// hostDir returns the folder of the hosts files for host, empty if none.
func (r *Registry) hostDir(host string) (string, error) {
	for _, root := range r.roots {
		dir, err := config.HostDirFromRoot(root)(host)
		if err == nil {
			return dir, nil
		}
		if !errdefs.IsNotFound(err) {
			return "", fmt.Errorf("hosts files for %s: %w: %w", host, err, errdefs.ErrFailedPrecondition)
		}
	}
	return "", nil
}

// checkHostDir checks the hosts.toml in dir, if there is one, and returns a
// string that changes when it, or a certificate it uses, does.
func checkHostDir(dir string) (files string, err error) {
	if dir == "" {
		return "", nil
	}
	name := filepath.Join(dir, "hosts.toml")
	wrap := func(err error) error {
		return fmt.Errorf("hosts file %s cannot be used, correct it: %w: %w", name, err, errdefs.ErrFailedPrecondition)
	}
	info, err := os.Stat(name)
	var pems []string
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return "", wrap(err)
	case !info.Mode().IsRegular():
		return "", wrap(errors.New("not a regular file"))
	case info.Size() > maxHostsFile:
		return "", wrap(fmt.Errorf("%d bytes long", info.Size()))
	default:
		if pems, err = checkHostsFile(name); err != nil {
			return "", wrap(err)
		}
	}
	return fingerprint(dir, pems)
}

// fingerprint notes size and time of all files in dir and of pems, which may
// lie elsewhere.
func fingerprint(dir string, pems []string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fmt.Errorf("hosts folder %s: %w: %w", dir, err, errdefs.ErrFailedPrecondition)
	}
	names := slices.Clone(pems)
	for _, e := range entries {
		names = append(names, filepath.Join(dir, e.Name()))
	}
	var b strings.Builder
	for _, name := range names {
		// A file that is missing is reported when containerd loads it.
		if info, err := os.Stat(name); err == nil {
			fmt.Fprintf(&b, "%s %d %d\n", name, info.Size(), info.ModTime().UnixNano())
		}
	}
	return b.String(), nil
}

// checkHostsFile returns the certificate files that name mentions.
func checkHostsFile(name string) (pems []string, err error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	var f hostsFile
	if err := toml.Unmarshal(data, &f); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			row, col := at.Position()
			return nil, fmt.Errorf("line %d, column %d: %w", row, col, err)
		}
		return nil, err
	}
	if f.Server != "" {
		if err := checkServer(f.Server); err != nil {
			return nil, fmt.Errorf("server: %w", err)
		}
	}
	paths, err := f.check()
	if err != nil {
		return nil, err
	}
	for server, h := range f.Host {
		if err := checkServer(server); err != nil {
			return nil, err
		}
		more, err := h.check()
		if err != nil {
			return nil, fmt.Errorf("host %q: %w", server, err)
		}
		paths = append(paths, more...)
	}
	for i, p := range paths {
		if !filepath.IsAbs(p) {
			paths[i] = filepath.Join(filepath.Dir(name), p)
		}
	}
	slices.Sort(paths)
	return paths, nil
}

// checkServer takes a server the way containerd does: a URL, or a host alone.
func checkServer(s string) error {
	if !strings.HasPrefix(s, "http") {
		s = "https://" + s
	}
	u, err := url.Parse(s)
	if err != nil {
		return err
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil {
		return fmt.Errorf("%q is not an http or https URL of a host", u.Redacted())
	}
	return nil
}

func (h hostFile) check() (pems []string, err error) {
	for _, c := range h.Capabilities {
		switch strings.ToLower(c) {
		case "pull", "resolve", "push", "referrers":
		default:
			return nil, fmt.Errorf("unknown capability %q", c)
		}
	}
	if h.DialTimeout != "" {
		if d, err := time.ParseDuration(h.DialTimeout); err != nil || d <= 0 {
			return nil, fmt.Errorf("dial_timeout %q is not a duration above zero", h.DialTimeout)
		}
	}
	for key, value := range h.Header {
		if err := checkHeader(key, value); err != nil {
			return nil, err
		}
	}
	for key, value := range map[string]any{"ca": h.CA, "client": h.Client} {
		if value == nil {
			continue
		}
		paths, err := stringsOf(value, key == "client")
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
		pems = append(pems, paths...)
	}
	return pems, nil
}

// stringsOf flattens a string, a list of strings, or (pairs) a list in which
// pairs of strings may stand too.
func stringsOf(value any, pairs bool) ([]string, error) {
	switch v := value.(type) {
	case string:
		return []string{v}, nil
	case []any:
		var out []string
		for _, item := range v {
			inner, isList := item.([]any)
			if isList && (!pairs || len(inner) != 2) {
				return nil, fmt.Errorf("%v is not a file or a pair of files", item)
			}
			files, err := stringsOf(item, false)
			if err != nil {
				return nil, err
			}
			out = append(out, files...)
		}
		return out, nil
	}
	return nil, fmt.Errorf("%v is not the name of a file", value)
}

// checkHeader refuses what Go would refuse in each request.
func checkHeader(key string, value any) error {
	values, err := stringsOf(value, false)
	if err != nil {
		return fmt.Errorf("header %q: not a string or a list of strings", key)
	}
	const token = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	if key == "" || strings.Trim(key, token) != "" {
		return fmt.Errorf("header %q: not a valid name", key)
	}
	for _, v := range values {
		if strings.ContainsFunc(v, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
			return fmt.Errorf("header %q: control characters in its value", key)
		}
	}
	return nil
}
