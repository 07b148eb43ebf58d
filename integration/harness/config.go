package harness

import (
	"bytes"
	"fmt"
	"strings"
	"text/template"
)

// containerdConfig keeps every path inside the node's folder. What no test
// needs is off: it would look for files, sockets or cgroups outside.
var containerdConfig = template.Must(template.New("containerd").Parse(`version = 3
root = '{{.Dir}}/containerd'
state = '{{.Dir}}/run'
temp = '{{.Dir}}/tmp'
{{if .DropIn}}imports = ['{{.DropIn}}']
{{end}}disabled_plugins = [
{{- if not .CRI}}
  'io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.images', 'io.containerd.cri.v1.runtime',
  'io.containerd.podsandbox.controller.v1.podsandbox', 'io.containerd.sandbox.controller.v1.shim',
{{- end}}
  'io.containerd.nri.v1.nri', 'io.containerd.monitor.task.v1.cgroups',
{{- if ne .Line "2.2"}}
  'io.containerd.image-verifier.v1.bindir', {{/* 2.2 does not do without */}}
{{- end}}
  'io.containerd.tracing.processor.v1.otlp', 'io.containerd.internal.v1.tracing',
  'io.containerd.snapshotter.v1.blockfile', 'io.containerd.snapshotter.v1.btrfs', 'io.containerd.snapshotter.v1.devmapper',
  'io.containerd.snapshotter.v1.zfs',
{{- if not .Erofs}}
  'io.containerd.snapshotter.v1.erofs', 'io.containerd.differ.v1.erofs', 'io.containerd.mount-handler.v1.erofs',
{{- end}}
]

[debug]
level = 'debug'

{{/* before 2.3 the servers are no plugins */ -}}
{{if eq .Line "2.2"}}[grpc]
address = '{{.Dir}}/c.sock'

[ttrpc]
address = '{{.Dir}}/c.ttrpc'

[plugins.'io.containerd.image-verifier.v1.bindir']
bin_dir = '{{.Dir}}/verifiers'
{{else}}[plugins.'io.containerd.server.v1.grpc']
address = '{{.Dir}}/c.sock'

[plugins.'io.containerd.server.v1.ttrpc']
address = '{{.Dir}}/c.ttrpc'
{{end}}
[plugins.'io.containerd.metadata.v1.bolt']
{{if .NoSync}}no_sync = true
{{end}}{{if .Isolated}}content_sharing_policy = 'isolated'
{{end}}
[plugins.'io.containerd.internal.v1.opt']
path = '{{.Dir}}/opt'

[plugins.'io.containerd.shim.v1.manager']
socket_dir = '{{.Dir}}/s'

[plugins.'io.containerd.gc.v1.scheduler']
schedule_delay = '{{.GCDelay}}'
startup_delay = '10ms'
{{if .CRI}}
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = '{{.Dir}}/certs.d'

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
disable_apparmor = true
netns_mounts_under_state_dir = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
conf_dir = '{{.Dir}}/cni'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
Root = '{{.Dir}}/runc'
{{if .Runc}}BinaryName = '{{.Runc}}'
{{end}}{{end}}
{{.Extra}}`))

// gantrydConfig is the same for gantryd, with the keys of gantry's own plugin/config.
var gantrydConfig = template.Must(template.New("gantryd").Parse(`root = '{{.Dir}}/gantry'
state = '{{.Dir}}/gantry-run'
address = '{{.Dir}}/g.sock'

[log]
level = 'debug'

[containerd]
address = '{{.Dir}}/c.sock'
{{if .Isolated}}content_sharing_policy = 'isolated'
{{end}}{{.ContainerdKeys}}
[registry]
config_path = '{{.Dir}}/certs.d'
credentials = '{{.Dir}}/docker.json'
{{.Extra}}`))

type containerdValues struct {
	Dir, DropIn, GCDelay, Line, Runc, Extra string
	CRI, Erofs, NoSync, Isolated            bool
}

type gantrydValues struct {
	Dir, ContainerdKeys, Extra string
	Isolated                   bool
}

func render(t *template.Template, values any) ([]byte, error) {
	var b bytes.Buffer
	if err := t.Execute(&b, values); err != nil {
		return nil, fmt.Errorf("configuration of %s: %w", t.Name(), err)
	}
	return b.Bytes(), nil
}

// hostsTOML tells a client that host is the server itself, asked over scheme,
// by way of mirrors first where there are some.
func hostsTOML(scheme, host string, mirrors []string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "server = \"%s://%s\"\n", scheme, host)
	for _, m := range mirrors {
		fmt.Fprintf(&b, "\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", m)
	}
	return []byte(b.String())
}
