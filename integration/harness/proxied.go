package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"

	"github.com/containerd/platforms"
)

// proxiedConfig is for the program proxied what `gantry config containerd` prints for gantryd, but for the differ.
var proxiedConfig = template.Must(template.New("proxied").Parse(`version = 3
disabled_plugins = ['io.containerd.content.v1.content']

[proxy_plugins.proxied-content]
type = 'content'
address = '{{.Address}}'

[proxy_plugins.{{.Snapshotter}}]
type = 'snapshot'
address = '{{.Address}}'
capabilities = ['rebase', 'remap-ids']

[proxy_plugins.{{.Snapshotter}}.exports]
root = '{{.Root}}'
enable_remote_snapshot_annotations = 'true'

[[plugins.'io.containerd.transfer.v1.local'.unpack_config]]
platform = '{{.Platform}}'
snapshotter = '{{.Snapshotter}}'
differ = 'walking'
`))

// startProxied builds and starts the program proxied, and writes what containerd is told of it.
func (n *Node) startProxied(ctx context.Context) error {
	program, err := build(ctx, n.Dir, "proxied")
	if err != nil {
		return err
	}
	address, root := n.path("p.sock"), n.path("proxied.root")
	config, err := render(proxiedConfig, map[string]string{
		"Address": address, "Root": root, "Snapshotter": n.Snapshotter, "Platform": platforms.Format(platforms.DefaultSpec()),
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.dropIn(), config, 0o600); err != nil {
		return err
	}
	if n.proxied, err = start(ctx, n.path("logs"), "proxied", nil, program, address, root); err != nil {
		return err
	}
	return n.proxied.answers(ctx, address)
}

// build builds a program of the harness into dir and returns its path.
func build(ctx context.Context, dir, name string) (string, error) {
	path := filepath.Join(dir, name)
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", path,
		"github.com/gantryd/gantry/integration/harness/"+name)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the program %s: %w: %s", name, err, out)
	}
	return path, nil
}
