package registry

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

const topSecret = "pa:ss-word"

// login is an entry as docker writes it.
func login(user string) string {
	return fmt.Sprintf(`{"auth": %q}`, base64.StdEncoding.EncodeToString([]byte(user+":"+topSecret)))
}

func dockerConfig(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "config.json")
	write(t, name, text)
	return name
}

func TestDockerConfig(t *testing.T) {
	t.Parallel()
	path := dockerConfig(t, `{
		"HttpHeaders": {"a": "b"}, "unknown": [1],
		"auths": {
			"https://index.docker.io/v1/": `+login("hub")+`,
			"images.example": `+login("plain")+`,
			"images.example:5000": `+login("port")+`,
			"https://old.example/v1/": `+login("old")+`,
			"named.example": {"username": "u", "password": "p"},
			"token.example": {"auth": "`+base64.StdEncoding.EncodeToString([]byte("00000000-0000-0000-0000-000000000000:"))+`", "identitytoken": "id"},
			"empty.example": {},
			"bearer.example": {"registrytoken": "x"}
		}}`)
	creds, err := DockerCredentials(path)
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"registry-1.docker.io": "hub " + topSecret,
		"docker.io":            "hub " + topSecret,
		"images.example":       "plain " + topSecret,
		"images.example:5000":  "port " + topSecret,
		"images.example:5001":  " ",
		"example":              " ",
		"sub.images.example":   " ",
		"old.example":          "old " + topSecret,
		"named.example":        "u p",
		"token.example":        " id",
		"empty.example":        " ",
		"nobody.example":       " ",
	} {
		user, secret, err := creds(host)
		if got := user + " " + secret; err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", host, got, err, want)
		}
	}
	if _, _, err := creds("bearer.example"); !errdefs.IsNotImplemented(err) {
		t.Errorf("registrytoken: %v", err)
	}
}

func TestDockerConfigIsReadAgain(t *testing.T) {
	t.Parallel()
	if f, err := DockerCredentials(""); f != nil || err != nil {
		t.Errorf("no path: %v", err)
	}
	if _, err := DockerCredentials("config.json"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("relative path: %v", err)
	}
	path := filepath.Join(t.TempDir(), "later", "config.json")
	creds, err := DockerCredentials(path)
	if err != nil {
		t.Fatal(err)
	}
	check := func(want string) {
		t.Helper()
		if user, _, err := creds("images.example"); err != nil || user != want {
			t.Errorf("user %q, %v; want %q", user, err, want)
		}
	}
	check("")
	for _, user := range []string{"anna", "otto"} { // same size, maybe within one tick of the clock
		write(t, path, `{"auths":{"images.example":`+login(user)+`}}`)
		check(user)
	}
	write(t, path, " \n")
	check("")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	check("")
}

