package layer

import (
	"encoding/binary"
	"math"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// POSIX ACLs as extended attributes: see linux/posix_acl_xattr.h. An access ACL
// and the mode change each other, and a default ACL changes what is created
// below it, so both are followed here as ext4 would.
const (
	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"

	aclUserObj  = 0x01
	aclUser     = 0x02
	aclGroupObj = 0x04
	aclGroup    = 0x08
	aclMask     = 0x10
	aclOther    = 0x20
)

type aclEntry struct {
	tag, perm uint16
	id        uint32
}

// parseACL returns nil for an ACL without entries, which stands for none.
func parseACL(value string) ([]aclEntry, error) {
	if value == "" {
		return nil, nil
	}
	raw := []byte(value)
	if len(raw) < 4 {
		return nil, unix.EINVAL
	}
	if binary.LittleEndian.Uint32(raw) != 2 {
		return nil, unix.ENOTSUP
	}
	if raw = raw[4:]; len(raw)%8 != 0 {
		return nil, unix.EINVAL
	}
	var acl []aclEntry
	for ; len(raw) > 0; raw = raw[8:] {
		e := aclEntry{binary.LittleEndian.Uint16(raw), binary.LittleEndian.Uint16(raw[2:]), binary.LittleEndian.Uint32(raw[4:])}
		switch e.tag {
		case aclUser, aclGroup:
			if e.id == math.MaxUint32 {
				return nil, unix.EINVAL
			}
		case aclUserObj, aclGroupObj, aclMask, aclOther:
			e.id = math.MaxUint32
		default:
			return nil, unix.EINVAL
		}
		acl = append(acl, e)
	}
	return acl, checkACL(acl)
}

// checkACL wants the entries in the kernel's order, and a mask where a user or
// a group is named.
func checkACL(acl []aclEntry) error {
	if len(acl) == 0 {
		return nil
	}
	var seen, last uint16
	for _, e := range acl {
		again := e.tag == last && (e.tag == aclUser || e.tag == aclGroup)
		if e.perm > 7 || e.tag < last || (e.tag == last && !again) {
			return unix.EINVAL
		}
		seen, last = seen|e.tag, e.tag
	}
	const all = aclUserObj | aclGroupObj | aclOther
	if seen&all != all || (seen&(aclUser|aclGroup) != 0 && seen&aclMask == 0) {
		return unix.EINVAL
	}
	return nil
}

func formatACL(acl []aclEntry) string {
	raw := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range acl {
		raw = binary.LittleEndian.AppendUint16(raw, e.tag)
		raw = binary.LittleEndian.AppendUint16(raw, e.perm)
		raw = binary.LittleEndian.AppendUint32(raw, e.id)
	}
	return string(raw)
}

// permEntries finds the entries that the mode bits stand for: the mask, where
// there is one, takes the group's place.
func permEntries(acl []aclEntry) (user, group, other *aclEntry) {
	for i := range acl {
		switch e := &acl[i]; e.tag {
		case aclUserObj:
			user = e
		case aclGroupObj, aclMask:
			group = e // the mask comes later in the order
		case aclOther:
			other = e
		}
	}
	return user, group, other
}

func aclMode(acl []aclEntry) uint32 {
	u, g, o := permEntries(acl)
	return uint32(u.perm)<<6 | uint32(g.perm)<<3 | uint32(o.perm)
}

// setACL is setxattr(2) of an ACL on ext4.
func (p *xattrPool) setACL(n *erofs.Inode, name, value string, grown *int) error {
	format := n.Mode & unix.S_IFMT
	if format == unix.S_IFLNK || (name != aclAccess && name != aclDefault) {
		return unix.ENOTSUP
	}
	acl, err := parseACL(value)
	if err != nil {
		return err
	}
	if name == aclDefault && format != unix.S_IFDIR {
		if acl == nil {
			return nil
		}
		return unix.EACCES
	}
	if acl != nil && name == aclAccess {
		n.Mode = n.Mode&^0o777 | aclMode(acl)
		if len(acl) == 3 {
			acl = nil // it says no more than the mode does
		}
	}
	if acl == nil {
		p.drop(n, name)
		return nil
	}
	*grown += p.set(n, name, formatACL(acl))
	return checkXattrs(n)
}

// chmod sets the permission bits, setuid, setgid and sticky included, and the
// access ACL with them.
func (p *xattrPool) chmod(n *erofs.Inode, mode uint32) {
	n.Mode = n.Mode&^0o7777 | mode
	value, ok := n.Xattrs[aclAccess]
	if !ok {
		return
	}
	acl, err := parseACL(value)
	if err != nil || acl == nil {
		return // never stored
	}
	u, g, o := permEntries(acl)
	u.perm, g.perm, o.perm = uint16(mode>>6&7), uint16(mode>>3&7), uint16(mode&7)
	p.set(n, aclAccess, formatACL(acl))
}

// inheritACL gives a new inode what the default ACL of its directory says.
func (p *xattrPool) inheritACL(dir, n *erofs.Inode) {
	value, ok := dir.Xattrs[aclDefault]
	if !ok || n.Mode&unix.S_IFMT == unix.S_IFLNK {
		return
	}
	if isDir(n) {
		p.set(n, aclDefault, value)
	}
	acl, err := parseACL(value)
	if err != nil || acl == nil {
		return // never stored
	}
	u, g, o := permEntries(acl)
	u.perm &= uint16(n.Mode >> 6 & 7)
	g.perm &= uint16(n.Mode >> 3 & 7)
	o.perm &= uint16(n.Mode & 7)
	n.Mode = n.Mode&^0o777 | aclMode(acl)
	if len(acl) > 3 {
		p.set(n, aclAccess, formatACL(acl))
	}
}
