// Helper is the one program in the images that the tests make: static, with
// the few commands a container test needs.
//
//	helper cat FILE...     print files
//	helper sum DIR         print one SHA-256 over all names and contents
//	helper write FILE TEXT write a file
//	helper sleep SECONDS   wait
package main

import (
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
		return errors.New("usage: helper cat|sum|write|sleep ARGUMENT...")
	}
	switch args[0] {
	case "cat":
		return cat(args[1:])
	case "sum":
		return sum(args[1])
	case "write":
		return os.WriteFile(args[1], []byte(args[2]), 0o644)
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