func TestBadDockerConfigs(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"syntax":      `{"auths": {"images.example": {"password": "` + topSecret + `"`,
		"not JSON":    topSecret,
		"two values":  `{} {"auths": {}}`,
		"type":        `{"auths": {"images.example": "` + topSecret + `"}}`,
		"number":      `{"auths": {"images.example": {"password": 12345}}}`,
		"list":        `[]`,
		"base64":      `{"auths": {"images.example": {"auth": "` + topSecret + `"}}}`,
		"no colon":    `{"auths": {"images.example": {"auth": "` + base64.StdEncoding.EncodeToString([]byte("topSecret")) + `"}}}`,
		"deep":        strings.Repeat("[", 100_000),
		"very long":   strings.Repeat(" ", maxDockerConfig) + "{}",
		"helper type": `{"credHelpers": ["` + topSecret + `"]}`,
		"helper path": `{"credsStore": "../../bin/sh"}`,
		"no helper":   `{"credsStore": "of-nobody-at-all"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			path := dockerConfig(t, text)
			creds, err := DockerCredentials(path)
			if err != nil {
				t.Fatal(err)
			}
			user, secret, err := creds("images.example")
			if !errdefs.IsFailedPrecondition(err) || user+secret != "" {
				t.Fatalf("%q, %q, error %v", user, secret, err)
			}
			contains(t, err, path, "images.example")
			if s := err.Error(); strings.Contains(s, topSecret) || strings.Contains(s, "topSecret") || strings.Contains(s, "12345") || len(s) > 500 {
				t.Errorf("error unfit for a log: %v", err)
			}
		})
	}
	creds, _ := DockerCredentials(t.TempDir())
	if _, _, err := creds("images.example"); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a folder: %v", err)
	}
}

// helpers puts credential helpers into PATH; each notes in NAME.asked what it
// is asked for.
func helpers(t *testing.T, scripts map[string]string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for name, script := range scripts {
		file := filepath.Join(dir, "docker-credential-"+name)
		text := fmt.Sprintf("#!/bin/sh\nread server\necho \"$1 $server\" >>%s/%s.asked\n%s\n", dir, name, script)
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return dir
}

func TestCredentialHelpers(t *testing.T) { //nolint:paralleltest // sets PATH
	dir := helpers(t, map[string]string{
		"good":   `echo '{"Username": "helped", "Secret": "` + topSecret + `"}'`,
		"token":  `echo '{"Username": "<token>", "Secret": "id"}'`,
		"nobody": `echo credentials not found in native keychain; exit 1`,
		"fails":  `echo '{"Secret": "` + topSecret + `"'; echo ` + topSecret + ` >&2; exit 3`,
		"talks":  `echo hello ` + topSecret,
		"floods": `while echo ` + strings.Repeat("x", 1000) + `; do :; done`,
		"agent":  `echo '{"Username": "helped", "Secret": "s"}'; sleep 15 & echo $! >` + "$0.pid",
		"home":   `echo "{\"Username\": \"$HOME\", \"Secret\": \"s\"}"`,
	})
	t.Setenv("HOME", "")
	creds, err := DockerCredentials(dockerConfig(t, `{
		"auths": {"file.example": `+login("file")+`},
		"credsStore": "nobody",
		"credHelpers": {"docker.io": "good", "good.example:5000": "good", "token.example": "token", "fails.example": "fails",
			"talks.example": "talks", "floods.example": "floods", "agent.example": "agent", "home.example": "home", "file.example": ""}}`))
	if err != nil {
		t.Fatal(err)
	}
	for host, want := range map[string]string{
		"registry-1.docker.io": "helped " + topSecret,
		"good.example:5000":    "helped " + topSecret,
		"token.example":        " id",
		"other.example":        " ",
		"file.example":         "file " + topSecret,
		"agent.example":        "helped s",
		"fails.example":        "error", "talks.example": "error", "floods.example": "error",
	} {
		user, secret, err := creds(host)
		switch got := user + " " + secret; {
		case want == "error":
			if !errdefs.IsFailedPrecondition(err) || got != " " || strings.Contains(err.Error(), topSecret) || len(err.Error()) > 500 {
				t.Errorf("%s: %q, error %v", host, got, err)
			}
			contains(t, err, host, "docker-credential-")
		case err != nil || got != want:
			t.Errorf("%s: %q, %v; want %q", host, got, err, want)
		}
	}
	if user, _, err := creds("home.example"); user == "" || err != nil {
		t.Errorf("a helper has no HOME: %v", err)
	}
	if agent := pidIn(t, filepath.Join(dir, "docker-credential-agent.pid")); !runs(agent) {
		t.Error("what a helper leaves running was killed")
	} else if err := syscall.Kill(agent, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
	asked, err := os.ReadFile(filepath.Join(dir, "good.asked"))
	if got := string(asked); err != nil || !strings.Contains(got, "get "+hubKey+"\n") || !strings.Contains(got, "get good.example:5000\n") {
		t.Errorf("asked %q, %v", asked, err)
	}
}

// TestHelperThatHangs ends with its children, and is not waited for twice.
func TestHelperThatHangs(t *testing.T) { //nolint:paralleltest // sets PATH
	dir := helpers(t, map[string]string{
		"hangs": `sleep 100 & echo $! >$0.pid; wait`, // the shell waits, its child holds the pipe
		"deaf":  `trap '' TERM; setsid sleep 5 & sleep 100 & echo $! >$0.pid; wait`,
	})
	for _, name := range []string{"hangs", "deaf"} {
		creds := newKeychain(dockerConfig(t, `{"credsStore": "`+name+`"}`), 100*time.Millisecond).credentials
		for range 3 {
			_, _, err := creds("images.example")
			contains(t, err, "docker-credential-"+name, "no answer within 100ms")
		}
		if asked, err := os.ReadFile(filepath.Join(dir, name+".asked")); err != nil || strings.Count(string(asked), "\n") != 1 {
			t.Errorf("%s was asked %q, %v; want once", name, asked, err)
		}
		child := pidIn(t, filepath.Join(dir, "docker-credential-"+name+".pid"))
		for i := 0; runs(child); i++ {
			if i == 500 {
				t.Errorf("%s left process %d behind", name, child)
				_ = syscall.Kill(child, syscall.SIGKILL)
			}
			time.Sleep(time.Millisecond)
		}
	}
}

func pidIn(t *testing.T, file string) int {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// runs says whether a process is there and no zombie.
func runs(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

func FuzzDockerConfig(f *testing.F) {
	f.Add(`{"auths":{"images.example":` + login("user") + `}}`)
	f.Add(`{"auths":{"https://images.example/v1/":{"identitytoken":"x"}},"credHelpers":{"a":"b"}}`)
	f.Add(`{"auths":{"https://[::1":{"auth":"Og=="}}}`)
	f.Add(`{"auths":null,"credsStore":null}`)
	f.Add(`{"auths":{"":{}}} x`)
	f.Fuzz(func(t *testing.T, text string) {
		creds, err := DockerCredentials(dockerConfig(t, text))
		if err != nil {
			t.Fatal(err)
		}
		for _, host := range []string{"images.example", "registry-1.docker.io", "[::1]:5000", ""} {
			user, secret, err := creds(host)
			if err != nil && (user+secret != "" || !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotImplemented(err)) {
				t.Fatalf("%q: %q, %q, %v", host, user, secret, err)
			}
		}
	})
}
