package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// diskSpeed is how many bytes a second a new disk takes from one writer, synced: the median of three times 1 GiB, each in a
// new file. The writes pass by the page cache: memory that this machine touches for the first time would be measured, too.
func (b *bench) diskSpeed(ctx context.Context) (_ float64, err error) {
	if err := b.freshDisk(ctx, 4); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, b.disk.Close()) }()
	if err := coldCache(""); err != nil {
		return 0, err
	}
	block, err := unix.Mmap(-1, 0, 4<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned, as direct I/O wants it
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(block)) }()
	for i := range block {
		block[i] = byte(i * 7)
	}
	var rates []float64
	for _, name := range []string{"first", "second", "third"} {
		rate, err := writeDirect(filepath.Join(b.disk.Path, name), block, 1<<30)
		if err != nil {
			return 0, err
		}
		rates = append(rates, rate)
	}
	slices.Sort(rates)
	return rates[1], nil
}

// writeDirect writes size bytes, block by block, to a new file, and syncs it. It returns bytes a second.
func writeDirect(name string, block []byte, size int) (float64, error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|unix.O_DIRECT, 0o600)
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	for range size / len(block) {
		if _, err := f.Write(block); err != nil {
			return 0, errors.Join(err, f.Close())
		}
	}
	err = f.Sync()
	rate := float64(size) / time.Since(begin).Seconds()
	return rate, errors.Join(err, f.Close())
}
