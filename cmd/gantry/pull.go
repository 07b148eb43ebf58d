package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/containerd/log"
	"github.com/sirupsen/logrus"

	"github.com/gantryd/gantry/plugin/client"
	"github.com/gantryd/gantry/plugin/config"
)

var pullCommand = command{
	name: "pull",
	args: []string{"REF"},
	help: `Usage: gantry [--config FILE] pull [FLAGS] REF

Pulls an image and shows how far each layer is, then where the time went. REF is what docker and nerdctl take:
alpine is docker.io/library/alpine:latest; a digest may stand in place of the tag.

  gantry pull alpine
  gantry pull --namespace k8s.io registry.k8s.io/pause:3.9
  gantry pull --platform linux/arm64 --quiet ghcr.io/org/model@sha256:...

Where containerd runs, it pulls, and gantryd fetches and unpacks the layers: the image can be run at once. Where
nothing listens at containerd's socket, gantry fetches the layers by itself, sharing them with a gantryd that runs,
and leaves them in transfer.root for transfer.keep_partial. The next pull through containerd asks the registry for no
layer that is there. Hosts and logins are those in registry.config_path and registry.credentials.

Ctrl-C keeps what was fetched; the same command goes on from there. A second Ctrl-C ends at once.

  --namespace NAME  containerd's namespace that gets the image; default: default. The kubelet's is k8s.io
  --platform OS/ARCH[/VARIANT]
                    which of an image's platforms; default: this host's. Only this host's is unpacked
  --no-containerd   only fetch, also where containerd runs
  --quiet           print nothing but what was pulled: NAME@DIGEST
  --json            print what happens as JSON, one object a line; sizes are in bytes, rates in bytes a second:
                      {"event": "resolved", ...}  once: name, digest, platform, via (containerd or transfers), layers
                      {"event": "layer", ...}     a layer has changed: digest, phase, size, received, fetched over the
                                                  network by this pull, rate, eta_seconds, ...
                      {"event": "summary", ...}   the last line of a pull that succeeded: everything, with all layers
                      {"event": "error", ...}     the last line of one that did not

PHASE is what happens to a layer: waiting; lock, another process fetches it; fetching; verifying its digest;
unpacking what is left; done; exists, it was there before; failed.
In the table, FETCHED are bytes that came over the network. The times overlap, because a layer is decompressed and
written while it downloads.
`,
	define: func(flags *flag.FlagSet) {
		flags.String("namespace", "default", "")
		flags.String("platform", "", "")
		flags.Bool("no-containerd", false, "")
		flags.Bool("quiet", false, "")
		flags.Bool("json", false, "")
	},
	run: runPull,
}

// view shows a pull.
type view interface {
	tell(s client.State) // one call at a time
	end(sum *client.Summary) error
	fail(err error)
	// above returns where warnings go meanwhile.
	above() io.Writer
}

func runPull(ctx context.Context, c *config.Config, flags *flag.FlagSet, stdout io.Writer) error {
	is := func(name string) bool { return flags.Lookup(name).Value.String() == "true" }
	if is("quiet") && is("json") {
		return usageError{"pull: --quiet and --json exclude each other; see gantry help pull"}
	}
	v := viewFor(c, stdout, is("quiet"), is("json"))
	var last client.State
	p, err := client.New(c, client.Options{
		Ref: flags.Arg(0), Platform: flags.Lookup("platform").Value.String(), Namespace: flags.Lookup("namespace").Value.String(),
		NoContainerd: is("no-containerd"),
		Progress: func(s client.State) {
			last = s
			v.tell(s)
		},
	})
	if err != nil {
		return usageError{"pull: " + err.Error() + "; see gantry help pull"}
	}
	sum, err := p.Run(log.WithLogger(ctx, warnings(ctx, v.above())))
	if err == nil {
		return v.end(sum)
	}
	switch kept := "what was fetched is kept in " + p.Folder(); {
	case ctx.Err() != nil:
		err = errors.New("interrupted; " + kept + ", run the same command again to go on")
	case sumOf(last).received > 0:
		err = fmt.Errorf("%w\n%s, the same command goes on from there", err, kept)
	}
	v.fail(err)
	return err
}

