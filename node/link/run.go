package link

import (
	"context"
	"fmt"

	"github.com/google/uuid"
	"go.uber.org/zap"
)

// Run is the frame of a worker process: it takes the node's lock for this kind,
// listens, and serves controls until ctx ends or work returns. work is the
// worker's own loop, which gets the server for its requests.
func Run(ctx context.Context, runDir string, k Kind, h Handler, work func(context.Context, *Server) error, log *zap.Logger) error {
	inc := uuid.NewString()
	lock, err := Hold(runDir, string(k), inc)
	if err != nil {
		return err
	}
	defer lock.Close()
	p, err := Self(inc)
	if err != nil {
		return fmt.Errorf("worker %s: %w", k, err)
	}
	s, err := Listen(Socket(runDir, k), WorkerHello{Kind: k, Incarnation: inc, PID: p.PID, Start: p.Start}, h, log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(ctx) }()
	log.Info("worker is up", zap.String("worker", string(k)), zap.String("incarnation", inc), zap.Int("pid", p.PID))
	err = work(ctx, s)
	cancel()
	<-done
	return err
}
