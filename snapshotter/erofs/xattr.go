package erofs

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	maxXattrName  = 255
	maxXattrValue = 1<<16 - 1
)

// splitXattr cuts off the prefix that the format stores as a number. It knows
// the namespaces user, trusted and security and the two POSIX ACLs; Write fails
// for any other.
func splitXattr(name string) (index byte, suffix string, ok bool) {
	if len(name) > maxXattrName || strings.IndexByte(name, 0) >= 0 {
		return 0, "", false
	}
	switch name {
	case "system.posix_acl_access":
		return xattrIndexACLAccess, "", true
	case "system.posix_acl_default":
		return xattrIndexACLDefault, "", true
	}
	prefix, suffix, _ := strings.Cut(name, ".")
	switch prefix {
	case "user":
		index = xattrIndexUser
	case "trusted":
		index = xattrIndexTrusted
	case "security":
		index = xattrIndexSecurity
	}
	return index, suffix, index != 0 && suffix != ""
}

// xattrSize is the size in bytes of the xattr body behind an inode.
func xattrSize(xattrs map[string]string) (uint32, error) {
	if len(xattrs) == 0 {
		return 0, nil
	}
	size := xattrHeaderSize
	for name, value := range xattrs {
		_, suffix, ok := splitXattr(name)
		if !ok {
			return 0, fmt.Errorf("xattr %s cannot be stored: %w", quote(name), errdefs.ErrInvalidArgument)
		}
		if len(value) > maxXattrValue {
			return 0, fmt.Errorf("xattr %s has %d bytes, %d are possible: %w", quote(name), len(value), maxXattrValue, errdefs.ErrOutOfRange)
		}
		size += xattrEntrySize + align(len(suffix)+len(value), xattrEntrySize)
	}
	if size > maxXattrBody {
		return 0, fmt.Errorf("xattrs of %d bytes in all, %d are possible: %w", size, maxXattrBody, errdefs.ErrOutOfRange)
	}
	return uint32(size), nil
}

// xattrCount is i_xattr_icount for a body of size bytes.
func xattrCount(size uint32) uint16 {
	if size == 0 {
		return 0
	}
	return uint16((size-xattrHeaderSize)/xattrEntrySize + 1)
}

func writeXattrs(s *sink, xattrs map[string]string) {
	if len(xattrs) == 0 {
		return
	}
	names := make([]string, 0, len(xattrs))
	for name := range xattrs {
		names = append(names, name)
	}
	slices.Sort(names)
	s.next(xattrHeaderSize)
	for _, name := range names {
		index, suffix, _ := splitXattr(name)
		value := xattrs[name]
		putXattrEntry(s.next(xattrEntrySize), byte(len(suffix)), index, uint16(len(value)))
		s.writeString(suffix)
		s.writeString(value)
		s.align(xattrEntrySize)
	}
}
