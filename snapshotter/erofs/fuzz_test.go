package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// script draws a tree from fuzzed bytes; when they run out, zeros follow.
type script struct {
	data   []byte
	layer  []byte
	inodes []*Inode
}

func (s *script) byte() byte {
	if len(s.data) == 0 {
		return 0
	}
	b := s.data[0]
	s.data = s.data[1:]
	return b
}

func (s *script) number(n int64) int64 {
	if n <= 0 {
		return 0
	}
	return (int64(s.byte())<<16 | int64(s.byte())<<8 | int64(s.byte())) % n
}

func (s *script) text(n int) string {
	n = min(n, len(s.data))
	t := string(s.data[:n])
	s.data = s.data[n:]
	return t
}

func (s *script) inode() *Inode {
	types := []uint32{unix.S_IFREG, unix.S_IFREG, unix.S_IFREG, unix.S_IFLNK, unix.S_IFCHR, unix.S_IFBLK, unix.S_IFIFO, unix.S_IFSOCK}
	in := &Inode{Mode: types[s.byte()%8] | uint32(s.number(0o10000))}
	if s.byte()%2 == 1 {
		in.Mtime, in.MtimeNsec = s.number(1<<24)<<8, uint32(s.number(1e9))
		in.UID, in.GID = uint32(s.number(1<<24)), uint32(s.byte())<<24
	}
	switch in.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		s.extents(in)
	case unix.S_IFLNK:
		in.Target = "t" + string(bytes.Repeat([]byte(s.text(3)), int(s.byte())))
	case unix.S_IFCHR, unix.S_IFBLK:
		in.Rdev = unix.Mkdev(uint32(s.byte())<<4, uint32(s.number(1<<20)))
	}
	s.xattrs(in)
	return in
}

// pad is right for most files, as in a tar.
func (s *script) pad(in *Inode) {
	if s.byte()%8 == 0 {
		return
	}
	for _, e := range in.Data {
		if e.DevOff < 0 || e.Len < 0 || e.DevOff > int64(len(s.layer))-e.Len {
			return
		}
	}
	pad(in, s.layer)
}

// extents draws a file with pieces that are on the block grid, or not, or (rarely) impossible.
func (s *script) extents(in *Inode) {
	off := int64(0)
	for range s.byte() % 6 {
		e := Extent{Off: off, Len: s.number(5000), DevOff: s.number(int64(len(s.layer)) + 2)}
		if s.byte()%4 != 0 {
			e.DevOff &^= 511
		}
		e.Len = min(e.Len, int64(len(s.layer))-e.DevOff)
		if s.byte()%3 == 0 {
			e.Off += s.number(3000)
		}
		off = e.Off + e.Len
		if s.byte()%3 == 0 {
			off = align(off, 512)
		}
		in.Data = append(in.Data, e)
	}
	in.Size = off
	if n := len(in.Data); n > 0 && s.byte()%2 == 0 {
		in.Size = in.Data[n-1].Off + in.Data[n-1].Len
	} else {
		in.Size += s.number(100_000) * int64(s.byte()%2)
	}
	s.pad(in)
}

func (s *script) xattrs(in *Inode) {
	for range s.byte() % 8 / 5 * (s.byte() % 4) {
		if in.Xattrs == nil {
			in.Xattrs = map[string]string{}
		}
		prefix := []string{"user.", "trusted.", "security.", "system.posix_acl_access", "odd."}[s.byte()%32/7]
		if prefix != "system.posix_acl_access" {
			prefix += "n" + s.text(int(s.byte()%16))
		}
		in.Xattrs[prefix] = string(bytes.Repeat([]byte(s.text(1)), int(s.number(2000))))
	}
}

func (s *script) tree() *Inode {
	root := &Inode{Mode: unix.S_IFDIR | 0o755}
	s.xattrs(root)
	dirs := []*Inode{root}
	for i := 0; len(s.data) > 0; i++ {
		d := dirs[s.number(int64(len(dirs)))]
		name := fmt.Sprintf("%s%d", bytes.Repeat([]byte(s.text(1)), int(s.byte()%64)), i)
		if s.byte()%16 == 0 {
			name = s.text(int(s.byte()))
		}
		var in *Inode
		switch k := s.byte() % 8; {
		case k < 2:
			in = &Inode{Mode: unix.S_IFDIR | uint32(s.byte())}
			s.xattrs(in)
			dirs = append(dirs, in)
		case k < 3 && len(s.inodes) > 0:
			in = s.inodes[s.number(int64(len(s.inodes)))]
			in.Shared = true
		default:
			in = s.inode()
			s.inodes = append(s.inodes, in)
		}
		d.Children = append(d.Children, Dirent{name, in})
	}
	return root
}

// FuzzWrite: a tree is either refused with a classified error or read back as it was.
func FuzzWrite(f *testing.F) {
	f.Add([]byte{}, uint16(0))
	for i := range 40 {
		f.Add(layerFile(200 + i*97)[i:], uint16(i*1021))
	}
	f.Fuzz(func(t *testing.T, data []byte, layerSize uint16) {
		if len(data) > 1<<14 {
			return
		}
		layer := layerFile(int(layerSize))
		root := (&script{data: data, layer: layer}).tree()
		var b, again bytes.Buffer
		err := Write(&b, root, device1(layer))
		if err != nil {
			if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errdefs.ErrOutOfRange) {
				t.Fatalf("error of no class: %v", err)
			}
			return
		}
		if err := Verify(bytes.NewReader(b.Bytes()), int64(b.Len())); err != nil {
			t.Fatal(err)
		}
		if err := Write(&again, root, device1(layer)); err != nil || !bytes.Equal(b.Bytes(), again.Bytes()) {
			t.Fatalf("the second image differs from the first: %v", err)
		}
		compareReader(t, b.Bytes(), root, layer)
	})
}
