package config

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// parse makes a configuration of data, which name is the file of. All that is
// wrong is reported at once, in the order of the lines.
func parse(name string, data []byte) (*Config, error) {
	found := map[string]any{}
	if err := toml.Unmarshal(data, &found); err != nil {
		if bad, ok := errors.AsType[*toml.DecodeError](err); ok {
			row, column := bad.Position()
			return nil, fmt.Errorf("%s:%d:%d: %w: %w", name, row, column, bad, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	c := Default()
	// What follows from other keys is filled in again below.
	for _, f := range fields(c) {
		if f.derived != "" {
			f.value.reset("")
		}
	}
	p := parser{name: name, lines: keyLines(data), fields: fields(c)}
	p.table("", found)
	if err := p.err(); err != nil {
		return nil, err
	}
	c.derive()
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return c, nil
}

type problem struct {
	line int
	err  error
}

type parser struct {
	name     string
	lines    map[string]int
	fields   []field
	problems []problem
}

// table takes the keys of one table, whose dotted name is prefix ("log.").
func (p *parser) table(prefix string, t map[string]any) {
	for _, name := range slices.Sorted(maps.Keys(t)) {
		key, v := prefix+name, t[name]
		if sub, ok := v.(map[string]any); ok && p.isTable(key) {
			p.table(key+".", sub)
			continue
		}
		p.key(key, v)
	}
}

// isTable reports whether some known key lies below name.
func (p *parser) isTable(name string) bool {
	return slices.ContainsFunc(p.fields, func(f field) bool { return strings.HasPrefix(f.key, name+".") })
}

func (p *parser) key(key string, v any) {
	i := slices.IndexFunc(p.fields, func(f field) bool { return f.key == key })
	switch {
	case i >= 0:
		if err := p.fields[i].value.set(v); err != nil {
			p.fail(key, fmt.Errorf("%w; want %s", err, p.fields[i].value.allowed()))
		}
	case p.isTable(key):
		p.fail(key, fmt.Errorf("this is a table: write [%s] with %s below it", key, p.below(key+".")))
	default:
		table := key[:strings.LastIndexByte(key, '.')+1]
		p.fail(key, fmt.Errorf("unknown key; known here: %s", p.below(table)))
	}
}

// below lists what may stand in a table, tables in brackets.
func (p *parser) below(prefix string) string {
	var names []string
	for _, f := range p.fields {
		rest, ok := strings.CutPrefix(f.key, prefix)
		if !ok {
			continue
		}
		if table, _, ok := strings.Cut(rest, "."); ok {
			rest = "[" + table + "]"
		}
		if !slices.Contains(names, rest) {
			names = append(names, rest)
		}
	}
	return strings.Join(names, ", ")
}

func (p *parser) fail(key string, err error) {
	line := p.lines[key]
	p.problems = append(p.problems, problem{line,
		fmt.Errorf("%s:%d: %s: %w: %w", p.name, line, key, err, errdefs.ErrInvalidArgument)})
}

func (p *parser) err() error {
	slices.SortStableFunc(p.problems, func(a, b problem) int { return cmp.Compare(a.line, b.line) })
	var errs []error
	for _, q := range p.problems {
		errs = append(errs, q.err)
	}
	return errors.Join(errs...)
}

// check refuses what no single key shows.
func (c *Config) check() error {
	if c.Root == c.State {
		return fmt.Errorf("root and state are both %s; want two folders: %w", c.Root, errdefs.ErrInvalidArgument)
	}
	if c.Content.Root == c.Transfer.Root {
		return fmt.Errorf("content.root and transfer.root are both %s; want two folders: %w", c.Content.Root, errdefs.ErrInvalidArgument)
	}
	if len(c.Address) > maxSocket {
		return fmt.Errorf("address, which follows from state, is %q and has %d bytes; set address to a path of at most %d bytes: %w",
			c.Address, len(c.Address), maxSocket, errdefs.ErrInvalidArgument)
	}
	return nil
}

// keyLines says on which line each dotted key stands. data is valid TOML.
func keyLines(data []byte) map[string]int {
	lines := map[string]int{}
	var p unstable.Parser
	p.Reset(data)
	var table string
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = noteKey(&p, lines, "", e.Key())
		case unstable.KeyValue:
			noteKeyValue(&p, lines, table, e)
		default:
		}
	}
	return lines
}

func noteKeyValue(p *unstable.Parser, lines map[string]int, table string, kv *unstable.Node) {
	key := noteKey(p, lines, table, kv.Key())
	if v := kv.Value(); v.Kind == unstable.InlineTable {
		for it := v.Children(); it.Next(); {
			noteKeyValue(p, lines, key, it.Node())
		}
	}
}

// noteKey records a key and the tables that it opens, and returns its name with
// a dot at the end.
func noteKey(p *unstable.Parser, lines map[string]int, prefix string, it unstable.Iterator) string {
	for it.Next() {
		n := it.Node()
		name := prefix + string(n.Data)
		if _, seen := lines[name]; !seen {
			lines[name] = p.Shape(n.Raw).Start.Line
		}
		prefix = name + "."
	}
	return prefix
}
