package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// kubeletConfig is for a kubelet without an API server. It changes nothing of the
// host that it need not: no iptables, no cgroups but those of its pods.
const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: %[1]s/manifests
podLogsDir: %[1]s/pods
containerRuntimeEndpoint: unix://%[2]s
address: 127.0.0.1
port: %[3]d
readOnlyPort: %[4]d
healthzPort: 0
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
failCgroupV1: false
failSwapOn: false
cgroupsPerQOS: false
enforceNodeAllocatable: []
cgroupDriver: cgroupfs
makeIPTablesUtilChains: false
resolvConf: ""
fileCheckFrequency: 1s
syncFrequency: 2s
volumeStatsAggPeriod: 0s
imageMinimumGCAge: 1ms
%[5]s
`

// tunables are what every kubelet sets for itself in /proc/sys.
var tunables = []string{
	"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
}

// Kubelet is a standalone kubelet that runs the pods of a folder of manifests.
type Kubelet struct {
	*Process

	dir     string
	api     string // its read-only port
	restore map[string][]byte
}

// StartKubelet starts a kubelet for the node's CRI. settings are lines of YAML
// after its configuration. Started again, it finds its pods. The caller stops it.
func (n *Node) StartKubelet(ctx context.Context, settings string) (_ *Kubelet, err error) {
	program, err := Program("kubelet")
	if err != nil {
		return nil, err
	}
	k := &Kubelet{dir: n.path("kubelet"), restore: map[string][]byte{}}
	for _, d := range []string{"manifests", "root", "pods"} {
		if err := os.MkdirAll(filepath.Join(k.dir, d), 0o700); err != nil {
			return nil, err
		}
	}
	ports, err := freePorts(ctx, 2)
	if err != nil {
		return nil, err
	}
	k.api = fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	config := fmt.Sprintf(kubeletConfig, k.dir, n.Address(), ports[0], ports[1], settings)
	if err := os.WriteFile(filepath.Join(k.dir, "config.yaml"), []byte(config), 0o600); err != nil {
		return nil, err
	}
	for _, name := range tunables {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			return nil, err
		}
		k.restore[name] = value
	}
	k.Process, err = start(ctx, n.path("logs"), "kubelet", nil, program, "--config", filepath.Join(k.dir, "config.yaml"),
		"--root-dir", filepath.Join(k.dir, "root"), "--cert-dir", filepath.Join(k.dir, "pki"), "--hostname-override", "gantry", "-v", "3")
	if err != nil {
		return nil, err
	}
	err = k.ready(ctx, func(ctx context.Context) error { _, err := k.Pods(ctx); return err })
	if err != nil {
		k.Kill()
		return nil, errors.Join(err, k.undo())
	}
	return k, nil
}

// Stop ends the kubelet; its pods run on.
func (k *Kubelet) Stop() error { return errors.Join(k.Process.Stop(), k.undo()) }

// undo gives the host's tunables back, and takes away the mount that a kubelet
// makes of its folder onto itself.
func (k *Kubelet) undo() error {
	var errs []error
	if err := unix.Unmount(filepath.Join(k.dir, "root"), 0); err != nil && !errors.Is(err, unix.EINVAL) {
		errs = append(errs, fmt.Errorf("unmount the kubelet's folder: %w", err))
	}
	for name, value := range k.restore {
		path := filepath.Join("/proc/sys", name)
		if now, err := os.ReadFile(path); err == nil && bytes.Equal(now, value) {
			continue
		}
		errs = append(errs, os.WriteFile(path, bytes.TrimSpace(value), 0o600))
	}
	return errors.Join(errs...)
}

// freePorts returns ports of the loopback that nobody listened at a moment ago.
func freePorts(ctx context.Context, n int) (ports []int, err error) {
	for range n {
		var c net.ListenConfig
		l, err := c.Listen(ctx, "tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		addr, ok := l.Addr().(*net.TCPAddr)
		if !ok {
			return nil, fmt.Errorf("listening at %s", l.Addr())
		}
		ports = append(ports, addr.Port)
	}
	return ports, nil
}

// RunPod writes the manifest of a pod of one container in the host's network.
// It is removed with [Kubelet.RemovePod].
func (k *Kubelet) RunPod(name, image, pullPolicy string, command ...string) error {
	quoted, err := json.Marshal(command)
	if err != nil {
		return err
	}
	manifest := fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: default}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: %q, imagePullPolicy: %s, command: %s}
`, name, image, pullPolicy, quoted)
	// Renamed into place: the kubelet reads what it sees.
	hidden := filepath.Join(k.dir, name+".yaml")
	if err := os.WriteFile(hidden, []byte(manifest), 0o600); err != nil {
		return err
	}
	return os.Rename(hidden, k.manifest(name))
}

// RemovePod has the kubelet end a pod.
func (k *Kubelet) RemovePod(name string) error {
	if err := os.Remove(k.manifest(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (k *Kubelet) manifest(name string) string {
	return filepath.Join(k.dir, "manifests", name+".yaml")
}

// PodState is what the kubelet says of a pod's container.
type PodState struct {
	Running         bool
	Reason, Message string // why it waits
	Restarts        int
	ContainerID     string
}

// Pods asks the kubelet for its pods by the names of their manifests.
func (k *Kubelet) Pods(ctx context.Context) (_ map[string]PodState, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.api+"/pods", nil)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("kubelet's pods: %s", resp.Status)
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct {
				ContainerStatuses []struct {
					ContainerID  string
					RestartCount int
					State        struct {
						Waiting *struct{ Reason, Message string }
						Running *struct{ StartedAt string }
					}
				}
			}
		}
	}
	if err := json.NewDecoder(resp.Body).Decode(&list); err != nil {
		return nil, fmt.Errorf("kubelet's pods: %w", err)
	}
	pods := map[string]PodState{}
	for _, item := range list.Items {
		var state PodState
		for _, c := range item.Status.ContainerStatuses {
			state = PodState{Running: c.State.Running != nil, Restarts: c.RestartCount}
			_, state.ContainerID, _ = strings.Cut(c.ContainerID, "://")
			if w := c.State.Waiting; w != nil {
				state.Reason, state.Message = w.Reason, w.Message
			}
		}
		pods[strings.TrimSuffix(item.Metadata.Name, "-gantry")] = state
	}
	return pods, nil
}
