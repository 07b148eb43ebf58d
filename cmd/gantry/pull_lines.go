package main

import (
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/plugin/client"
	"github.com/gantryd/gantry/plugin/status"
)

// totals are the layers of a pull together.
type totals struct {
	layers, ended           int
	size, received, fetched int64
	rate                    float64
}

func sumOf(s client.State) totals {
	t := totals{layers: len(s.Layers)}
	for _, l := range s.Layers {
		t.size, t.received, t.fetched, t.rate = t.size+l.Size, t.received+l.Received, t.fetched+l.Fetched, t.rate+l.Rate
		if l.Phase.Ended() {
			t.ended++
		}
	}
	return t
}

func phasesOf(s client.State) map[digest.Digest]client.Layer {
	all := make(map[digest.Digest]client.Layer, len(s.Layers))
	for _, l := range s.Layers {
		all[l.Digest] = l
	}
	return all
}

// sameLayer says whether there is nothing new to tell. Rates move by themselves.
func sameLayer(a, b client.Layer) bool {
	a.Rate, b.Rate = 0, 0
	return reflect.DeepEqual(a, b)
}

// timeLeft is how long the remaining bytes take at that rate, if that can be told.
func timeLeft(remaining int64, rate float64) (time.Duration, bool) {
	if remaining <= 0 || rate <= 0 {
		return 0, false
	}
	seconds := float64(remaining) / rate
	if seconds >= 100*3600 {
		return 0, false
	}
	return time.Duration(seconds * float64(time.Second)), true
}

// eta prints the time left in at most six columns; "-" if it cannot be told.
func eta(remaining int64, rate float64) string {
	left, ok := timeLeft(remaining, rate)
	if !ok {
		return "-"
	}
	return span(left)
}

// span prints a duration in two units at most, rounded up.
func span(d time.Duration) string {
	s := int64((d + time.Second - 1) / time.Second)
	switch {
	case s < 60:
		return fmt.Sprintf("%ds", s)
	case s < 3600:
		return strings.TrimSuffix(fmt.Sprintf("%dm%02ds", s/60, s%60), "00s")
	}
	return strings.TrimSuffix(fmt.Sprintf("%dh%02dm", s/3600, s%3600/60), "00m")
}

// portion prints part and whole in the unit of the whole, in at most 17 columns.
func portion(part, whole int64) string {
	text := amount(whole)
	number, unit, _ := strings.Cut(text, " ")
	if unit == "B" {
		return fmt.Sprintf("%d/%s", part, text)
	}
	scale := float64(1)
	for _, u := range []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"} {
		scale *= 1024
		if u == unit {
			break
		}
	}
	return fmt.Sprintf("%.1f/%s %s", float64(part)/scale, number, unit)
}

// way says in words how an image is pulled.
func way(via string) string {
	if via == client.ViaContainerd {
		return "through containerd"
	}
	return "without containerd"
}

// printSummary prints where the time went, and what there is now.
func printSummary(w io.Writer, sum *client.Summary, keep time.Duration) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	unpacks := sum.Via == client.ViaContainerd
	row := func(layer, size, fetched, unpacked, wait, download, decompress, write, verify, commit, total string) {
		cells := []string{layer, size, fetched, wait, download, verify, total}
		if unpacks {
			cells = []string{layer, size, fetched, unpacked, wait, download, decompress, write, verify, commit, total}
		}
		_, _ = fmt.Fprintln(t, strings.Join(cells, "\t"))
	}
	row("LAYER", "SIZE", "FETCHED", "UNPACKED", "WAIT", "DOWNLOAD", "DECOMPRESS", "WRITE", "VERIFY", "COMMIT", "TOTAL")
	for _, l := range sum.Layers {
		s := l.Seconds
		if l.Phase == client.PhaseExists {
			row(short(string(l.Digest)), amount(l.Size), "exists", "-", "-", "-", "-", "-", "-", "-", "-")
			continue
		}
		if s == (status.Seconds{}) { // containerd fetched it, and its layer file was there
			row(short(string(l.Digest)), amount(l.Size), amount(l.Fetched), "-", "-", "-", "-", "-", "-", "-", "-")
			continue
		}
		row(short(string(l.Digest)), amount(l.Size), amount(l.Fetched), amount(l.Written), seconds(s.Wait), seconds(s.Download),
			seconds(s.Decompress), seconds(s.Write), seconds(s.Verify), seconds(s.Commit), seconds(s.Total))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	return print(w, result(sum, keep))
}

