package config

import (
	"bytes"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/pelletier/go-toml/v2"
)

// dropInFile is the part of containerd's own configuration that the drop-in
// uses. The names of the keys are containerd 2.4.2's: cmd/containerd/server/config,
// plugins/transfer, plugins/services/diff, plugins/metadata, internal/cri/config.
type dropInFile struct {
	Version         int                    `toml:"version"`
	DisabledPlugins []string               `toml:"disabled_plugins"`
	ProxyPlugins    map[string]proxyPlugin `toml:"proxy_plugins"`
	Plugins         struct {
		Diff struct {
			Order []string `toml:"default"`
		} `toml:"io.containerd.service.v1.diff-service"`
		Transfer struct {
			Unpacks int            `toml:"max_concurrent_unpacks"`
			Unpack  []unpackConfig `toml:"unpack_config"`
		} `toml:"io.containerd.transfer.v1.local"`
		Images struct {
			Snapshotter string `toml:"snapshotter"`
		} `toml:"io.containerd.cri.v1.images"`
		Metadata struct {
			Policy string `toml:"content_sharing_policy"`
		} `toml:"io.containerd.metadata.v1.bolt"`
	} `toml:"plugins"`
}

type proxyPlugin struct {
	Type         string            `toml:"type"`
	Address      string            `toml:"address"`
	Exports      map[string]string `toml:"exports"`
	Capabilities []string          `toml:"capabilities"`
}

type unpackConfig struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
	Differ      string `toml:"differ"`
	Optional    bool   `toml:"optional"`
}

func TestWriteContainerd(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		text    string
		address string
		root    string
		policy  string
		unpacks int // 0: by the number of CPUs
		ids     error
	}{
		"defaults":   {"", "/run/gantry/gantry.sock", "/var/lib/gantry", "", 0, nil},
		"old kernel": {"", "/run/gantry/gantry.sock", "/var/lib/gantry", "", 0, errors.New("mount\nfails")},
		"changed": {"root = '/data/\"odd\" name'\naddress = '/g.sock'\nunpack.workers = 12\ncontainerd.content_sharing_policy = 'isolated'\n",
			"/g.sock", `/data/"odd" name`, "isolated", 12, nil},
		"few workers": {"unpack.workers = 1\n", "/run/gantry/gantry.sock", "/var/lib/gantry", "", leastUnpacks, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := Load(write(t, tc.text))
			if err != nil {
				t.Fatal(err)
			}
			var b bytes.Buffer
			if err := c.WriteContainerd(&b, tc.ids); err != nil {
				t.Fatal(err)
			}
			var got dropInFile
			if err := toml.NewDecoder(bytes.NewReader(b.Bytes())).DisallowUnknownFields().Decode(&got); err != nil {
				t.Fatalf("%v\n%s", err, b.String())
			}
			if got.Plugins.Transfer.Unpacks < leastUnpacks || (tc.unpacks != 0 && got.Plugins.Transfer.Unpacks != tc.unpacks) {
				t.Errorf("max_concurrent_unpacks = %d", got.Plugins.Transfer.Unpacks)
			}
			capabilities, hints := []string{"rebase", "remap-ids"}, []string{"Switch on:", "Switch off:", c.Content.Root}
			if tc.ids != nil {
				capabilities, hints = []string{"rebase"}, append(hints, "cannot be id-mapped here: mount fails")
			}
			want := dropInFile{
				Version:         3,
				DisabledPlugins: []string{"io.containerd.content.v1.content"},
				ProxyPlugins: map[string]proxyPlugin{
					"gantry": {Type: "snapshot", Address: tc.address, Capabilities: capabilities,
						Exports: map[string]string{"root": tc.root, "enable_remote_snapshot_annotations": "true"}},
					"gantry-content": {Type: "content", Address: tc.address},
					"gantry-diff":    {Type: "diff", Address: tc.address},
				},
			}
			platform := platforms.Format(platforms.DefaultSpec())
			want.Plugins.Diff.Order = []string{"gantry-diff", "walking"}
			want.Plugins.Transfer.Unpacks = got.Plugins.Transfer.Unpacks
			want.Plugins.Transfer.Unpack = []unpackConfig{
				{Platform: platform, Snapshotter: "gantry", Differ: "gantry-diff"},
				{Platform: platform, Snapshotter: "overlayfs", Differ: "walking", Optional: true},
			}
			want.Plugins.Images.Snapshotter = "gantry"
			want.Plugins.Metadata.Policy = tc.policy
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
			for _, hint := range hints {
				if !strings.Contains(b.String(), hint) {
					t.Errorf("the comments lack %q", hint)
				}
			}
		})
	}
}
