package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/status"
)

var errNoAnswer = fmt.Errorf("no answer within %s: it hangs, is stopped or is very busy", answerWithin)

// answerWithin is how long gantryd may take to tell its status.
const answerWithin = 10 * time.Second

var statusCommand = command{
	name: "status",
	help: `Usage: gantry [--config FILE] status [--json]

Asks gantryd, at the address in FILE, what it is doing:
  TRANSFERS  blobs on their way from a registry, and those that ended a moment ago. DONE: without a gap from the
             start. RECEIVED: in any order. CONNS: requests under way. USERS: how many hold the transfer: clients, the
             unpack, and the pull of the image as a whole. After the hosts: the last error, also of a try that is repeated.
             PHASE lock: another process fetches the blob and is followed. kept: what another process left or is just
             fetching, written so long ago; the next pull goes on from there, and it is removed when it was not written
             for transfer.keep_partial.
  UNPACKS    layers being decompressed and written, while their blob arrives
  LAYERS     layers that ended last, well or with an error, and the seconds they spent where. The parts overlap.
             TAIL: from the arrival of the last byte until the layer could be mounted.
             A layer that was on disk already is not unpacked again and is missing here.
  CALLS      what containerd called since gantryd started (of Content/Write OPEN, the first message, and COMMIT). LONGEST: the
             longest call, and how much of it was SYNC of gantryd's database or of a blob, which depends on the disk, or
             MOUNTS, the wait for layers just pulled. WORK: the most that a call took beside both. containerd's garbage collection waits for these calls.

  --json     print the whole report as JSON; sizes are in bytes, rates in bytes a second
`,
	define: func(flags *flag.FlagSet) { flags.Bool("json", false, "") },
	run:    runStatus,
}

func runStatus(ctx context.Context, c *config.Config, flags *flag.FlagSet, stdout io.Writer) error {
	report, err := fetch(ctx, c.Address)
	if err != nil {
		return err
	}
	if flags.Lookup("json").Value.String() == "true" {
		e := json.NewEncoder(stdout)
		e.SetIndent("", "  ")
		return e.Encode(report)
	}
	return printReport(stdout, report, time.Now())
}

// fetch asks the gantryd at address.
func fetch(ctx context.Context, address string) (_ *status.Report, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, answerWithin, errNoAnswer)
	defer cancel()
	if err := reachable(ctx, address); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	report, err := status.Get(ctx, conn)
	if errors.Is(context.Cause(ctx), errNoAnswer) {
		return nil, fmt.Errorf("gantryd at %s: %w (systemctl status gantryd)", address, errNoAnswer)
	}
	if err != nil {
		return nil, fmt.Errorf("gantryd at %s: %w", address, err)
	}
	return report, nil
}

// untilSilent returns a context that ends with errNoAnswer unless gantryd is heard of in time.
func untilSilent(ctx context.Context) (_ context.Context, heard func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	timer := time.AfterFunc(answerWithin, func() { cancel(errNoAnswer) })
	return ctx, func() { timer.Stop() }
}

// reachable says in plain words why nobody answers at address.
func reachable(ctx context.Context, address string) error {
	conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
	switch {
	case err == nil:
		return conn.Close()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("gantryd is not running: nobody answers at %s (systemctl status gantryd)", address)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("gantryd at %s: permission denied; run as root", address)
	}
	return fmt.Errorf("gantryd at %s: %w", address, err)
}

// printReport prints the report for people.
func printReport(w io.Writer, r *status.Report, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(cells ...string) { _, _ = fmt.Fprintln(t, strings.Join(cells, "\t")) }
	line(fmt.Sprintf("gantryd %s, pid %d, up %s, root %s", r.Version, r.PID, now.Sub(r.Started).Round(time.Second), r.Root))
	line("mount mode " + r.Mount.Mode + reason(r.Mount.Reason))
	if !r.Mount.IDMapped {
		line("user namespaces get copies of images: no id-mapped mounts" + reason(r.Mount.NotIDMapped))
	}
	line(fmt.Sprintf("%s of memory in use, %d open files, %d goroutines", amount(r.Process.HeapLive), r.Process.OpenFiles, r.Process.Goroutines))
	if upper := uppers(r.Upper); upper != "" {
		line(upper)
	}
	if r.Discarded.Blobs > 0 {
		line(fmt.Sprintf("%d layers are kept without their compressed bytes, %s; gantry content restore fetches them again", r.Discarded.Blobs, amount(r.Discarded.Size)))
	}
	if len(r.Transfers)+len(r.Unpacks) == 0 {
		line("nothing is under way")
	}
	if len(r.Transfers) > 0 {
		line("")
		line("TRANSFERS", "PHASE", "DONE", "RECEIVED", "SIZE", "RATE", "CONNS", "USERS", "HOSTS")
		for _, x := range r.Transfers {
			line(short(string(x.Digest)), x.Phase, percent(x.Frontier, x.Size), amount(x.Received), amount(x.Size), rate(x.Rate),
				strconv.Itoa(x.Connections), strconv.Itoa(x.Waiters), dash(hosts(x, now))+suffix(x.Error))
		}
	}
	if len(r.Unpacks) > 0 {
		line("")
		line("UNPACKS", "PHASE", "DONE", "READ", "SIZE", "WRITTEN", "RATE")
		for _, x := range r.Unpacks {
			line(short(string(x.Digest)), x.Phase, percent(x.Read, x.Size), amount(x.Read), amount(x.Size), amount(x.Written), rate(x.Rate))
		}
	}
	printLayers(line, r.Recent)
	printCalls(line, r.Calls)
	return t.Flush()
}

