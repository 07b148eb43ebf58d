// Package client pulls an image for somebody at a command line. There are two ways, and [Pull.Run] takes the one that
// the node is ready for:
//
//   - containerd answers: its transfer service pulls, and gantryd, which is its content store, differ and snapshotter,
//     fetches and unpacks the layers. The image is there afterwards.
//   - Nothing listens at containerd's socket: the command fetches config and layers itself, into the folder of
//     transfers that gantryd uses too. Whoever fetches a blob there holds its lock, so nothing is fetched twice. A later
//     pull through containerd finds the layers on disk and asks the registry only for manifest and config.
//
// Either way what was fetched stays when the pull is interrupted, and the same pull goes on from there.
package client

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/setup"
	"github.com/gantryd/gantry/plugin/status"
)

// Options of a pull. Zero values mean the defaults.
type Options struct {
	// Ref is the image, as people type it: "alpine" is docker.io/library/alpine:latest.
	Ref string
	// Platform is the one to choose from an image of several, as "linux/arm64/v8". Default: the host's.
	Platform string
	// Namespace of containerd's that gets the image. Default: "default".
	Namespace string
	// NoContainerd fetches without containerd even if it runs.
	NoContainerd bool
	// Progress is told how far the pull is, several times a second and from one goroutine at a time; it keeps what it
	// gets. Nil: nobody is.
	Progress func(State)
}

// Values of State.Via.
const (
	ViaContainerd = "containerd" // containerd's transfer service and gantryd
	ViaTransfers  = "transfers"  // this process, into transfer.root
)

// Phase says what happens to a layer. Those from PhaseExists on are ends.
type Phase string

// The phases of a layer.
const (
	PhaseWaiting   Phase = "waiting"   // for its turn or for the first byte
	PhaseLock      Phase = "lock"      // another process fetches it
	PhaseFetching  Phase = "fetching"  // bytes arrive
	PhaseVerifying Phase = "verifying" // all bytes are there; hashing and fsync
	PhaseUnpacking Phase = "unpacking" // all bytes are there; the rest is decompressed and written
	PhaseExists    Phase = "exists"    // it was there before
	PhaseDone      Phase = "done"
	PhaseFailed    Phase = "failed"
)

// Ended says whether nothing more happens to the layer.
func (p Phase) Ended() bool { return p == PhaseExists || p == PhaseDone || p == PhaseFailed }

// State is how far a pull is.
type State struct {
	Name     string        `json:"name"`             // the whole reference
	Digest   digest.Digest `json:"digest,omitempty"` // what the reference stands for; empty until it is known
	Platform string        `json:"platform"`
	Via      string        `json:"via"` // ViaContainerd or ViaTransfers
	Started  time.Time     `json:"started"`
	// Layers are in the manifest's order, each digest once. Empty until the manifest is known.
	Layers []Layer `json:"layers"`
}

// Layer is one layer of a pull. Sizes are in bytes, rates in bytes a second.
type Layer struct {
	Digest   digest.Digest  `json:"digest"`
	Size     int64          `json:"size"`
	Phase    Phase          `json:"phase"`
	Received int64          `json:"received"` // bytes that are there, in order or not
	Fetched  int64          `json:"fetched"`  // bytes that came over the network meanwhile
	Rate     float64        `json:"rate"`
	Read     int64          `json:"read"`    // bytes of the blob that were decompressed
	Written  int64          `json:"written"` // bytes of the layer file
	Hosts    []string       `json:"hosts,omitempty"`
	Seconds  status.Seconds `json:"seconds"`         // zero where not known; complete once the layer is done
	Error    string         `json:"error,omitempty"` // the last one, also of a try that is repeated
}

// Summary is a pull that succeeded.
type Summary struct {
	State

	Namespace string  `json:"namespace,omitempty"` // containerd's, with ViaContainerd
	Unpacked  bool    `json:"unpacked"`            // the image can be run at once
	Folder    string  `json:"folder,omitempty"`    // where the blobs lie, with ViaTransfers
	Size      int64   `json:"size"`                // of all layers
	Fetched   int64   `json:"fetched"`             // of all layers
	Seconds   float64 `json:"seconds"`
	Rate      float64 `json:"rate"` // bytes fetched a second, over all the time
}