// result says what a pull has brought.
func result(sum *client.Summary, keep time.Duration) string {
	fetched := "nothing fetched in " + seconds(sum.Seconds)
	if sum.Fetched > 0 {
		fetched = fmt.Sprintf("%s fetched in %s (%s)", amount(sum.Fetched), seconds(sum.Seconds), rate(sum.Rate))
	}
	text := fmt.Sprintf("%s\n%s in %s, %s, %s\n", sum.Canonical(), amount(sum.Size), count(len(sum.Layers), "layer"), fetched, way(sum.Via))
	switch {
	case sum.Via == client.ViaTransfers:
		text += fmt.Sprintf("kept in %s for %s: a pull through containerd takes the layers from there\n", sum.Folder, span(keep))
	case !sum.Unpacked:
		text += "not unpacked: it is for another platform than this host's, or containerd runs without the unpack_config that `gantry config containerd` prints\n"
	}
	return text
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// totalEvery is how often a line about the whole pull is printed where lines stay.
const totalEvery = 5 * time.Second

// plainView prints lines that stay, for logs.
type plainView struct {
	out   io.Writer
	now   func() time.Time
	keep  time.Duration
	last  client.State
	total time.Time // when the last line about the whole was printed
}

func (v *plainView) above() io.Writer { return os.Stderr }
func (v *plainView) fail(error)       {}

func (v *plainView) tell(s client.State) {
	lines := changes(v.last, s)
	now := v.now()
	if v.total.IsZero() {
		v.total = now
	}
	if now.Sub(v.total) >= totalEvery {
		v.total = now
		lines = append(lines, totalLine(s))
	}
	v.last = s
	for _, l := range lines {
		fmt.Fprintln(v.out, l)
	}
}

func (v *plainView) end(sum *client.Summary) error {
	v.tell(sum.State)
	return printSummary(v.out, sum, v.keep)
}

// changes are the lines about what is new between two states.
func changes(before, now client.State) []string {
	var lines []string
	if before.Name == "" {
		lines = append(lines, fmt.Sprintf("pulling %s for %s %s", now.Name, now.Platform, way(now.Via)))
	}
	if len(before.Layers) == 0 && len(now.Layers) > 0 {
		lines = append(lines, fmt.Sprintf("%s: %s, %s", now.Digest, count(len(now.Layers), "layer"), amount(sumOf(now).size)))
	}
	was := phasesOf(before)
	for _, l := range now.Layers {
		old, known := was[l.Digest]
		if known && old.Phase == l.Phase && old.Error == l.Error || !known && l.Phase == client.PhaseWaiting {
			continue
		}
		lines = append(lines, layerLineOf(l))
	}
	return lines
}

func layerLineOf(l client.Layer) string {
	text := fmt.Sprintf("%s %s", short(string(l.Digest)), l.Phase)
	switch {
	case l.Phase == client.PhaseLock:
		text += ": another process fetches it"
	case l.Phase.Ended():
		text += " " + amount(l.Size)
	default:
		text += " " + portion(l.Received, l.Size)
	}
	if l.Phase == client.PhaseDone && l.Seconds.Total > 0 {
		text += " in " + seconds(l.Seconds.Total)
	}
	return text + suffix(l.Error)
}

func totalLine(s client.State) string {
	t := sumOf(s)
	return fmt.Sprintf("%d of %s, %s, %s, %s, %s left", t.ended, count(t.layers, "layer"), portion(t.received, t.size),
		percent(t.received, t.size), rate(t.rate), eta(t.size-t.received, t.rate))
}

// inOrder returns the indexes of the n layers that people want to see, in the manifest's order.
func inOrder(layers []client.Layer, n int) []int {
	rank := func(p client.Phase) int {
		switch p {
		case client.PhaseWaiting:
			return 1
		case client.PhaseDone:
			return 2
		case client.PhaseExists:
			return 3
		}
		return 0
	}
	all := make([]int, len(layers))
	for i := range all {
		all[i] = i
	}
	slices.SortStableFunc(all, func(a, b int) int { return rank(layers[a].Phase) - rank(layers[b].Phase) })
	chosen := all[:min(n, len(all))]
	slices.Sort(chosen)
	return chosen
}
