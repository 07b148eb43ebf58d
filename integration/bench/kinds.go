package main

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/gantryd/gantry/integration/harness"
)

// kind is one way to get an image.
type kind struct {
	name string
	node harness.Options
	// command gets the image; nil: `ctr image pull` on a node made by these options does.
	command func(b *bench, ref string) []string
	// missing says why this cannot be measured here, "" if it can. It may fit the kind to what there is.
	missing func(ctx context.Context, k *kind) string
}

// The kinds. Overlayfs is as shipped: no key changed, and without the programs that unpack gzip faster.
var (
	gantry    = kind{name: "gantry", node: harness.Options{Snapshotter: harness.Gantry}}
	discard   = kind{name: "discard", node: harness.Options{Snapshotter: harness.Gantry, GantryExtra: "\n[content]\nretain = 'none'\n"}, missing: noRetain}
	overlayfs = kind{name: "overlayfs", node: harness.Options{Snapshotter: harness.Overlayfs}}
	proxied   = kind{name: "overlayfs behind a proxy", node: harness.Options{Snapshotter: harness.Proxied}}
	erofs     = kind{name: "erofs", node: harness.Options{Snapshotter: harness.Erofs, ContainerdExtra: fmt.Sprintf(tunedErofs, "")}, missing: noMkfs}
	skopeo    = kind{name: "skopeo", command: copyBlobs, missing: noSkopeo}
)

// everybody are the kinds that large images are compared by.
var everybody = []kind{gantry, discard, overlayfs, erofs, skopeo}

// tunedErofs is the best that containerd's erofs snapshotter is told to do: its documentation's options
// for mkfs.erofs, layers fetched in parallel chunks of 8 MiB, 8 downloads and 4 unpacks at once.
const tunedErofs = `
[plugins.'io.containerd.differ.v1.erofs']
mkfs_options = ['-T0', '--mkfs-time'%s]

[plugins.'io.containerd.transfer.v1.local']
concurrent_layer_fetch_buffer = 8388608
max_concurrent_downloads = 8
max_concurrent_unpacks = 4

[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = 'linux'
snapshotter = 'erofs'
differ = 'erofs'
`

// noMkfs looks for mkfs.erofs where containerd will, which is among the peers first. From 1.8.2 on it
// is told not to sort the data, as containerd's documentation advises.
func noMkfs(ctx context.Context, k *kind) string {
	program, err := harness.Program("mkfs.erofs")
	if err != nil {
		if program, err = exec.LookPath("mkfs.erofs"); err != nil {
			return "mkfs.erofs is missing: make erofs-utils"
		}
	}
	help, err := exec.CommandContext(ctx, program, "--help").CombinedOutput()
	if err != nil {
		return fmt.Sprintf("%s --help: %v: %s", program, err, help)
	}
	if !strings.Contains(string(help), "--tar=") {
		return program + " is older than 1.7: make erofs-utils"
	}
	if strings.Contains(string(help), "--sort=") {
		k.node.ContainerdExtra = fmt.Sprintf(tunedErofs, ", '--sort=none'")
	}
	return ""
}

// noRetain asks gantryd itself which keys it knows.
func noRetain(ctx context.Context, _ *kind) string {
	program, err := harness.Program("gantryd")
	if err != nil {
		return err.Error()
	}
	config, err := exec.CommandContext(ctx, program, "config", "default").Output()
	if err != nil {
		return fmt.Sprintf("gantryd config default: %v", err)
	}
	if !strings.Contains(string(config), "retain") {
		return "this gantryd has no key content.retain"
	}
	return ""
}

func noSkopeo(context.Context, *kind) string {
	if _, err := exec.LookPath("skopeo"); err != nil {
		return "skopeo is missing: make bench-prerequisites"
	}
	return ""
}

// copyBlobs only fetches and stores the compressed blobs, with their digests checked. Nothing is unpacked or synced.
func copyBlobs(b *bench, ref string) []string {
	return []string{"skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false", "docker://" + ref, "dir:" + filepath.Join(b.disk.Path, "blobs")}
}

// present returns the kinds that can be measured here and that were asked for, and says why others cannot.
func (b *bench) present(ctx context.Context, kinds []kind) []kind {
	var found []kind
	for _, k := range kinds {
		if len(b.kinds) > 0 && !slices.Contains(b.kinds, k.name) {
			continue
		}
		why := ""
		if k.missing != nil {
			why = k.missing(ctx, &k)
		}
		if why != "" {
			fmt.Printf("NOT MEASURED: %s: %s\n", k.name, why)
			continue
		}
		found = append(found, k)
	}
	return found
}
