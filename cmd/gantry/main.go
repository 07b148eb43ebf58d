// Command gantry is the command line beside gantryd: what containerd has to be
// told, and what gantryd is doing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/log"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/setup"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2 // a bad command line or configuration, or a check that could not be made
)

const usage = `gantry tells what gantryd is doing, and containerd what it needs to use it.

Usage:
  gantry [--config FILE] status [--json]    transfers and unpacks under way, and where the last layers' time went
  gantry [--config FILE] pull REF           pull an image through containerd, or only fetch it where containerd does not run
  gantry [--config FILE] check [--repair]   verify all that gantryd keeps; with --repair, cure what is broken
  gantry [--config FILE] content restore    fetch again what gantryd has discarded (content.retain)
  gantry [--config FILE] config containerd  print a drop-in for the imports of containerd's configuration
  gantry help [COMMAND]
  gantry --version | --help

FILE is gantryd's configuration. Without --config, ` + config.DefaultPath + ` is read if it exists.
--config may also follow the command.
Exit codes: 0, 1 after a failure (gantryd is not running, ...), 2 for a bad command line or configuration, and for a check
that could not be made.
`

// command is one thing that gantry does.
type command struct {
	name string // its words
	help string
	// run gets the configuration and what follows the name.
	run func(ctx context.Context, c *config.Config, flags *flag.FlagSet, stdout io.Writer) error
	// define adds the command's own flags.
	define func(*flag.FlagSet)
	// args names the words that the command wants beside its flags; all of them, in flags.Args().
	args []string
}

func commands() []command {
	return []command{statusCommand, pullCommand, checkCommand, restoreCommand, containerdCommand}
}

// usageError is a mistake in the command line.
type usageError struct{ text string }

func (e usageError) Error() string { return e.text }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)                 // the second one ends the process at once
	if err := log.SetLevel("warn"); err != nil { // what libraries say meanwhile
		panic(err)
	}
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run does what args say and returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := dispatch(ctx, args, stdout)
	if err == nil {
		return exitOK
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		_, _ = fmt.Fprintf(stderr, "gantry: %s\n", line)
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[configError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[uncheckedError](err); ok {
		return exitUsage
	}
	return exitFailed
}

// configError is a configuration that does not load.
type configError struct{ error }

func (e configError) Unwrap() error { return e.error }

func dispatch(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("gantry", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	file := flags.String("config", "", "")
	version := flags.Bool("version", false, "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return print(stdout, usage)
	} else if err != nil {
		return usageError{err.Error() + "; see gantry --help"}
	}
	args = flags.Args()
	switch {
	case *version:
		return print(stdout, "gantry "+config.Version+"\n")
	case len(args) == 0:
		return usageError{"no command; see gantry --help"}
	case args[0] == "help":
		return help(args[1:], stdout)
	}
	cmd, rest, err := find(args)
	if err != nil {
		return err
	}
	own := flag.NewFlagSet(cmd.name, flag.ContinueOnError)
	own.SetOutput(io.Discard)
	own.StringVar(file, "config", *file, "") // after the command too
	if cmd.define != nil {
		cmd.define(own)
	}
	if err := cmd.parse(own, rest); errors.Is(err, flag.ErrHelp) {
		return print(stdout, cmd.help)
	} else if err != nil {
		return usageError{fmt.Sprintf("%s: %v; see gantry help %s", cmd.name, err, cmd.name)}
	}
	c, err := config.Load(*file)
	if err != nil {
		return configError{err}
	}
	return cmd.run(ctx, c, own, stdout)
}

// parse reads flags and words in any order; flags.Args() are the words then.
func (c command) parse(flags *flag.FlagSet, args []string) error {
	var words []string
	for {
		if err := flags.Parse(args); err != nil {
			return err
		}
		args = flags.Args()
		if len(args) == 0 {
			break
		}
		words, args = append(words, args[0]), args[1:]
	}
	switch n := len(c.args); {
	case len(words) < n:
		return fmt.Errorf("%s is missing", c.args[len(words)])
	case len(words) > n:
		return fmt.Errorf("unexpected %q", words[n])
	}
	return flags.Parse(append([]string{"--"}, words...))
}

// find returns the command that args begin with, and what follows.
func find(args []string) (command, []string, error) {
	for _, c := range commands() {
		words := strings.Fields(c.name)
		if len(args) >= len(words) && slices.Equal(args[:len(words)], words) {
			return c, args[len(words):], nil
		}
	}
	if args[0] == "config" {
		return command{}, nil, usageError{`config of what? There is "gantry config containerd"; gantryd's own configuration is printed by "gantryd config default" and "gantryd config dump"`}
	}
	return command{}, nil, usageError{fmt.Sprintf("unknown command %q; see gantry --help", strings.Join(args, " "))}
}

func help(args []string, stdout io.Writer) error {
	if len(args) == 0 {
		return print(stdout, usage)
	}
	c, rest, err := find(args)
	if err != nil {
		return err
	}
	if len(rest) > 0 {
		return usageError{fmt.Sprintf("unknown command %q; see gantry --help", strings.Join(args, " "))}
	}
	return print(stdout, c.help)
}

func print(w io.Writer, text string) error {
	_, err := io.WriteString(w, text)
	return err
}

var containerdCommand = command{
	name: "config containerd",
	help: `Usage: gantry [--config FILE] config containerd

Prints what containerd 2 needs to use the gantryd that FILE configures: three proxy plugins, and the places
where containerd chooses its content store, differ and snapshotter. Save it where containerd imports it:

  gantry config containerd > /etc/containerd/conf.d/gantry.toml

Whether containers in user namespaces may use id-mapped mounts is asked of gantryd or, where it does not run, tried:
that takes root. /etc/containerd/config.toml needs imports = ["/etc/containerd/conf.d/*.toml"] at its top. Then restart
containerd. To go back, see the comment at the top of what is printed.
`,
	run: func(ctx context.Context, c *config.Config, _ *flag.FlagSet, stdout io.Writer) error {
		return c.WriteContainerd(stdout, notIDMapped(ctx, c))
	},
}

// notIDMapped asks gantryd whether it maps layers for user namespaces; where it
// does not run, this process tries as gantryd will. nil: it does.
func notIDMapped(ctx context.Context, c *config.Config) error {
	report, err := fetch(ctx, c.Address)
	switch {
	case err != nil:
		return setup.IDMapped(ctx, c)
	case report.Mount.IDMapped:
		return nil
	case report.Mount.NotIDMapped == "":
		return errors.New("the gantryd that is running does not know of it")
	}
	return errors.New(report.Mount.NotIDMapped)
}
