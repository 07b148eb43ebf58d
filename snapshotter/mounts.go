package snapshotter

import (
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// view is all that the mounts of a snapshot depend on.
type view struct {
	kind    snapshots.Kind
	upper   string
	work    string
	lowers  []string // nearest first
	ids     *idMap   // nil: as the host sees them
	empty   string   // a directory without entries
	options []string // of every overlay
}

// mounts turns a chain into what containerd mounts. Only a view is ever
// read-only: containerd takes a read-only last mount of an unpack for a layer
// that needs no Apply, and then never fetches its blob.
//
// The options of an overlay must fit in a page. Where they do not, containerd
// changes to the lowers' common folder and passes relative paths; that is why
// lowers have short names (mnt/<id>).
func (v view) mounts() []mount.Mount {
	active := v.kind == snapshots.KindActive
	mapped := v.ids.options()
	lowers := v.lowers
	switch {
	case len(v.lowers) == 0 && active:
		return bind(v.upper, "rw")
	case len(v.lowers) == 0:
		return bind(v.upper, "ro")
	case len(v.lowers) == 1 && !active && mapped == nil:
		return bind(v.lowers[0], "ro")
	case len(v.lowers) == 1 && !active:
		// containerd maps no bind that is read-only, and overlay wants two.
		lowers = []string{v.lowers[0], v.empty}
	}
	options := mapped
	if active {
		options = append(options, "workdir="+v.work, "upperdir="+v.upper)
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	options = append(options, v.options...)
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
}

func bind(source, access string) []mount.Mount {
	return []mount.Mount{{Type: "bind", Source: source, Options: []string{access, "rbind"}}}
}
