// Command gantryd serves containerd's content, snapshot and diff services.
package main

import (
	"context"
	_ "embed"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/log"

	"github.com/gantryd/gantry/plugin"
	"github.com/gantryd/gantry/plugin/config"
)

// Exit codes. A second signal ends the process with 128 and the signal's number,
// as a shell would report it.
const (
	exitOK     = 0
	exitFailed = 1
	// A bad command line or configuration, EX_CONFIG of sysexits.h: starting again does not help. Not 2, with which Go's
	// runtime ends after a panic and at SIGABRT, the watchdog's signal.
	exitConfig = 78
)

const usage = `gantryd serves containerd's content, snapshot and diff services on one unix socket.

Usage:
  gantryd [--config FILE]                 run until SIGTERM or SIGINT; a second one ends it at once
  gantryd config default                  print the default configuration, with a comment for each key
  gantryd [--config FILE] config dump     print the configuration that gantryd would run with
  gantryd [--config FILE] config systemd  print a unit for systemd that starts this program, with FILE if given
  gantryd --version | --help

Without --config, ` + config.DefaultPath + ` is read if it exists. --config comes before the command.
Exit codes: 0 after a stop that was asked for, 1 after a failure, 2 after a crash, 78 for a bad command line or configuration.
Beside it: "gantry config containerd" prints what containerd needs, "gantry status" shows what gantryd is doing.
`

//go:embed gantryd.service
var unit string

// unitStart is the line of the embedded unit that names the program.
const unitStart = "ExecStart=/usr/local/bin/gantryd"

// systemdUnit returns a unit that starts the program that runs now, with the
// configuration in file if one is named.
func systemdUnit(file string) (string, error) {
	program, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("where this program is: %w", err)
	}
	start := "ExecStart=" + unitWord(program)
	if file != "" {
		path, err := filepath.Abs(file)
		if err != nil {
			return "", fmt.Errorf("the path of %s: %w", file, err)
		}
		start += " --config " + unitWord(path)
	}
	return strings.Replace(unit, unitStart, start, 1), nil
}

// unitWord is s as one word of a systemd command line.
func unitWord(s string) string {
	s = strings.NewReplacer("%", "%%", "$", "$$").Replace(s)
	if strings.ContainsAny(s, " \t\"'\\;") {
		return strconv.Quote(s)
	}
	return s
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, serve))
}

// run takes the command line apart. It returns the exit code.
func run(args []string, stdout, stderr io.Writer, serve func(*config.Config) error) int {
	flags := flag.NewFlagSet("gantryd", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	file := flags.String("config", "", "")
	version := flags.Bool("version", false, "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return output(stdout, stderr, usage)
	} else if err != nil {
		return misused(stderr, err.Error())
	}
	if *version {
		return output(stdout, stderr, "gantryd "+config.Version+"\n")
	}
	switch command := strings.Join(flags.Args(), " "); command {
	case "help", "config --help", "config -h":
		return output(stdout, stderr, usage)
	case "config":
		return misused(stderr, `config of what? There are "config default", "config dump" and "config systemd"`)
	case "config default":
		return fail(stderr, config.Default().Encode(stdout), exitFailed)
	case "config systemd":
		text, err := systemdUnit(*file)
		if err != nil {
			return fail(stderr, err, exitFailed)
		}
		return output(stdout, stderr, text)
	case "", "config dump":
		c, err := config.Load(*file)
		if err != nil {
			return fail(stderr, err, exitConfig)
		}
		if command != "" {
			return fail(stderr, c.Encode(stdout), exitFailed)
		}
		return fail(stderr, serve(c), exitFailed)
	default:
		return misused(stderr, fmt.Sprintf("unknown command %q", command))
	}
}

func output(stdout, stderr io.Writer, text string) int {
	_, err := io.WriteString(stdout, text)
	return fail(stderr, err, exitFailed)
}

func misused(stderr io.Writer, what string) int {
	_, _ = fmt.Fprintf(stderr, "gantryd: %s; see gantryd --help\n", what)
	return exitConfig
}

func fail(stderr io.Writer, err error, code int) int {
	if err == nil {
		return exitOK
	}
	for line := range strings.SplitSeq(err.Error(), "\n") {
		_, _ = fmt.Fprintf(stderr, "gantryd: %s\n", line)
	}
	return code
}

// serve runs the daemon until a signal or a failure.
func serve(c *config.Config) (err error) {
	if err := errors.Join(log.SetLevel(c.Log.Level), log.SetFormat(log.OutputFormat(c.Log.Format))); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	// Go ends a program that logs to where nobody reads any more, as after a crash of journald. Programs that gantryd starts
	// have the signal as usual, which they would not if it were ignored.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	go func() {
		log.L.WithField("signal", <-signals).Info("stopping; a second signal ends gantryd at once")
		cancel()
		again := <-signals
		log.L.WithField("signal", again).Warn("ending at once")
		code := exitFailed
		if n, ok := again.(syscall.Signal); ok {
			code = 128 + int(n)
		}
		os.Exit(code)
	}()
	d, err := plugin.New(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Run(ctx)
}
