package client

import (
	"context"
	"regexp"
	"time"
)

// pauses are how long a registry is left alone that cannot answer for a manifest just now. containerd's resolver asks again
// after some answers, at once, and tells nobody for how long the registry wants to be left alone.
var pauses = []time.Duration{time.Second, 2 * time.Second, 4 * time.Second}

// busyAnswer is in the errors of containerd's resolver. Those that come from containerd itself are nothing but text.
var busyAnswer = regexp.MustCompile(`unexpected status from \w+ request to \S+/manifests/\S+: (408|429|500|502|503|504)\b`)

// patiently calls ask, and again after pauses while a registry has no answer for a manifest that would stand.
func patiently(ctx context.Context, ask func() error) error {
	for _, pause := range pauses {
		err := ask()
		if err == nil || !busyAnswer.MatchString(err.Error()) {
			return err
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return context.Cause(ctx)
		}
	}
	return ask()
}
