package main

import (
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/plugin/restore"
)

func TestRestoreLine(t *testing.T) {
	t.Parallel()
	d := digest.FromString("layer")
	for want, e := range map[string]restore.Event{
		"no layer is discarded\n":       {State: restore.Begun},
		"12 layers to fetch, 4.0 GiB\n": {State: restore.Begun, Blobs: 12, Bytes: 4 << 30},
		"3 of 12, 25%: restored " + d.String() + ", 1.0 MiB in 2.50s\n": {
			State: restore.Restored, Digest: d, Size: 1 << 20, Seconds: 2.5, Done: 3, Blobs: 12, DoneBytes: 1 << 30, Bytes: 4 << 30},
		"4 of 12, 50%: failed " + d.String() + ", 1.0 MiB in 0.10s: the registry is away\n": {
			State: restore.Failed, Digest: d, Size: 1 << 20, Seconds: 0.1, Error: "the registry is away", Done: 4, Blobs: 12, DoneBytes: 2 << 30, Bytes: 4 << 30},
	} {
		if got := restoreLine(e); got != want {
			t.Errorf("got  %qwant %q", got, want)
		}
	}
}
