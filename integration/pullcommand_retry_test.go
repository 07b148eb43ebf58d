package integration

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// TestPullCommandRetries has the registry too busy for manifests, or broken, when the pull begins, or for good.
func TestPullCommandRetries(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	var mu sync.Mutex
	first, asked := map[string]time.Time{}, map[string]int{}
	p.SetRule(func(req *http.Request) *harness.Fault {
		var status int
		repository, _, ok := strings.Cut(strings.TrimPrefix(req.URL.Path, "/v2/"), "/manifests/")
		if _, err := fmt.Sscanf(repository, "answers%d", &status); err != nil || !ok {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if asked[repository]++; asked[repository] == 1 {
			first[repository] = time.Now()
		}
		if time.Since(first[repository]) > 1500*time.Millisecond && !strings.HasSuffix(repository, "ever") {
			return nil
		}
		return &harness.Fault{Status: status, RetryAfter: time.Second}
	})
	for how, flag := range map[string]string{"containerd": "--no-containerd=false", "alone": "--no-containerd"} {
		for _, status := range []int{http.StatusTooManyRequests, http.StatusInternalServerError} {
			t.Run(fmt.Sprint(how, " ", status), func(t *testing.T) {
				t.Parallel()
				im, ref := push(t, r, p.Host(), fmt.Sprintf("answers%d/%s", status, how), small(uint64(status), 1<<20))
				if s := gantryPull(t, n, flag, ref); s.Digest != im.Manifest.Digest.String() {
					t.Errorf("got %+v, want %s", s, im.Manifest.Digest)
				}
			})
		}
		t.Run(how+" forever", func(t *testing.T) {
			t.Parallel()
			repository := "answers503/" + how + "/forever"
			if _, err := n.GantryCLI(t.Context(), "pull", flag, p.Host()+"/"+repository+":test"); err == nil || !strings.Contains(err.Error(), "503") {
				t.Errorf("got %v, want the registry's answer 503", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if n := asked[repository]; n < 4 || n > 16 {
				t.Errorf("the registry was asked %d times", n)
			}
		})
	}
}

// TestPullCommandOtherPlatform asks for a platform that an image is not for, where there is no index to choose from.
func TestPullCommandOtherPlatform(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	spec := small(39, 1<<20)
	spec.Edit = func(_ *ocispec.Manifest, c *ocispec.Image) {
		c.Platform = ocispec.Platform{OS: "linux", Architecture: "s390x"}
	}
	_, ref := push(t, r, p.Host(), "mainframe", spec)
	for _, flag := range []string{"--no-containerd=false", "--no-containerd"} {
		p.Forget()
		_, err := n.GantryCLI(t.Context(), "pull", flag, "--platform", "linux/arm64", ref)
		if err == nil || !strings.Contains(err.Error(), "no image for platform linux/arm64, there is linux/s390x (choose with --platform)") {
			t.Errorf("%s: got %v, want that it is for linux/s390x", flag, err)
		}
		if flag == "--no-containerd" && p.SentTo(harness.Gantry) > 100<<10 {
			t.Errorf("%d bytes were sent before it was refused", p.SentTo(harness.Gantry))
		}
		if _, err := n.GantryCLI(t.Context(), "pull", flag, "--platform", "linux/s390x", ref); err != nil {
			t.Errorf("%s: %v", flag, err)
		}
	}
}
