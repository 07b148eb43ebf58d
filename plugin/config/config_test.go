package config

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func write(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestLoad(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text string
		want func(*Config)
	}{
		"empty":   {"", func(*Config) {}},
		"comment": {"# nothing\n", func(*Config) {}},
		"root moves what lies below it": {`root = "/data/gantry/"`, func(c *Config) {
			c.Root, c.Content.Root, c.Transfer.Root = "/data/gantry", "/data/gantry/content", "/data/gantry/transfers"
		}},
		"state moves the socket": {`state = "/run/g"`, func(c *Config) { c.State, c.Address = "/run/g", "/run/g/gantry.sock" }},
		"tables": {"[transfer]\nchunk_size = \"8MiB\"\nkeep_partial = \"90m\"\ngive_up=\"30s\"\nconnections_per_host = 6\nconnections = 7\n[log]\nlevel = \"debug\"\n", func(c *Config) {
			c.Transfer.ChunkSize, c.Transfer.KeepPartial, c.Transfer.GiveUp, c.Transfer.ConnectionsPerHost, c.Transfer.Connections = 8<<20, 90*time.Minute, 30*time.Second, 6, 7
			c.Log.Level = "debug"
		}},
		"dotted and inline":    {"snapshotter.mount = \"loop\"\ncontainerd = {content_sharing_policy = \"isolated\"}\n", func(c *Config) { c.Snapshotter.Mount, c.Containerd.ContentSharingPolicy = "loop", "isolated" }},
		"upper files":          {"[snapshotter]\nupper = \"file\"\nupper_size = \"1TiB\"\n", func(c *Config) { c.Snapshotter.Upper, c.Snapshotter.UpperSize = "file", 1<<40 }},
		"size in bytes":        {"transfer.chunk_size = 4194304", func(c *Config) { c.Transfer.ChunkSize = 4 << 20 }},
		"no registry settings": {"registry.config_path = \"\"", func(c *Config) { c.Registry.ConfigPath = "" }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := Default()
			tc.want(want)
			got, err := Load(write(t, tc.text))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			roundTrip(t, got)
		})
	}
}

// roundTrip checks that what Encode writes loads back to the same.
func roundTrip(t *testing.T, c *Config) {
	t.Helper()
	var b bytes.Buffer
	if err := c.Encode(&b); err != nil {
		t.Fatal(err)
	}
	got, err := Load(write(t, b.String()))
	if err != nil {
		t.Fatalf("what Encode wrote does not load: %v\n%s", err, b.String())
	}
	if !reflect.DeepEqual(got, c) {
		t.Errorf("loaded back %+v\nwant        %+v", got, c)
	}
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	c := Default()
	want := &Config{
		Root: "/var/lib/gantry", State: "/run/gantry", Address: "/run/gantry/gantry.sock",
		Log:        Log{Level: "info", Format: "text"},
		Containerd: Containerd{Address: "/run/containerd/containerd.sock", ContentSharingPolicy: "shared"},
		Content:    Content{Root: "/var/lib/gantry/content", Retain: RetainAll},
		Transfer: Transfer{Root: "/var/lib/gantry/transfers",
			ConnectionsPerHost: 32, Connections: 64, KeepPartial: 24 * time.Hour, GiveUp: 2 * time.Minute},
		Registry:    Registry{ConfigPath: "/etc/containerd/certs.d", Credentials: "/root/.docker/config.json"},
		Snapshotter: Snapshotter{Mount: "auto", Upper: "directory", UpperSize: 10 << 30},
	}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
	// A default that its own key refuses would show only on a node.
	for _, f := range fields(c) {
		var v any = f.fallback
		switch p := f.value.(type) {
		case countValue:
			v = int64(*p.at)
		case pathValue:
			v = *p.at
		}
		if err := f.value.set(v); err != nil {
			t.Errorf("%s: default %q: %v", f.key, f.fallback, err)
		}
	}
	roundTrip(t, c)
}

