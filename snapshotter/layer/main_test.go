package layer

import (
	"io"
	"testing"

	"github.com/containerd/log"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	log.L.Logger.SetOutput(io.Discard) // containerd warns of every attribute that it passes over
	goleak.VerifyTestMain(m)
}
