package config

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// value is the typed place of one key.
type value interface {
	// set takes what the TOML decoder made of the file. The error says what was
	// found; the caller adds what is allowed.
	set(v any) error
	// reset takes a default from the table; a bad one is a programming error.
	reset(fallback string)
	// toml prints the value as it would stand in the file.
	toml() string
	// allowed completes the sentence "want ...".
	allowed() string
}

// maxSocket is the longest path that fits a unix socket address, less what the
// name under which the socket is first bound adds.
const maxSocket = 90

type pathValue struct {
	at    *string
	limit int  // 0: none
	empty bool // "" is allowed
}

func path(at *string) value         { return pathValue{at: at} }
func optionalPath(at *string) value { return pathValue{at: at, empty: true} }
func socket(at *string) value       { return pathValue{at: at, limit: maxSocket} }

func (p pathValue) set(v any) error {
	s, ok := v.(string)
	switch {
	case !ok:
		return typeError(v)
	case s == "" && p.empty:
	case !filepath.IsAbs(s):
		return fmt.Errorf("%q is not absolute", s)
	case p.limit > 0 && len(s) > p.limit:
		return fmt.Errorf("%q has %d bytes", s, len(s))
	}
	if s != "" {
		s = filepath.Clean(s)
	}
	*p.at = s
	return nil
}

func (p pathValue) reset(fallback string) { *p.at = fallback }
func (p pathValue) toml() string          { return quote(*p.at) }
func (p pathValue) allowed() string {
	switch {
	case p.empty:
		return "an absolute path, or an empty string"
	case p.limit > 0:
		return fmt.Sprintf("an absolute path of at most %d bytes", p.limit)
	}
	return "an absolute path"
}

type choiceValue struct {
	at      *string
	choices []string
}

func oneOf(at *string, choices ...string) value { return choiceValue{at, choices} }

func (c choiceValue) set(v any) error {
	s, ok := v.(string)
	if !ok {
		return typeError(v)
	}
	if !slices.Contains(c.choices, s) {
		return fmt.Errorf("%q is unknown", s)
	}
	*c.at = s
	return nil
}

func (c choiceValue) reset(fallback string) { *c.at = fallback }
func (c choiceValue) toml() string          { return strconv.Quote(*c.at) }
func (c choiceValue) allowed() string {
	quoted := make([]string, len(c.choices))
	for i, s := range c.choices {
		quoted[i] = strconv.Quote(s)
	}
	last := len(quoted) - 1
	return strings.Join(quoted[:last], ", ") + " or " + quoted[last]
}

type countValue struct {
	at       *int
	min, max int64
}

func count(at *int, least, most int64) value { return countValue{at, least, most} }

func (c countValue) set(v any) error {
	n, ok := v.(int64)
	if !ok {
		return typeError(v)
	}
	if n < c.min || n > c.max {
		return fmt.Errorf("%d is out of range", n)
	}
	*c.at = int(n)
	return nil
}

func (c countValue) reset(fallback string) { *c.at, _ = strconv.Atoi(fallback) }
func (c countValue) toml() string          { return strconv.Itoa(*c.at) }
func (c countValue) allowed() string       { return fmt.Sprintf("a number from %d to %d", c.min, c.max) }

type durationValue struct {
	at       *time.Duration
	min, max time.Duration
}

func duration(at *time.Duration, least, most time.Duration) value {
	return durationValue{at, least, most}
}

func (d durationValue) set(v any) error {
	s, ok := v.(string)
	if !ok {
		return typeError(v)
	}
	t, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("%q is not a duration", s)
	}
	if t < d.min || t > d.max {
		return fmt.Errorf("%s is out of range", s)
	}
	*d.at = t
	return nil
}

func (d durationValue) reset(fallback string) { *d.at, _ = time.ParseDuration(fallback) }
func (d durationValue) toml() string          { return strconv.Quote(shortDuration(*d.at)) }
func (d durationValue) allowed() string {
	return fmt.Sprintf("a duration like \"90s\" from %q to %q", shortDuration(d.min), shortDuration(d.max))
}

// shortDuration is time.Duration.String without the units that are zero: 24h
// and not 24h0m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

type sizeValue struct {
	at       *int64
	min, max int64
	zero     bool // 0 is allowed too: somebody else chooses
}

func size(at *int64, least, most int64) value      { return sizeValue{at, least, most, true} }
func fixedSize(at *int64, least, most int64) value { return sizeValue{at, least, most, false} }

func (b sizeValue) set(v any) error {
	var n int64
	switch v := v.(type) {
	case int64:
		n = v
	case string:
		var err error
		if n, err = parseSize(v); err != nil {
			return err
		}
	default:
		return typeError(v)
	}
	if (n != 0 || !b.zero) && (n < b.min || n > b.max) {
		return fmt.Errorf("%s is out of range", formatSize(n))
	}
	*b.at = n
	return nil
}

func (b sizeValue) reset(fallback string) { *b.at, _ = parseSize(fallback) }

func (b sizeValue) toml() string {
	if *b.at == 0 {
		return "0"
	}
	return strconv.Quote(formatSize(*b.at))
}

func (b sizeValue) allowed() string {
	s := fmt.Sprintf("a size like \"8MiB\" from %q to %q", formatSize(b.min), formatSize(b.max))
	if b.zero {
		return "0, or " + s
	}
	return s
}

var units = []struct {
	name  string
	bytes int64
}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// parseSize reads whole numbers with a binary unit, "8MiB"; a bare number is bytes.
func parseSize(s string) (int64, error) {
	number, unit := s, int64(1)
	for _, u := range units {
		if rest, ok := strings.CutSuffix(s, u.name); ok {
			number, unit = rest, u.bytes
			break
		}
	}
	n, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || n < 0 || n > (1<<62)/unit {
		return 0, fmt.Errorf("%q is not a size", s)
	}
	return n * unit, nil
}

// formatSize prints n in the largest unit that divides it.
func formatSize(n int64) string {
	for _, u := range units {
		if n != 0 && n%u.bytes == 0 {
			return strconv.FormatInt(n/u.bytes, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10) + "B"
}

// quote writes a TOML string. Go's own form has escapes that TOML does not know, like \a.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, "\\u%04x", r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// typeError says what kind of TOML value was found in the wrong place.
func typeError(v any) error {
	switch v.(type) {
	case string:
		return fmt.Errorf("%q is a string", v)
	case int64, float64, bool:
		return fmt.Errorf("%v is not allowed", v)
	case []any:
		return fmt.Errorf("a list is not allowed")
	case map[string]any:
		return fmt.Errorf("a table is not allowed")
	}
	return fmt.Errorf("%v is not allowed", v)
}
