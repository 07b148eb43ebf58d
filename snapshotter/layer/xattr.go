package layer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

const (
	xattrRecord     = "SCHILY.xattr." // how PAX records name extended attributes
	capabilityXattr = "security.capability"

	// What EROFS can hold: 16 bits of length for a value, and 16 bits of
	// 4-byte units for all attributes of an inode.
	maxXattrValue = 1<<16 - 1
	maxXattrsSize = 4 * (1<<16 - 256)

	maxPooled = 1 << 16
)

// xattrPool sets extended attributes and shares equal sets between inodes: in
// a layer built under SELinux a million files have the same label, and a map of
// one costs more than the rest of the inode. A set is never changed in place.
type xattrPool struct {
	sets  map[string]map[string]string
	known map[string]map[string]string // what records made of an inode without attributes
	key   []byte                       // room for a key of known
	names []string                     // and for its names
}

// apply sets the attributes of a member's PAX records by containerd's rules,
// and reports how many bytes more are kept.
func (p *xattrPool) apply(n *erofs.Inode, records map[string]string) (int, error) {
	if len(records) == 0 {
		return 0, nil
	}
	simple := p.setKey(n, records)
	if set, ok := p.known[string(p.key)]; ok && simple {
		n.Xattrs = set
		return 0, nil
	}
	grown, err := p.applyAll(n, records)
	if err != nil || !simple || len(p.known) >= maxPooled {
		return grown, err
	}
	if p.known == nil {
		p.known = make(map[string]map[string]string)
	}
	p.known[string(p.key)] = n.Xattrs
	return grown + len(p.key) + 64, nil
}

// setKey puts the type of the inode and its records in order into key. It reports
// false where the records alone do not decide what becomes of the inode, or are too many to keep.
func (p *xattrPool) setKey(n *erofs.Inode, records map[string]string) bool {
	p.key, p.names = p.key[:0], p.names[:0]
	if n.Xattrs != nil {
		return false
	}
	size := 0
	for record, value := range records {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok {
			continue
		}
		if size += len(record) + len(value); size > 1024 || strings.HasPrefix(name, "system.") {
			return false // ACLs change the mode too
		}
		p.names = append(p.names, record)
	}
	slices.Sort(p.names)
	p.key = binary.BigEndian.AppendUint32(p.key, n.Mode&unix.S_IFMT)
	for _, record := range p.names {
		p.key = append(append(p.key, record...), 0)
		p.key = binary.BigEndian.AppendUint32(p.key, uint32(len(records[record])))
		p.key = append(p.key, records[record]...)
	}
	return true
}

func (p *xattrPool) applyAll(n *erofs.Inode, records map[string]string) (int, error) {
	grown := 0
	for record, value := range records {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok {
			continue
		}
		err := p.setOne(n, name, value, &grown)
		if errors.Is(err, unix.ENOTSUP) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("extended attribute %.300q of %d bytes: %w", name, len(value), err)
		}
	}
	return grown, nil
}

// setOne does what lsetxattr(2) does on ext4 for root; ENOTSUP is for what
// containerd passes over.
func (p *xattrPool) setOne(n *erofs.Inode, name, value string, grown *int) error {
	space, _, _ := strings.Cut(name, ".")
	format := n.Mode & unix.S_IFMT
	switch {
	case strings.HasPrefix(name, "trusted."):
		return unix.ENOTSUP // an image must not set overlay's marks
	case name == "" || len(name) > nameMax:
		return unix.ERANGE
	case len(value) > maxXattrValue:
		return unix.E2BIG
	case strings.HasPrefix(name, "system.posix_acl_"):
		return p.setACL(n, name, value, grown)
	case space != "user" && space != "security" || space == name:
		return unix.ENOTSUP
	case name == space+".":
		return unix.EINVAL
	case space == "user" && format != unix.S_IFREG && format != unix.S_IFDIR:
		return unix.ENOTSUP // EPERM, which containerd passes over here as well
	case name == capabilityXattr && value != "" && !validCapability(value):
		return unix.EINVAL
	}
	*grown += p.set(n, strings.Clone(name), strings.Clone(value)) // the header's text holds both
	return checkXattrs(n)
}

// checkXattrs refuses more than an EROFS inode has room for.
func checkXattrs(n *erofs.Inode) error {
	size := 0
	for name, value := range n.Xattrs {
		size += len(name) + len(value) + 8
	}
	if size > maxXattrsSize {
		return unix.ENOSPC
	}
	return nil
}

// validCapability knows the versions 2 and 3 of struct vfs_cap_data.
func validCapability(value string) bool {
	if len(value) < 4 {
		return false
	}
	switch binary.LittleEndian.Uint32([]byte(value)) & 0xff000000 {
	case 0x02000000:
		return len(value) == 20
	case 0x03000000:
		return len(value) == 24
	}
	return false
}

// set gives n the attribute and returns the bytes that are kept for it.
func (p *xattrPool) set(n *erofs.Inode, name, value string) int {
	next := maps.Clone(n.Xattrs)
	if next == nil {
		next = make(map[string]string, 1)
	}
	next[name] = value
	return p.share(n, next)
}

func (p *xattrPool) drop(n *erofs.Inode, name string) {
	if _, ok := n.Xattrs[name]; !ok {
		return
	}
	next := maps.Clone(n.Xattrs)
	delete(next, name)
	p.share(n, next)
}

func (p *xattrPool) share(n *erofs.Inode, set map[string]string) int {
	if len(set) == 0 {
		n.Xattrs = nil
		return 0
	}
	var key strings.Builder
	for _, name := range slices.Sorted(maps.Keys(set)) {
		fmt.Fprintf(&key, "%s\x00%d\x00%s", name, len(set[name]), set[name])
	}
	if known := p.sets[key.String()]; known != nil {
		n.Xattrs = known
		return 0
	}
	if p.sets == nil {
		p.sets = make(map[string]map[string]string)
	}
	if len(p.sets) < maxPooled && key.Len() < 1024 {
		p.sets[key.String()] = set
	}
	n.Xattrs = set
	return 2*key.Len() + 400
}