func TestLoadErrors(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text string
		want []string // FILE stands for the file's name
	}{
		"syntax":             {"root = \n", []string{"FILE:1:"}},
		"unknown key":        {"root = \"/a\"\nrott = \"/b\"\n", []string{"FILE:2: rott: unknown key", "known here: root, state, address, [log]"}},
		"unknown in a table": {"[transfer]\n\nchunksize = 1\n", []string{"FILE:3: transfer.chunksize: unknown key", "known here: root, chunk_size"}},
		"unknown table":      {"[nope]\nx = 1\n", []string{"FILE:1: nope: unknown key"}},
		"nested too deep":    {"[log.level.x]\ny=1\n", []string{"FILE:1: log.level: a table is not allowed"}},
		"unknown inline":     {"log = {\n  lvl = 1,\n}\n", []string{"FILE:2: log.lvl: unknown key"}},
		"table as a value":   {"transfer = 3\n", []string{"FILE:1: transfer: this is a table: write [transfer] with root, chunk_size"}},
		"array of tables":    {"[[log]]\nlevel = \"info\"\n", []string{"FILE:1: log: this is a table"}},
		"string for number":  {"[unpack]\nworkers = \"4\"\n", []string{"FILE:2: unpack.workers:", `"4" is a string; want a number from 0 to 1024`}},
		"number for string":  {"root = 4\n", []string{"FILE:1: root: 4 is not allowed; want an absolute path"}},
		"list for string":    {"root = [\"/a\"]\n", []string{"FILE:1: root: a list is not allowed"}},
		"negative":           {"unpack.workers = -1\n", []string{"FILE:1: unpack.workers: -1 is out of range; want a number from 0"}},
		"relative path":      {"root = \"var\"\n", []string{"FILE:1: root: \"var\" is not absolute; want an absolute path"}},
		"empty path":         {"content.root = \"\"\n", []string{"FILE:1: content.root: \"\" is not absolute"}},
		"long socket":        {fmt.Sprintf("address = \"/%s\"\n", strings.Repeat("a", 100)), []string{"FILE:1: address:", "at most 90 bytes"}},
		"long state":         {fmt.Sprintf("state = \"/%s\"\n", strings.Repeat("a", 100)), []string{"FILE: address, which follows from state"}},
		"choice":             {"[snapshotter]\nmount = \"erofs\"\n", []string{"FILE:2: snapshotter.mount: \"erofs\" is unknown; want \"auto\", \"file\", \"loop\" or \"directory\""}},
		"policy":             {"containerd.content_sharing_policy = \"Shared\"\n", []string{"FILE:1: containerd.content_sharing_policy:", `want "shared" or "isolated"`}},
		"duration":           {"transfer.keep_partial = \"1 day\"\n", []string{"FILE:1: transfer.keep_partial: \"1 day\" is not a duration", `from "1m" to`}},
		"duration number":    {"transfer.give_up = 120\n", []string{"FILE:1: transfer.give_up: 120 is not allowed; want a duration like"}},
		"duration range":     {"transfer.give_up = \"10m\"\n", []string{"FILE:1: transfer.give_up: 10m is out of range", `to "2m"`}},
		"size unit":          {"transfer.chunk_size = \"8 megs\"\n", []string{"FILE:1: transfer.chunk_size: \"8 megs\" is not a size; want 0, or a size like \"8MiB\" from \"1MiB\" to \"64MiB\""}},
		"size range":         {"transfer.chunk_size = \"1GiB\"\n", []string{"FILE:1: transfer.chunk_size: 1GiB is out of range"}},
		"upper":              {"snapshotter.upper = \"xyz\"\n", []string{"FILE:1: snapshotter.upper: \"xyz\" is unknown; want \"directory\" or \"file\""}},
		"upper size":         {"[snapshotter]\nupper_size = \"1\"\n", []string{"FILE:2: snapshotter.upper_size: 1B is out of range; want a size like \"8MiB\" from \"16MiB\" to \"1TiB\""}},
		"upper size of zero": {"snapshotter.upper_size = 0\n", []string{"FILE:1: snapshotter.upper_size: 0B is out of range"}},
		"size overflow":      {"transfer.chunk_size = \"9999999999999GiB\"\n", []string{"is not a size"}},
		"same folders":       {"root = \"/a\"\nstate = \"/a\"\n", []string{"FILE: root and state are both /a"}},
		"same blobs":         {"content.root = \"/a\"\ntransfer.root = \"/a\"\n", []string{"FILE: content.root and transfer.root are both /a"}},
		"two at once":        {"[log]\nlevel = \"loud\"\n\n[unpack]\nworkerz = 1\n", []string{"FILE:2: log.level:", "\nFILE:5: unpack.workerz:"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file := write(t, tc.text)
			_, err := Load(file)
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("got %v, want an invalid argument", err)
			}
			for _, want := range tc.want {
				if want = strings.ReplaceAll(want, "FILE", file); !strings.Contains(err.Error(), want) {
					t.Errorf("got  %v\nwant %q in it", err, want)
				}
			}
		})
	}
}

func TestLoadAbsent(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "absent.toml")
	if _, err := Load(file); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a file that was asked for and is absent: got %v, want an error that names it", err)
	}
	if _, err := os.Stat(DefaultPath); err == nil {
		t.Skipf("%s exists on this machine", DefaultPath)
	}
	c, err := Load("")
	if err != nil || !reflect.DeepEqual(c, Default()) {
		t.Errorf("the default file is absent: got %+v, %v, want the defaults", c, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("root = \"/a\"\n[log]\nlevel = \"info\"\n"))
	f.Add([]byte("transfer = {chunk_size = \"8MiB\", give_up = 3}\n[[x.y]]\n"))
	f.Add([]byte("a.\"b\\u0041\".c = [{x=1}]\n"))
	f.Add([]byte("root = \"/a\\u0007\\u007f\\U0001F600\\u00e9\"\ncontent = {root = '/\\x'}\n"))
	f.Add([]byte("state = \"/run/x\"\n[transfer]\ngive_up = \"1m0.5s\"\nchunk_size = \"1.5MiB\"\n"))
	var defaults bytes.Buffer
	if err := Default().Encode(&defaults); err != nil {
		f.Fatal(err)
	}
	f.Add(defaults.Bytes())
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parse("file", data)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("an error that says nothing to its reader: %v", err)
			}
			return
		}
		var b bytes.Buffer
		if err := c.Encode(&b); err != nil {
			t.Fatal(err)
		}
		again, err := parse("again", b.Bytes())
		if err != nil || !reflect.DeepEqual(c, again) {
			t.Fatalf("written and read again: %+v, %v, was %+v\n%s", again, err, c, b.String())
		}
	})
}
