// Helper is the one program in the images that the tests make: static, with
// the few commands a container test needs.
//
//	helper cat FILE...     print files
//	helper sum DIR         print one SHA-256 over all names and contents
//	helper check DIR SUM   exit with 3 if that is not SUM or cannot be read
//	helper watch DIR SUM   do that again and again, from the disk, until it fails
//	helper write FILE TEXT write a file
//	helper fill FILE BYTES write a file of so many random bytes
//	helper rm FILE         remove a file
//	helper owners DIR      print mode, owner, group, size and path of all below, but not of other file systems
//	helper sleep SECONDS   wait
package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		if os.Args[1] == "check" || os.Args[1] == "watch" {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: helper cat|sum|check|watch|write|fill|rm|owners|sleep and its arguments")
	}
	switch args[0] {
	case "cat":
		return cat(args[1:])
	case "sum":
		got, err := sum(args[1])
		if err == nil {
			_, err = fmt.Println(got)
		}
		return err
	case "check":
		return check(args[1], args[2])
	case "watch":
		for {
			if err := check(args[1], args[2]); err != nil {
				return err
			}
			time.Sleep(100 * time.Millisecond)
		}
	case "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
	case "fill":
		return fill(args[1], args[2])
	case "rm":
		return os.Remove(args[1])
	case "owners":
		return owners(args[1])
	case "sleep":
		seconds, err := strconv.Atoi(args[1])
		time.Sleep(time.Duration(seconds) * time.Second)
		return err
	}
	return fmt.Errorf("unknown command %q", args[0])
}

func cat(files []string) error {
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if _, err := os.Stdout.Write(data); err != nil {
			return err
		}
	}
	return nil
}

func fill(name, size string) error {
	n, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.CopyN(f, rand.Reader, n)
	return errors.Join(err, f.Sync(), f.Close())
}

func check(dir, want string) error {
	got, err := sum(dir)
	if err == nil && got != want {
		err = fmt.Errorf("%s is %s, want %s", dir, got, want)
	}
	return err
}

func sum(dir string) (string, error) {
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		fmt.Fprintln(h, path)
		_, err = io.Copy(h, f)
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // the next time is to be read from the disk
		return err
	})
	return hex.EncodeToString(h.Sum(nil)), err
}

func owners(dir string) error {
	var root syscall.Stat_t
	if err := syscall.Lstat(dir, &root); err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		var st syscall.Stat_t
		if err == nil {
			err = syscall.Lstat(path, &st)
		}
		if err != nil {
			return err
		}
		if d.IsDir() && st.Dev != root.Dev {
			return fs.SkipDir
		}
		if d.IsDir() {
			st.Size = 0
		}
		_, err = fmt.Printf("%o %d:%d %d %s\n", st.Mode, st.Uid, st.Gid, st.Size, path)
		return err
	})
}