func viewFor(c *config.Config, stdout io.Writer, quiet, asJSON bool) view {
	switch f, isFile := stdout.(*os.File); {
	case quiet:
		return quietView{stdout}
	case asJSON:
		return &jsonView{out: stdout, now: time.Now}
	case isFile && isTerminal(f):
		return &screen{out: stdout, size: func() (int, int) { return terminalSize(f) }, keep: c.Transfer.KeepPartial}
	}
	return &plainView{out: stdout, now: time.Now, keep: c.Transfer.KeepPartial}
}

// warnings is a log of what people should know, until ctx ends: then things break because they are broken off.
func warnings(ctx context.Context, w io.Writer) *log.Entry {
	l := logrus.New()
	l.SetOutput(untilEnd(func(p []byte) (int, error) {
		select {
		case <-ctx.Done():
			return len(p), nil
		default:
			return w.Write(p)
		}
	}))
	l.SetLevel(logrus.WarnLevel)
	l.SetFormatter(plainLog{})
	return logrus.NewEntry(l)
}

type untilEnd func(p []byte) (int, error)

// Write implements io.Writer.
func (f untilEnd) Write(p []byte) (int, error) { return f(p) }

// plainLog writes a message as gantry writes its errors.
type plainLog struct{}

// Format implements logrus.Formatter.
func (plainLog) Format(e *logrus.Entry) ([]byte, error) {
	text := "gantry: " + e.Message
	var about []string
	for _, field := range [][2]string{{"digest", "blob"}, {"host", "host"}} {
		if v, ok := e.Data[field[0]]; ok {
			about = append(about, fmt.Sprintf("%s %v", field[1], v))
		}
	}
	if len(about) > 0 {
		text += " (" + strings.Join(about, ", ") + ")"
	}
	if err, ok := e.Data[logrus.ErrorKey]; ok {
		text += fmt.Sprintf(": %v", err)
	}
	return []byte(text + "\n"), nil
}

// quietView prints the result.
type quietView struct{ out io.Writer }

func (quietView) tell(client.State) {}
func (quietView) fail(error)        {}
func (quietView) above() io.Writer  { return os.Stderr }

func (v quietView) end(sum *client.Summary) error { return print(v.out, sum.Canonical()+"\n") }

// jsonView prints what happens, a line each.
type jsonView struct {
	out  io.Writer
	now  func() time.Time
	last client.State
	err  error // of writing
}

// Lines of --json. What is embedded stands beside event and time.
type (
	resolvedLine struct {
		Event string    `json:"event"`
		Time  time.Time `json:"time"`
		client.State
	}
	layerLine struct {
		Event string    `json:"event"`
		Time  time.Time `json:"time"`
		client.Layer
		ETA *float64 `json:"eta_seconds,omitempty"` // until its last byte is here, if that can be told
	}
	summaryLine struct {
		Event string    `json:"event"`
		Time  time.Time `json:"time"`
		*client.Summary
	}
	errorLine struct {
		Event string    `json:"event"`
		Time  time.Time `json:"time"`
		Error string    `json:"error"`
	}
)

func (v *jsonView) print(line any) { v.err = errors.Join(v.err, json.NewEncoder(v.out).Encode(line)) }

func (v *jsonView) above() io.Writer { return os.Stderr }

func (v *jsonView) tell(s client.State) {
	before := phasesOf(v.last)
	if len(v.last.Layers) == 0 && len(s.Layers) > 0 {
		v.print(resolvedLine{"resolved", v.now(), s})
	}
	for _, l := range s.Layers {
		if was, ok := before[l.Digest]; ok && sameLayer(was, l) {
			continue
		}
		line := layerLine{Event: "layer", Time: v.now(), Layer: l}
		if left, ok := timeLeft(l.Size-l.Received, l.Rate); ok {
			seconds := left.Seconds()
			line.ETA = &seconds
		}
		v.print(line)
	}
	v.last = s
}

func (v *jsonView) end(sum *client.Summary) error {
	v.print(summaryLine{"summary", v.now(), sum})
	return v.err
}

func (v *jsonView) fail(err error) { v.print(errorLine{"error", v.now(), err.Error()}) }
