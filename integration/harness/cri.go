package harness

import (
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CRI is what the kubelet and crictl talk to.
type CRI struct {
	runtime.RuntimeServiceClient
	runtime.ImageServiceClient

	conn *grpc.ClientConn
}

// CRI connects to containerd's CRI plugin, which [Options.CRI] switches on. The caller closes it.
func (n *Node) CRI() (*CRI, error) {
	if !n.options.CRI {
		return nil, errors.New("the node was started without CRI")
	}
	conn, err := grpc.NewClient("unix://"+n.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	return &CRI{runtime.NewRuntimeServiceClient(conn), runtime.NewImageServiceClient(conn), conn}, nil
}

// Close ends the connection. Pods go on.
func (c *CRI) Close() error { return c.conn.Close() }
