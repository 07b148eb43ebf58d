package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"
)

// status is the part of `gantry status --json` that the demo shows.
type status struct {
	Transfers []struct {
		Digest   string `json:"digest"`
		Size     int64  `json:"size"`     // bytes
		Received int64  `json:"received"` // bytes
	} `json:"transfers"`
	Unpacks []struct {
		Written int64 `json:"written"` // bytes
	} `json:"unpacks"`
	Recent []layer `json:"recent"` // newest first
}

// layer is a finished layer. Its phases overlap: gantry decompresses and writes while it downloads.
type layer struct {
	Digest  string `json:"digest"`
	Size    int64  `json:"size"`    // bytes of the blob
	Written int64  `json:"written"` // bytes of the layer file
	Seconds struct {
		Total      float64 `json:"total"`
		Wait       float64 `json:"wait"`
		Download   float64 `json:"download"`
		Decompress float64 `json:"decompress"`
		Write      float64 `json:"write"`
		Verify     float64 `json:"verify"`
		Commit     float64 `json:"commit"`
	} `json:"seconds"`
	Error string `json:"error"`
}

func (d *demo) status(ctx context.Context) (*status, error) {
	out, err := d.node.GantryCLI(ctx, "status", "--json")
	if err != nil {
		return nil, err
	}
	s := &status{}
	if err := json.Unmarshal([]byte(out), s); err != nil {
		return nil, fmt.Errorf("read `gantry status --json`: %w", err)
	}
	return s, nil
}

// pull runs `ctr image pull` and shows how far gantry is, several times a second.
func (d *demo) pull(ctx context.Context) error {
	say("ctr image pull %s", d.ref)
	begin := time.Now()
	pulled := make(chan error, 1)
	go func() {
		_, err := d.node.Pull(ctx, namespace, d.ref)
		pulled <- err
	}()
	every := time.Second
	if terminal() {
		every = 100 * time.Millisecond
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case err := <-pulled:
			if terminal() {
				fmt.Print("\r\x1b[K")
			}
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			if err == nil {
				say("pulled and unpacked in %.2fs", time.Since(begin).Seconds())
			}
			return err
		case <-tick.C:
			d.progress(ctx)
		}
	}
}

// progress prints one line; on a terminal always the same one.
func (d *demo) progress(ctx context.Context) {
	s, err := d.status(ctx)
	if err != nil {
		return // the pull itself will say what is wrong
	}
	var received, size, written int64
	for _, t := range s.Transfers {
		received, size = received+t.Received, size+t.Size
	}
	for _, u := range s.Unpacks {
		written += u.Written
	}
	for _, l := range s.Recent {
		written += l.Written
	}
	line := fmt.Sprintf("%6.1fs  downloaded %s of %s, unpacked %s", time.Since(began).Seconds(), mib(received), mib(size), mib(written))
	if terminal() {
		fmt.Print("\r\x1b[K", line)
	} else {
		fmt.Println(line)
	}
}

func terminal() bool {
	info, err := os.Stdout.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
