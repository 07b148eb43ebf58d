// Helper is the one program in the images that the tests make: static, with
// the few commands a container test needs.
//
//	helper cat FILE...     print files
//	helper sum DIR         print one SHA-256 over all names and contents
//	helper write FILE TEXT write a file
//	helper fill FILE BYTES write a file of so many random bytes
//	helper rm FILE         remove a file
//	helper sleep SECONDS   wait
package main

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: helper cat|sum|write|fill|rm|sleep and its arguments")
	}
	switch args[0] {
	case "cat":
		return cat(args[1:])
	case "sum":
		return sum(args[1])
	case "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
	case "fill":
		return fill(args[1], args[2])
	case "rm":
		return os.Remove(args[1])
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

func sum(dir string) error {
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
		return err
	})
	if err != nil {
		return err
	}
	_, err = fmt.Printf("%x\n", h.Sum(nil))
	return err
}
