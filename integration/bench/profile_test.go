package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStageOf(t *testing.T) {
	const layer, decompress, transfer = "github.com/gantryd/gantry/snapshotter/layer.(*pipeline).step",
		"github.com/gantryd/gantry/content/decompress/deflate.(*Reader).Next", "github.com/gantryd/gantry/content/transfer.(*job).run"
	for name, tc := range map[string]struct {
		stack []string // the innermost first
		want  *stage
	}{
		"DiffID":                       {[]string{"crypto/internal/fips140/sha256.blockSHANI.abi0", layer}, diffID},
		"blob's digest":                {[]string{"crypto/internal/fips140/sha256.blockSHANI.abi0", transfer}, hash},
		"blob read for its digest":     {[]string{"filemap_read", "syscall.pread", "os.(*File).ReadAt", transfer}, hash},
		"inflate for the layer":        {[]string{decompress, layer}, inflate},
		"klauspost":                    {[]string{"github.com/klauspost/compress/flate.(*decompressor).huffmanBufioReader", layer}, inflate},
		"inflate wants input":          {[]string{"filemap_read", "syscall.pread", transfer, decompress, layer}, back},
		"layer's pages":                {[]string{"copy_folio_from_iter_atomic", "syscall.pwrite", layer}, write},
		"layer's fsync":                {[]string{"ext4_sync_file", "syscall.Fsync", layer}, flush},
		"blob's write-back":            {[]string{"writeback_single_inode", "golang.org/x/sys/unix.SyncFileRange", transfer}, flush},
		"blob's pages":                 {[]string{"copy_folio_from_iter_atomic", "syscall.pwrite", transfer}, store},
		"blob's socket":                {[]string{"tcp_recvmsg", "syscall.read", "net.(*conn).Read", transfer}, receive},
		"headers":                      {[]string{"archive/tar.(*Reader).Next", layer}, scan},
		"index":                        {[]string{"github.com/gantryd/gantry/snapshotter/erofs.Write"}, index},
		"garbage collection":           {[]string{"runtime.scanobject", "runtime.gcDrain"}, rest},
		"connection's reading routine": {[]string{"tcp_recvmsg", "net/http.(*persistConn).readLoop"}, receive},
	} {
		t.Run(name, func(t *testing.T) {
			if got := stageOf(tc.stack); got != tc.want {
				t.Errorf("got %q, want %q", got.name, tc.want.name)
			}
		})
	}
}

func TestCountStacks(t *testing.T) {
	const out = `gantryd  4242
	ffffffff81a2 copy_folio_from_iter_atomic
	       4a3b2c syscall.pwrite
	       4a3b2d github.com/gantryd/gantry/snapshotter/layer.(*file).Write

gantryd  4243
	       4a3b2d runtime.futex.abi0
`
	counts, err := countStacks(strings.NewReader(out))
	if err != nil || counts[write] != 1 || counts[rest] != 1 || len(counts) != 2 {
		t.Errorf("got %v, %v, want one of the layer's and one of the rest", counts, err)
	}
}

func TestParseBench(t *testing.T) {
	const out = `goos: linux
BenchmarkReader/go/procs=1-2         	       1	       300.0 MB/s	       200.0 klauspost-MB/s	         1.500 ratio
BenchmarkReader/go/procs=2-2         	       1	       500.0 MB/s	       200.0 klauspost-MB/s	         2.500 ratio
BenchmarkReader/go/procs=1-2         	       1	       300.0 MB/s	       200.0 klauspost-MB/s	         1.700 ratio
PASS
`
	got := parseBench(bytes.NewBufferString(out))
	if len(got) != 2 || got[0].stream != "go" || got[0].cores != 1 || got[1].cores != 2 {
		t.Fatalf("got %+v", got)
	}
	if r := got[0].median("ratio"); r < 1.599 || r > 1.601 {
		t.Errorf("median ratio %g, want 1.6", r)
	}
}

func TestPredict(t *testing.T) {
	// One layer of 1 GB, packed to half of it: 4 s of inflating, which cores share, and 1 s of SHA-256, which they do not.
	p := &profile{pulls: 2, layers: []layerBytes{{5e8, 1e9}}, compressed: 5e8, tars: 1e9, cpu: map[*stage]float64{inflate: 8, diffID: 2}}
	for _, tc := range []struct {
		cores int
		disk  float64
		want  float64
		why   string
	}{
		{2, 1e12, 2.5, "all CPU time"},
		{8, 1e12, 1, "SHA-256 of the tar, one layer"},
		{8, 1e9, 1.5, "disk"},
	} {
		if got, why := p.predict(tc.cores, tc.disk); got < tc.want-1e-9 || got > tc.want+1e-9 || why != tc.why {
			t.Errorf("%d cores, %g bytes a second: %g s by %s, want %g by %s", tc.cores, tc.disk, got, why, tc.want, tc.why)
		}
	}
}

func TestMedian(t *testing.T) {
	for want, in := range map[time.Duration][]time.Duration{2: {3, 1, 2}, 5: {8, 2, 9, 1}} {
		if got := median(in); got != want {
			t.Errorf("median of %v is %d, want %d", in, got, want)
		}
	}
}
