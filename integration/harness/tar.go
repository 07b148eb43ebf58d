package harness

import (
	"archive/tar"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// TarFunc writes the uncompressed tar of one layer.
type TarFunc func(w io.Writer) error

// Entry is one tar member: a header and its content. Size is filled in from Data when it is 0.
type Entry struct {
	tar.Header
	Data string
}

// Epoch is the modification time of generated entries that name none.
var Epoch = time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)

// Entries writes generated members, in the order given.
func Entries(entries ...Entry) TarFunc {
	return func(w io.Writer) error {
		tw := tar.NewWriter(w)
		for i := range entries {
			h := entries[i].Header
			if h.ModTime.IsZero() {
				h.ModTime = Epoch
			}
			if h.Size == 0 {
				h.Size = int64(len(entries[i].Data))
			}
			if err := tw.WriteHeader(&h); err != nil {
				return fmt.Errorf("tar entry %s: %w", h.Name, err)
			}
			if _, err := io.WriteString(tw, entries[i].Data); err != nil {
				return fmt.Errorf("tar entry %s: %w", h.Name, err)
			}
		}
		return tw.Close()
	}
}

// Concat writes several tars as one: the members of each, one after another.
func Concat(parts ...TarFunc) TarFunc {
	return func(w io.Writer) error {
		for _, part := range parts {
			if err := part(&unended{w: w}); err != nil {
				return err
			}
		}
		_, err := w.Write(make([]byte, tarEnd))
		return err
	}
}

// tarEnd is the size of what archive/tar's writer ends a tar with: two blocks of zeros.
const tarEnd = 1024

// unended holds the last bytes back, which end a tar.
type unended struct {
	w    io.Writer
	held []byte
}

func (u *unended) Write(p []byte) (int, error) {
	all := slices.Concat(u.held, p)
	pass := max(len(all)-tarEnd, 0)
	if _, err := u.w.Write(all[:pass]); err != nil {
		return 0, err
	}
	u.held = slices.Clone(all[pass:])
	return len(p), nil
}

// File is a regular file of root's with mode 0644.
func File(name, data string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, Data: data}
}

// Folder is a directory of root's with the mode given.
func Folder(name string, mode int64) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: mode}}
}

// Symlink is a symbolic link.
func Symlink(name, target string) Entry {
	return Entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

// Noise writes files of half compressible content, together size bytes, the same for the same seed.
func Noise(prefix string, seed uint64, size int64, files int) TarFunc {
	return generated(prefix, seed, size, files, noise)
}

// Random writes files that nothing compresses, as those are that were compressed before: models, archives, disks of
// virtual machines. Together size bytes, the same for the same seed.
func Random(prefix string, seed uint64, size int64, files int) TarFunc {
	return generated(prefix, seed, size, files, random)
}

// Text writes files of words, which gzip makes about two fifths of. Together size bytes, the same for the same seed.
func Text(prefix string, seed uint64, size int64, files int) TarFunc {
	return generated(prefix, seed, size, files, text)
}

func generated(prefix string, seed uint64, size int64, files int, fill func(io.Writer, *rand.Rand, int64) error) TarFunc {
	return func(w io.Writer) error {
		tw := tar.NewWriter(w)
		src := rand.New(rand.NewPCG(seed, seed))
		for i := range files {
			h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("%s/%03d", prefix, i), Mode: 0o644, Size: size / int64(files), ModTime: Epoch}
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			if err := fill(tw, src, h.Size); err != nil {
				return err
			}
		}
		return tw.Close()
	}
}

// noise writes n bytes of which each has 6 random bits: gzip makes about three quarters of them.
func noise(w io.Writer, src *rand.Rand, n int64) error {
	buf := make([]byte, 64<<10)
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		for i := range part {
			if i%8 == 0 {
				v := src.Uint64()
				for j := i; j < min(i+8, len(part)); j, v = j+1, v>>8 {
					part[j] = byte(v & 0x3f)
				}
			}
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	return nil
}

// random writes n random bytes.
func random(w io.Writer, src *rand.Rand, n int64) error {
	buf := make([]byte, 64<<10)
	for n > 0 {
		part := buf[:min(n, int64(len(buf)))]
		for i := 0; i < len(buf); i += 8 {
			binary.LittleEndian.PutUint64(buf[i:], src.Uint64())
		}
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	return nil
}

// text writes n bytes of words. They are taken from pages made beforehand, too far apart for gzip's window to see
// them twice.
func text(w io.Writer, src *rand.Rand, n int64) error {
	const letters = "etaoinshrdlucmfwypvbgkqjxz"
	words := make([]string, 1<<12)
	for i := range words {
		word := make([]byte, 3+src.IntN(9), 12)
		for j := range word {
			word[j] = letters[src.IntN(len(letters))]
		}
		words[i] = string(append(word, ' '))
	}
	pages := make([]byte, 0, 4<<20+16)
	for len(pages) < 4<<20 {
		pages = append(pages, words[src.IntN(len(words))]...)
	}
	for n > 0 {
		at := src.IntN(len(pages) - 64<<10)
		part := pages[at : at+int(min(n, 64<<10))]
		if _, err := w.Write(part); err != nil {
			return err
		}
		n -= int64(len(part))
	}
	return nil
}

// Tree writes what lies in the folder root, below prefix in the layer; keep
// chooses by the path relative to root, "." excepted, and a folder that is not
// kept is not entered. Owner and group become 0.
func Tree(root, prefix string, keep func(rel string) bool) TarFunc {
	return func(w io.Writer) error {
		tw := tar.NewWriter(w)
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(root, path)
			if err != nil {
				return err
			}
			if rel != "." && keep != nil && !keep(rel) {
				if d.IsDir() {
					return filepath.SkipDir
				}
				return nil
			}
			return addFile(tw, path, filepath.Join(prefix, rel))
		})
		if err != nil {
			return fmt.Errorf("tar of %s: %w", root, err)
		}
		return tw.Close()
	}
}

func addFile(tw *tar.Writer, path, name string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return err
	}
	var link string
	if info.Mode()&fs.ModeSymlink != 0 {
		if link, err = os.Readlink(path); err != nil {
			return err
		}
	}
	h, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	h.Name, h.Uid, h.Gid, h.Uname, h.Gname = name, 0, 0, "", ""
	h.AccessTime, h.ChangeTime, h.ModTime = time.Time{}, time.Time{}, h.ModTime.Truncate(time.Second)
	if info.IsDir() {
		h.Name += "/"
	}
	if err := tw.WriteHeader(h); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(tw, f)
	return err
}