// uppers says where containers write; nothing of plain directories.
func uppers(u status.Upper) string {
	switch {
	case u.Kind == "file":
		return fmt.Sprintf("new containers write to files of %s; %d snapshots have one", amount(u.Size), u.Files)
	case u.Files > 0:
		return fmt.Sprintf("new containers write to directories; %d snapshots have a file", u.Files)
	}
	return ""
}

// hosts says where a transfer's bytes come from or, when nobody asks for them, how old they are.
func hosts(x status.Transfer, now time.Time) string {
	if x.Phase == "kept" {
		return "written " + now.Sub(x.Started).Round(time.Second).String() + " ago"
	}
	return strings.Join(x.Hosts, ",")
}

// printLayers prints the layers that ended. Their namespace is known only where
// namespaces do not share content.
func printLayers(line func(...string), layers []status.Layer) {
	if len(layers) == 0 {
		return
	}
	isolated := slices.ContainsFunc(layers, func(l status.Layer) bool { return l.Namespace != "" })
	row := func(namespace, image string, cells ...string) {
		if isolated {
			cells = append(cells, namespace)
		}
		line(append(cells, image)...)
	}
	line("")
	row("NAMESPACE", "IMAGE", "LAYERS", "SIZE", "UNPACKED", "TOTAL", "QUEUED", "WAIT", "DOWNLOAD", "DECOMPRESS", "WRITE", "VERIFY", "COMMIT", "TAIL")
	for _, x := range layers {
		s := x.Seconds
		row(dash(x.Namespace), dash(x.Image)+suffix(x.Error), short(string(x.Digest)), amount(x.Size), amount(x.Written), seconds(s.Total), seconds(s.Queued),
			seconds(s.Wait), seconds(s.Download), seconds(s.Decompress), seconds(s.Write), seconds(s.Verify), seconds(s.Commit), seconds(x.TailSeconds))
	}
}

func printCalls(line func(...string), calls []status.Call) {
	if len(calls) == 0 {
		return
	}
	milliseconds := func(s float64) string { return fmt.Sprintf("%.1fms", 1e3*s) }
	line("")
	line("CALLS", "COUNT", "LONGEST", "SYNC", "MOUNTS", "WORK")
	for _, c := range calls {
		line(c.Method, strconv.FormatInt(c.Count, 10), milliseconds(c.Longest), milliseconds(c.LongestSync), milliseconds(c.LongestMounts), milliseconds(c.Work))
	}
}

func reason(text string) string {
	if text == "" {
		return ""
	}
	return ": " + text
}

// short is what is left of a digest in a table.
func short(d string) string {
	_, hex, _ := strings.Cut(d, ":")
	return hex[:min(12, len(hex))]
}

func percent(part, whole int64) string {
	if whole <= 0 {
		return "-"
	}
	return fmt.Sprintf("%d%%", int(float64(part)/float64(whole)*100))
}

// amount prints n in the binary unit that leaves one to four digits.
func amount(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, i := float64(n), 0
	for ; f >= 1024 && i < len(units)-1; i++ {
		f /= 1024
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

func rate(r float64) string {
	if r <= 0 {
		return "-"
	}
	return amount(int64(r)) + "/s"
}

func seconds(s float64) string { return fmt.Sprintf("%.2fs", s) }

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func suffix(problem string) string {
	if problem == "" {
		return ""
	}
	return "  " + strings.ReplaceAll(problem, "\n", "; ")
}
