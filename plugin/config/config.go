// Package config is gantryd's configuration: one TOML file, its defaults and
// what each key may say. Every error names the file, the line, the key and what
// is allowed there.
package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"
)

// DefaultPath is the file that is read when no --config is given. It need not exist.
const DefaultPath = "/etc/gantry/config.toml"

// Version is gantry's version. Released binaries set it at link time:
// -ldflags "-X github.com/gantryd/gantry/plugin/config.Version=v1.2.3".
var Version = "devel"

// Values of containerd.content_sharing_policy.
const (
	PolicyShared   = "shared"
	PolicyIsolated = "isolated"
)

// Values of content.retain.
const (
	RetainAll  = "all"
	RetainNone = "none"
)

// Config is what gantryd runs with. The keys of the file, their defaults and
// their meaning are in fields; a Config from Default or Load is valid, and its
// folders that follow from others (content.root from root) are filled in.
type Config struct {
	Root        string
	State       string
	Address     string
	Log         Log
	Containerd  Containerd
	Content     Content
	Transfer    Transfer
	Registry    Registry
	Unpack      Unpack
	Snapshotter Snapshotter
}

// Log says how much is logged, and how, to standard error.
type Log struct {
	Level  string // a level of github.com/containerd/log
	Format string // text or json
}

// Containerd is the daemon that gantryd serves.
type Containerd struct {
	Address              string // its gRPC socket
	ContentSharingPolicy string // PolicyShared or PolicyIsolated
}

// Content is the content store.
type Content struct {
	Root   string
	Retain string // RetainAll or RetainNone
}

// Transfer says how blobs are fetched.
type Transfer struct {
	Root               string
	ChunkSize          int64 // bytes; 0: gantryd chooses by the size of the blob
	ConnectionsPerHost int   // requests at once, over all blobs, at most
	Connections        int   // the same for all hosts together
	KeepPartial        time.Duration
	GiveUp             time.Duration
}

// Registry says where registries are described.
type Registry struct {
	ConfigPath  string // containerd's certs.d; empty: none
	Credentials string // docker's config.json; empty: none
}

// Unpack says how layers are unpacked.
type Unpack struct {
	Workers int // layers at once; 0: see UnpackWorkers
}

// Snapshotter says how layers are mounted, and where containers write.
type Snapshotter struct {
	Mount     string // auto, file, loop or directory
	Upper     string // directory or file
	UpperSize int64  // bytes of a file
}

// Default returns the configuration of an empty file.
func Default() *Config {
	c := &Config{}
	for _, f := range fields(c) {
		f.value.reset(f.fallback)
	}
	c.derive()
	return c
}

// Load reads the file at path. An empty path means DefaultPath, which may be
// absent; a path that was asked for must exist.
func Load(path string) (*Config, error) {
	explicit := path != ""
	if !explicit {
		path = DefaultPath
	}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && !explicit {
		return Default(), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the configuration: %w", err)
	}
	return parse(path, data)
}

// derive fills in the places that follow from root and state.
func (c *Config) derive() {
	for _, f := range fields(c) {
		if p, ok := f.value.(pathValue); ok && f.derived != "" && *p.at == "" {
			*p.at = filepath.Join(*f.parent, f.derived)
		}
	}
}

// follows reports whether the place that f holds is the one it would have if
// the file did not mention it.
func (f field) follows() bool {
	p, ok := f.value.(pathValue)
	return ok && f.derived != "" && *p.at == filepath.Join(*f.parent, f.derived)
}

// Isolated says whether containerd isolates content by namespace.
func (c *Config) Isolated() bool { return c.Containerd.ContentSharingPolicy == PolicyIsolated }

// mostlyWaiting is how many layers are unpacked at once at least: a layer that arrives slower than it is
// unpacked keeps its worker, and must not keep the others from being unpacked as they arrive.
const mostlyWaiting = 8

// UnpackWorkers is how many layers are unpacked at once.
func (c *Config) UnpackWorkers() int {
	if c.Unpack.Workers > 0 {
		return c.Unpack.Workers
	}
	return max(mostlyWaiting, runtime.NumCPU())
}
