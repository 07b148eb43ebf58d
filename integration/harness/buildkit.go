package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"text/template"
)

// BuildKit is a buildkitd whose worker is the containerd of a node. It keeps its files in the node's folder.
type BuildKit struct {
	address string
	proc    *Process
}

var buildkitConfig = template.Must(template.New("buildkitd").Parse(`root = '{{.Dir}}/buildkit'
insecure-entitlements = ['security.insecure']
[grpc]
address = ['unix://{{.Dir}}/b.sock']
[otel]
socketPath = '{{.Dir}}/otel.sock'
[worker.oci]
enabled = false
[worker.containerd]
enabled = true
address = '{{.Dir}}/c.sock'
namespace = 'buildkit'
snapshotter = '{{.Snapshotter}}'
networkMode = 'host'
gc = false
[worker.containerd.runtime]
name = 'io.containerd.runc.v2'
options = {Root = '{{.Dir}}/runc'}
{{range .Plain}}[registry.'{{.}}']
http = true
{{end}}`))

// StartBuildKit starts buildkitd, which asks the registries given over plain HTTP, and waits until it answers.
func (n *Node) StartBuildKit(ctx context.Context, plain ...string) (*BuildKit, error) {
	program, err := Program("buildkitd")
	if err != nil {
		return nil, err
	}
	config, err := render(buildkitConfig, map[string]any{"Dir": n.Dir, "Snapshotter": n.Snapshotter, "Plain": plain})
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(n.path("buildkitd.toml"), config, 0o600); err != nil {
		return nil, err
	}
	b := &BuildKit{address: "unix://" + n.path("b.sock")}
	if b.proc, err = start(ctx, n.path("logs"), "buildkitd", []string{"OTEL_TRACES_EXPORTER=none"}, program, "--config", n.path("buildkitd.toml")); err != nil {
		return nil, err
	}
	if err := b.proc.ready(ctx, func(ctx context.Context) error { return b.ctl(ctx, "debug", "workers") }); err != nil {
		b.proc.Kill()
		return nil, err
	}
	return b, nil
}

// Build builds the Dockerfile in the folder and pushes what comes out as ref. Each RUN has to say --security=insecure: buildkitd
// restricts others by seccomp, which the runc among the peers is built without, as it needs a C library.
func (b *BuildKit) Build(ctx context.Context, folder, ref string, args ...string) error {
	return b.ctl(ctx, append([]string{"build", "--progress", "plain", "--allow", "security.insecure", "--frontend", "dockerfile.v0",
		"--local", "context=" + folder, "--local", "dockerfile=" + folder,
		"--output", fmt.Sprintf("type=image,name=%s,push=true", ref)}, args...)...)
}

// Prune drops the cache, and the records of builds, which hold blobs too.
func (b *BuildKit) Prune(ctx context.Context) error {
	return errors.Join(b.ctl(ctx, "prune-histories"), b.ctl(ctx, "prune", "--all"))
}

func (b *BuildKit) ctl(ctx context.Context, args ...string) error {
	program, err := Program("buildctl")
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, append([]string{"--addr", b.address}, args...)...)
	cmd.Dir = filepath.Dir(program)
	_, err = output(cmd)
	return err
}

// Process returns the running buildkitd.
func (b *BuildKit) Process() *Process { return b.proc }

// Close stops buildkitd. What it built stays in containerd.
func (b *BuildKit) Close() error { return b.proc.Stop() }
