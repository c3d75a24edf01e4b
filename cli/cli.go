// Package cli holds every command that a user types: the noun-verb tree
// (cli/verbs), the demo, and the legacy faces that argv[0] picks. The commands
// talk to clusterd through package api, or work on a device by themselves.
//
// cmd imports it; it imports api, config, the storage row's initiator and gfs,
// and nothing of node.
package cli

import (
	"context"
	"io"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/blockhouse-san/blockhouse/cli/cman"
	"github.com/blockhouse-san/blockhouse/cli/gfs"
	"github.com/blockhouse-san/blockhouse/cli/tgt"
	"github.com/blockhouse-san/blockhouse/cli/verbs"
)

// Main runs the command that argv0 names and returns its exit status. A name
// that is no face is clusteradm itself. SIGINT, SIGTERM and SIGHUP end it in
// order.
func Main(argv0 string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	name := filepath.Base(argv0)
	if i := slices.IndexFunc(faces, func(f verbs.Face) bool { return f.Name == name }); i >= 0 {
		return faces[i].Main(name, args, stdin, stdout, stderr)
	}
	ctx, stop := signals()
	defer stop()
	return verbs.Run(ctx, "clusteradm", args, verbs.IO{In: stdin, Out: stdout, Err: stderr, Faces: faces})
}

func signals() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
}

// faces are the names that a link to one of our binaries may have.
var faces = allFaces()

func allFaces() []verbs.Face {
	l := []verbs.Face{
		{Name: "fence_ack_manual", Of: "clusteradm", Short: "cman's: tell the cluster that you have reset a lost node", Main: fenceAck},
		{Name: "fence_manual", Of: "clusteradm", Short: "the same, by the name of the agent", Main: fenceAck},
	}
	for _, f := range cman.Faces() {
		l = append(l, verbs.Face{Name: f.Name, Of: "clusteradm", Short: f.Short, Main: cman.Main})
	}
	for _, f := range tgt.Faces() {
		l = append(l, verbs.Face{Name: f.Name, Of: "clusteradm", Short: f.Short, Main: func(_ string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
			ctx, stop := signals()
			defer stop()
			return f.Main(ctx, args, tgt.IO{In: stdin, Out: stdout, Err: stderr})
		}})
	}
	for _, f := range gfs.Faces() {
		l = append(l, verbs.Face{Name: f.Name, Of: f.Of, Short: f.Short, Main: gfs.Main})
	}
	return l
}

func fenceAck(argv0 string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, stop := signals()
	defer stop()
	return verbs.FenceAckFace(ctx, argv0, args, stdin, stdout, stderr)
}
