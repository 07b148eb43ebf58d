package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// readAhead is what the kernel reads ahead in a layer, in KiB. It begins with 128 for a mount from files, whatever the disk is
// set to, and with what the disk has for a directory, 8192 here. Seconds for 1 GB in one file with an empty page cache, from its
// begin to its end, and 40,000 of its pages in random order through mmap; 128 to 4096 are a layer's, ext4 is the file itself
// (Linux 6.18, medians of two to five):
//
//	            128    1024   2048   4096   8192   ext4
//	from begin  0.86   0.50   2.08   0.50   2.75   0.77
//	random      1.79   1.24   1.13   0.97   1.00   1.16
//
// Above 1024 the layer's read-ahead and that of the file below it hinder each other at times. 15,000 small files take the same
// with 128 and 1024, 0.6 s. With the option directio, which saves the second copy of the bytes in the page cache, and 8192 large
// files are as fast as ext4's; small ones take 1.8 s, and what a pull has just written is read from the disk.
const readAhead = 1024

// bdiClass is where the kernel shows the settings of what it reads from, mounts from files among it (sysfs-class-bdi).
const bdiClass = "/sys/class/bdi"

// mountReadingAhead calls mount, which mounts a layer from files, and sets the mount's read-ahead. The kernel names the setting
// erofs-NUMBER and does not say whose it is: ours is new. If another process mounts EROFS from files at that very moment, that gets
// the same. Nothing but speed depends on it: where it cannot be set, in a container whose sysfs is read-only for one, the mount
// stays as it is.
func mountReadingAhead(mount func() error) error {
	before, unknown := mountedFromFiles()
	if err := mount(); err != nil {
		return err
	}
	after, err := mountedFromFiles()
	if errors.Join(unknown, err) != nil {
		return nil //nolint:nilerr // as said above
	}
	for name := range after {
		if !before[name] {
			_ = raise(filepath.Join(bdiClass, name, "read_ahead_kb"))
		}
	}
	return nil
}

// mountedFromFiles lists the kernel's settings of EROFS mounts from files. Those of another kind, and those of other file systems,
// have other names.
func mountedFromFiles() (map[string]bool, error) {
	d, err := os.Open(bdiClass)
	if err != nil {
		return nil, err
	}
	names, err := d.Readdirnames(-1)
	found := map[string]bool{}
	for _, name := range names {
		if strings.HasPrefix(name, "erofs-") {
			found[name] = true
		}
	}
	return found, errors.Join(err, d.Close())
}

// raise sets a read-ahead that is less than ours.
func raise(name string) error {
	was, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	kib, err := strconv.Atoi(strings.TrimSpace(string(was)))
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if kib >= readAhead {
		return nil
	}
	return os.WriteFile(name, []byte(strconv.Itoa(readAhead)), 0)
}
