package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/plugin/client"
)

// What a terminal is taken for that does not tell its size.
const (
	usualWidth  = 80
	usualHeight = 24
)

// isTerminal says whether lines can be drawn again.
func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	return err == nil && os.Getenv("TERM") != "dumb"
}

func terminalSize(f *os.File) (width, height int) {
	size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || size.Col == 0 || size.Row == 0 {
		return usualWidth, usualHeight
	}
	return int(size.Col), int(size.Row)
}

// screen draws a pull in place.
type screen struct {
	out  io.Writer
	size func() (width, height int)
	keep time.Duration

	mu    sync.Mutex // warnings come from anywhere
	drawn int        // lines above the cursor that are to be drawn again
}

func (v *screen) tell(s client.State) {
	width, height := v.size()
	lines := frame(s, time.Since(s.Started), width, height)
	v.mu.Lock()
	defer v.mu.Unlock()
	fmt.Fprint(v.out, redraw(lines, v.drawn))
	v.drawn = len(lines)
}

func (v *screen) end(sum *client.Summary) error {
	v.erase()
	return printSummary(v.out, sum, v.keep)
}

func (v *screen) fail(error) {} // the last frame shows how far it was

func (v *screen) erase() {
	v.mu.Lock()
	defer v.mu.Unlock()
	fmt.Fprint(v.out, redraw(nil, v.drawn))
	v.drawn = 0
}

// above prints where the frame is, which is drawn again below.
func (v *screen) above() io.Writer {
	return untilEnd(func(p []byte) (int, error) {
		v.erase()
		return os.Stderr.Write(p)
	})
}

