package config

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"text/template"

	"github.com/containerd/platforms"
)

// Names of the three proxy plugins in containerd's configuration. They are keys
// of one table there, so they have to differ; the snapshotter's is the one that
// people type.
const (
	SnapshotterName = "gantry"
	ContentName     = "gantry-content"
	DifferName      = "gantry-diff"
)

// leastUnpacks is how many layers containerd hands to gantry at once at least.
// Each only waits for gantry, which has its own limit (unpack.workers).
const leastUnpacks = 4

// WriteContainerd writes what containerd (2.0 or later) needs to use the gantryd
// that c configures, as a file for containerd's imports. notIDMapped is why
// gantryd does not map layers for user namespaces on this host, nil if it does.
func (c *Config) WriteContainerd(w io.Writer, notIDMapped error) error {
	var b bytes.Buffer
	values := map[string]any{
		"Config": c, "Isolated": c.Isolated(),
		"Snapshotter": SnapshotterName, "Content": ContentName, "Differ": DifferName,
		"Platform": platforms.Format(platforms.DefaultSpec()), "Unpacks": max(c.UnpackWorkers(), leastUnpacks),
		"Version": Version, "NotIDMapped": "",
	}
	if notIDMapped != nil {
		values["NotIDMapped"] = strings.Join(strings.Fields(notIDMapped.Error()), " ") // one line of a comment
	}
	err := dropIn.Execute(&b, values)
	if err != nil {
		return fmt.Errorf("containerd's configuration: %w", err)
	}
	_, err = w.Write(b.Bytes())
	return err
}

var dropIn = template.Must(template.New("containerd").Funcs(template.FuncMap{"q": quote}).Parse(
	`# Lets containerd use gantry. Printed by "gantry config containerd", version {{.Version}}.
#
# Switch on:
#   1. gantryd is running:          gantry status
#   2. save this file:              gantry config containerd > /etc/containerd/conf.d/gantry.toml
#   3. /etc/containerd/config.toml  has at its top: imports = ["/etc/containerd/conf.d/*.toml"]
#      containerd 2.2 forgets the CRI settings of a file of version 2 then: bring it to version 3 first, by
#                                   containerd config migrate
#   4. systemctl restart containerd (running containers are not touched)
# Switch off: remove the containers that use the snapshotter {{q .Snapshotter}}, remove this file,
#   systemctl restart containerd, and only then stop gantryd.
#   If gantryd ever ran with content.retain = "none", layers are missing from the folder below that containerd then reads
#   by itself. Before anything else set content.retain = "all", systemctl restart gantryd, and run
#                                   gantry content restore
#   until it ends without an error: it fetches them again. This gantryd runs with content.retain = {{q .Config.Content.Retain}}.
#
# containerd's metadata goes on naming the blobs and the snapshots that it has, also while gantry is switched off:
#   - A pull fails with "content ...: not found" if a blob is missing from gantryd's store, which is
#       {{.Config.Content.Root}}
#     If that is not the folder that containerd used before (io.containerd.content.v1.content below containerd's
#     root), either set content.root to that folder, and transfer.root to one on the same file system, in gantryd's
#     configuration (the layout is the same), or remove all images, in every namespace, before switching on, and
#     again before switching off.
#   - A pull fails with "target snapshot ...: already exists" if a snapshot is missing from
#       {{.Config.Root}}
#     so delete that folder only after all images were removed, in every namespace, with gantry switched on. Where it
#     is too late, removing all images helps too.

version = 3

# gantry is the content store; containerd accepts only one.
disabled_plugins = ["io.containerd.content.v1.content"]

# Three services on one socket. The names are keys of one table and have to differ.
[proxy_plugins.{{.Content}}]
  type = "content"
  address = {{q .Config.Address}}

[proxy_plugins.{{.Snapshotter}}]
  type = "snapshot"
  address = {{q .Config.Address}}
  # rebase: layers of one image may be unpacked in any order, each without its parent.
{{- if .NotIDMapped}}
  # remap-ids is missing, so a container in a user namespace gets a copy of its image with changed owners. Layers
  # cannot be id-mapped here: {{.NotIDMapped}}
  capabilities = ["rebase"]
{{- else}}
  # remap-ids: a container in a user namespace sees the layers through id-mapped mounts. It works on this host, as it
  # is now; without it (an older kernel) such containers fail to start and say so: print this file again then.
  capabilities = ["rebase", "remap-ids"]
{{- end}}
  [proxy_plugins.{{.Snapshotter}}.exports]
    # Where images take their space: the kubelet watches this file system.
    root = {{q .Config.Root}}
    # Tells gantry which image a layer is pulled for.
    enable_remote_snapshot_annotations = "true"

[proxy_plugins.{{.Differ}}]
  type = "diff"
  address = {{q .Config.Address}}

# Clients that pull by themselves (ctr --local, nerdctl, buildkit): gantry applies; what it does not implement,
# making a layer of a container's changes, is left to containerd.
[plugins."io.containerd.service.v1.diff-service"]
  default = [{{q .Differ}}, "walking"]

# Pulls by the transfer service (ctr, and the kubelet since containerd 2.2).
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_unpacks = {{.Unpacks}}
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = {{q .Platform}}
    snapshotter = {{q .Snapshotter}}
    differ = {{q .Differ}}
  # A list replaces containerd's own, so its default is repeated: overlayfs goes on working.
  [[plugins."io.containerd.transfer.v1.local".unpack_config]]
    platform = {{q .Platform}}
    snapshotter = "overlayfs"
    differ = "walking"
    optional = true

# The kubelet's images and containers. A runtime that names a snapshotter of its own
# ([plugins."io.containerd.cri.v1.runtime".containerd.runtimes.NAME] snapshotter = "...") keeps it.
[plugins."io.containerd.cri.v1.images"]
  snapshotter = {{q .Snapshotter}}
{{if .Isolated}}
# As in gantryd's configuration: both must say the same.
[plugins."io.containerd.metadata.v1.bolt"]
  content_sharing_policy = "isolated"
{{else}}
# gantryd runs with containerd.content_sharing_policy = "shared", which is containerd's default. If containerd's own
# configuration sets content_sharing_policy = "isolated" under [plugins."io.containerd.metadata.v1.bolt"], set it in
# gantryd's configuration too, or gantry hands layers across namespaces; then print this file again.
{{end}}`))
