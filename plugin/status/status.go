// Package status is what gantryd tells about itself: the report, the gRPC
// service that serves it and the call that fetches it.
//
// The report travels as JSON within well-known protobuf types, so that any gRPC
// client can read it without generated code:
//
//	gantry.v1.Status/Get (google.protobuf.Empty) -> google.protobuf.BytesValue
package status

import (
	"time"

	"github.com/opencontainers/go-digest"
)

// Report is the state of one gantryd.
type Report struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Root    string    `json:"root"`
	Mount   Mount     `json:"mount"`
	Process Process   `json:"process"`
	// Calls are the methods that were called since the start.
	Calls []Call `json:"calls"`
	Upper Upper  `json:"upper"`
	// Discarded are blobs that the store answers for without having their bytes.
	Discarded Discarded `json:"discarded"`
	// Transfers are the blobs known to the transfer manager, under way or just finished.
	Transfers []Transfer `json:"transfers"`
	// Unpacks are the layers being unpacked.
	Unpacks []Unpack `json:"unpacks"`
	// Recent are layers that were finished since the start, the newest first; only the last few are kept.
	Recent []Layer `json:"recent"`
}

// Process is what gantryd itself takes.
type Process struct {
	HeapLive    int64 `json:"heap_live"`   // bytes of memory that the last garbage collection of Go's found in use
	Collections int64 `json:"collections"` // of those since the start
	Goroutines  int64 `json:"goroutines"`
	OpenFiles   int64 `json:"open_files"` // descriptors
}

// Call is what the calls of one method took, in seconds. containerd's whole database waits for those of Snapshots.
type Call struct {
	// Method is service and method, such as Snapshots/Prepare. Of Content/Write there are the first message, OPEN, and COMMIT; of
	// other streams those that list something.
	Method string `json:"method"`
	Count  int64  `json:"count"`
	// Longest is the longest call, LongestSync what of it the database or a blob was synced, LongestMounts what of it layers were mounted.
	Longest       float64 `json:"longest"`
	LongestSync   float64 `json:"longest_sync"`
	LongestMounts float64 `json:"longest_mounts"`
	// Work is the most that a call took beside both.
	Work float64 `json:"work"`
}

// Mount says how layers are mounted on this host.
type Mount struct {
	Mode   string `json:"mode"`   // file, loop or directory
	Reason string `json:"reason"` // why not the one before it
	// IDMapped: containers in user namespaces see layers through id-mapped mounts; containerd is to be told remap-ids.
	IDMapped    bool   `json:"id_mapped"`
	NotIDMapped string `json:"not_id_mapped,omitempty"` // why not
}

// Upper says where new containers' changes are kept.
type Upper struct {
	Kind  string `json:"kind"`           // directory or file
	Size  int64  `json:"size,omitempty"` // bytes of a file
	Files int    `json:"files"`          // snapshots that have one, whatever new ones get
}

// Discarded counts blobs and their bytes.
type Discarded struct {
	Blobs int   `json:"blobs"`
	Size  int64 `json:"size"` // bytes that are not there
}

// Transfer is a blob on its way from a registry, or what is left of it on disk: then Started is when it was written last.
type Transfer struct {
	Digest   digest.Digest `json:"digest"`
	Size     int64         `json:"size"`     // bytes
	Frontier int64         `json:"frontier"` // bytes without a gap from the start
	Received int64         `json:"received"` // bytes that are there, in order or not
	Fetched  int64         `json:"fetched"`  // bytes that came over the network since Started
	Rate     float64       `json:"rate"`     // bytes a second
	Phase    string        `json:"phase"`    // waiting, lock, fetching, verifying, complete, failed or kept
	Hosts    []string      `json:"hosts,omitempty"`
	// Connections are the requests under way.
	Connections int `json:"connections"`

	Waiters int       `json:"waiters"`
	Started time.Time `json:"started"`
	Error   string    `json:"error,omitempty"`
}

// Unpack is a layer on its way from a blob to a layer file.
type Unpack struct {
	Digest  digest.Digest `json:"digest"`
	Size    int64         `json:"size"`    // bytes of the blob
	Read    int64         `json:"read"`    // bytes of the blob that were decompressed
	Written int64         `json:"written"` // bytes of the layer file
	Rate    float64       `json:"rate"`    // bytes written a second, since Started
	Phase   string        `json:"phase"`   // queued, unpacking or verifying
	Started time.Time     `json:"started"`
}

// Layer is a finished layer, and where its time went.
type Layer struct {
	Namespace string        `json:"namespace,omitempty"`
	Image     string        `json:"image,omitempty"` // empty if not known
	Digest    digest.Digest `json:"digest"`
	DiffID    digest.Digest `json:"diff_id,omitempty"` // empty if the layer failed before it was known
	Size      int64         `json:"size"`              // bytes of the blob
	Written   int64         `json:"written"`           // bytes of the layer file
	Fetched   int64         `json:"fetched"`           // bytes that gantryd fetched for it
	Started   time.Time     `json:"started"`
	Seconds   Seconds       `json:"seconds"`
	// TailSeconds is what was left to do when the last compressed byte had arrived, until the layer could be mounted:
	// its bytes verified, its file durable, its index written. How long containerd took to ask for the latter is not
	// in it. 0: not known, because the bytes did not come by a transfer of gantryd's.
	TailSeconds float64 `json:"tail_seconds,omitempty"`
	Error       string  `json:"error,omitempty"`
}

// Seconds are the parts of one layer's way. They overlap, because gantry
// decompresses and writes while it downloads: their sum is not the total.
type Seconds struct {
	Total      float64 `json:"total"`
	Queued     float64 `json:"queued"`     // until an unpack worker was free
	Wait       float64 `json:"wait"`       // for the first byte
	Download   float64 `json:"download"`   // from the first byte to the last
	Starved    float64 `json:"starved"`    // hash, scan and write waited for bytes to arrive
	Decompress float64 `json:"decompress"` // they waited for the decompressor, which had bytes
	Write      float64 `json:"write"`      // writing the layer file; waiting for the disk to keep up is in it
	Verify     float64 `json:"verify"`     // after the last byte, until the digest was known good
	Commit     float64 `json:"commit"`     // making the layer file durable
	Index      float64 `json:"index"`      // making it the content of its snapshot: index and mount; 0 until containerd asks
}