// redraw is what a terminal needs to show lines in place of those that were drawn before. Nothing is cleared before it
// is written over, so that nothing flickers.
func redraw(lines []string, drawn int) string {
	var b strings.Builder
	if drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", drawn)
	}
	b.WriteString("\r")
	for _, l := range lines {
		b.WriteString(l + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}

// frame draws a pull on a terminal of this size. No line reaches the last column, and there are fewer lines than rows:
// the cursor stands below.
func frame(s client.State, elapsed time.Duration, width, height int) []string {
	width = max(width-1, 1)
	lines := []string{fmt.Sprintf("%s %s, %s", s.Name, way(s.Via), span(elapsed.Truncate(time.Second)))}
	if len(s.Layers) == 0 {
		return fit(append(lines, "asking the registry"), width)
	}
	t := sumOf(s)
	grid := columnsFor(width)
	lines = append(lines, grid.line("LAYER", "PHASE", "", "DONE", "RECEIVED", "RATE", "ETA"))
	rows := max(height-len(lines)-2, 1)
	shown := inOrder(s.Layers, rows)
	rest := map[client.Phase]int{}
	if len(shown) < len(s.Layers) {
		shown = inOrder(s.Layers, rows-1)
		for i, l := range s.Layers {
			if !slices.Contains(shown, i) {
				rest[l.Phase]++
			}
		}
	}
	for _, i := range shown {
		lines = append(lines, grid.layer(s.Layers[i]))
	}
	if len(rest) > 0 {
		lines = append(lines, others(rest))
	}
	lines = append(lines, grid.line("total", fmt.Sprintf("%d of %d", t.ended, t.layers), grid.fill(t.received, t.size),
		percent(t.received, t.size), portion(t.received, t.size), rate(t.rate), eta(t.size-t.received, t.rate)))
	return fit(lines[max(0, len(lines)-max(height-1, 1)):], width)
}

// others sums up the layers that have no line.
func others(phases map[client.Phase]int) string {
	var parts []string
	n := 0
	for _, p := range slices.Sorted(maps.Keys(phases)) {
		parts = append(parts, fmt.Sprintf("%d %s", phases[p], p))
		n += phases[p]
	}
	return fmt.Sprintf("and %d more: %s", n, strings.Join(parts, ", "))
}

// fit cuts what is too long. Images, hosts and errors may have any length.
func fit(lines []string, width int) []string {
	for i, l := range lines {
		if runes := []rune(l); len(runes) > width {
			lines[i] = string(runes[:width])
		}
	}
	return lines
}

// columns of a frame. Those that do not fit are left out.
type columns struct {
	bar                        int // columns between the brackets; 0: no bar
	percent, amount, rate, eta bool
}

// Widths of the columns, a space before each but the first.
const (
	digestWidth  = 12
	phaseWidth   = 1 + 9
	percentWidth = 1 + 4
	amountWidth  = 1 + 17
	rateWidth    = 1 + 12
	etaWidth     = 1 + 6
	leastBar     = 5
	mostBar      = 60
)

func columnsFor(width int) columns {
	c := columns{percent: true, amount: true, rate: true, eta: true}
	left := width - digestWidth - phaseWidth - percentWidth - amountWidth - rateWidth - etaWidth
	if bar := left - 3; bar >= leastBar {
		c.bar = min(bar, mostBar)
		return c
	}
	for _, drop := range []struct {
		column *bool
		width  int
	}{{&c.amount, amountWidth}, {&c.rate, rateWidth}, {&c.eta, etaWidth}, {&c.percent, percentWidth}} {
		if left >= 0 {
			break
		}
		*drop.column = false
		left += drop.width
	}
	return c
}

// line puts cells into the columns.
func (c columns) line(layer, phase, bar, percent, amount, rate, eta string) string {
	text := fmt.Sprintf("%-*s %-*s", digestWidth, layer, phaseWidth-1, phase)
	if c.bar > 0 {
		text += fmt.Sprintf(" %-*s", c.bar+2, bar)
	}
	for _, cell := range []struct {
		shown bool
		width int
		text  string
	}{{c.percent, percentWidth, percent}, {c.amount, amountWidth, amount}, {c.rate, rateWidth, rate}, {c.eta, etaWidth, eta}} {
		if cell.shown {
			text += fmt.Sprintf("%*s", cell.width, cell.text)
		}
	}
	return strings.TrimRight(text, " ")
}

// fill draws a bar.
func (c columns) fill(part, whole int64) string {
	if c.bar == 0 || whole <= 0 {
		return ""
	}
	n := int(float64(c.bar) * float64(min(max(part, 0), whole)) / float64(whole))
	head := ""
	if n > 0 && n < c.bar {
		n--
		head = ">"
	}
	return "[" + strings.Repeat("=", n) + head + strings.Repeat(" ", c.bar-n-len(head)) + "]"
}

// layer draws one layer.
func (c columns) layer(l client.Layer) string {
	id, phase := short(string(l.Digest)), string(l.Phase)
	switch l.Phase {
	case client.PhaseLock:
		return fmt.Sprintf("%-*s %-*s another process fetches it: %s", digestWidth, id, phaseWidth-1, phase, portion(l.Received, l.Size))
	case client.PhaseUnpacking:
		return c.line(id, phase, c.fill(l.Read, l.Size), percent(l.Read, l.Size), portion(l.Read, l.Size), "", "")
	case client.PhaseWaiting, client.PhaseExists:
		return c.line(id, phase, "", "", amount(l.Size), "", "")
	case client.PhaseDone:
		took := ""
		if l.Seconds.Total > 0 {
			took = fmt.Sprintf("in %.1fs", l.Seconds.Total)
		}
		return c.line(id, phase, c.fill(l.Size, l.Size), percent(l.Size, l.Size), amount(l.Size), took, "")
	case client.PhaseFailed:
		return fmt.Sprintf("%-*s %-*s %s", digestWidth, id, phaseWidth-1, phase, strings.ReplaceAll(l.Error, "\n", "; "))
	}
	return c.line(id, phase, c.fill(l.Received, l.Size), percent(l.Received, l.Size), portion(l.Received, l.Size),
		rate(l.Rate), eta(l.Size-l.Received, l.Rate))
}