// Pull is one pull that was asked for.
type Pull struct {
	config   *config.Config
	options  Options
	named    reference.Named
	platform ocispec.Platform
}

// New checks what is asked for. Its errors are about the options and are errdefs.ErrInvalidArgument.
func New(c *config.Config, o Options) (*Pull, error) {
	p := &Pull{config: c, options: o, platform: platforms.DefaultSpec()}
	var err error
	if p.named, err = reference.ParseDockerRef(o.Ref); err != nil {
		return nil, fmt.Errorf("image reference %.300q: %w%s: %w", o.Ref, err, hint(o.Ref), errdefs.ErrInvalidArgument)
	}
	if o.Platform != "" {
		if p.platform, err = platforms.Parse(o.Platform); err != nil {
			return nil, fmt.Errorf("platform %w", err) // which quotes it
		}
	}
	if p.options.Namespace == "" {
		p.options.Namespace = "default"
	}
	if err := identifiers.Validate(p.options.Namespace); err != nil {
		return nil, fmt.Errorf("namespace %.100q: want at most 76 letters and digits, with single dots, dashes or underscores between them: %w",
			o.Namespace, errdefs.ErrInvalidArgument)
	}
	return p, nil
}

// hint says what is usually meant by a reference that is none.
func hint(ref string) string {
	_, dgst, ok := strings.Cut(ref, "@")
	switch {
	case strings.Contains(ref, "://"):
		return "; leave out " + ref[:strings.Index(ref, "://")+3]
	case ok && digest.Digest(dgst).Validate() != nil:
		return "; after @ stands a whole digest, as sha256: and 64 hexadecimal digits"
	}
	return ""
}

// Folder is where partial blobs are kept, and with ViaTransfers whole ones.
func (p *Pull) Folder() string { return setup.TransferFolder(p.config, p.options.Namespace) }

// Run pulls. An end of ctx leaves what was fetched for the next pull, as every failure does.
func (p *Pull) Run(ctx context.Context) (*Summary, error) {
	if p.options.NoContainerd {
		return p.withoutContainerd(ctx)
	}
	running, err := listens(ctx, p.config.Containerd.Address)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("containerd at %s: permission denied; run as root", p.config.Containerd.Address)
	case err != nil:
		return nil, fmt.Errorf("containerd at %s: %w", p.config.Containerd.Address, err)
	case running:
		return p.throughContainerd(ctx)
	}
	return p.withoutContainerd(ctx)
}

// state begins the report of a pull.
func (p *Pull) state(via string) State {
	return State{Name: p.named.String(), Via: via, Platform: platforms.Format(p.platform), Started: time.Now(), Layers: []Layer{}}
}

func (p *Pull) tell(s State) {
	if p.options.Progress != nil {
		p.options.Progress(s)
	}
}

// summary sums up a state in which all layers have ended.
func summary(s State) *Summary {
	sum := &Summary{State: s, Seconds: time.Since(s.Started).Seconds()}
	for _, l := range s.Layers {
		sum.Size += l.Size
		sum.Fetched += l.Fetched
	}
	sum.Rate = float64(sum.Fetched) / max(sum.Seconds, 1e-3)
	return sum
}

// Canonical is what the pull got, in a form that can be pulled again: name@digest.
func (s State) Canonical() string {
	named, err := reference.ParseNamed(s.Name)
	if err != nil { // not from New
		return s.Name + "@" + s.Digest.String()
	}
	return named.Name() + "@" + s.Digest.String()
}

// unique returns the descriptors with each digest once.
func unique(descs []ocispec.Descriptor) []ocispec.Descriptor {
	seen := map[digest.Digest]bool{}
	var out []ocispec.Descriptor
	for _, d := range descs {
		if !seen[d.Digest] {
			seen[d.Digest] = true
			out = append(out, d)
		}
	}
	return out
}
