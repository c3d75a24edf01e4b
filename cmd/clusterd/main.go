// Command clusterd is the daemon of a node. Without a verb it is control; its
// workers are the same program:
//
//	clusterd --config FILE                    control: membership, fencing, API
//	clusterd worker storage --config FILE     target and local copies
//	clusterd worker locks --config FILE       locks
//
// Control starts the workers and adopts running ones; nobody else needs to.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/config"
	"github.com/blockhouse-san/blockhouse/internal/logging"
	"github.com/blockhouse-san/blockhouse/internal/version"
	"github.com/blockhouse-san/blockhouse/node/control"
	"github.com/blockhouse-san/blockhouse/node/locks"
	"github.com/blockhouse-san/blockhouse/node/storage"
)

func main() {
	if err := root().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "clusterd:", err)
		var ue usageError
		if errors.As(err, &ue) {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

type usageError struct{ error }

const defaultConfig = "/etc/blockhouse/clusterd.toml"

func root() *cobra.Command {
	var file string
	var printDefault, witness bool
	cmd := &cobra.Command{
		Use: "clusterd", Short: "the daemon of a Blockhouse node", Version: version.String(),
		Args: cobra.NoArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(*cobra.Command, []string) error {
			if printDefault {
				return config.Print(os.Stdout, config.Default())
			}
			cfg, log, err := load(file, witness)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			defer notify(log, daemon.SdNotifyStopping)
			return control.Run(ctx, cfg, file, log, control.Tell{
				Ready: func() { notify(log, daemon.SdNotifyReady) },
				// More often than WatchdogSec asks; without systemd it goes nowhere.
				Alive: func() { notify(log, daemon.SdNotifyWatchdog) },
			})
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	cmd.PersistentFlags().StringVar(&file, "config", defaultConfig, "configuration file (TOML)")
	cmd.Flags().BoolVar(&printDefault, "print-default-config", false, "print a commented configuration with every default, and end")
	cmd.Flags().BoolVar(&witness, "witness", false, "this node has a vote and nothing else (as roles.witness in the file)")
	worker := &cobra.Command{Use: "worker", Short: "the worker processes; control starts them"}
	worker.AddCommand(
		&cobra.Command{Use: "storage", Short: "target and local copies", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			return work(file, storage.Run)
		}},
		&cobra.Command{Use: "locks", Short: "locks", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
			return work(file, locks.Run)
		}},
	)
	cmd.AddCommand(worker)
	return cmd
}

func load(file string, witness bool) (config.Config, *zap.Logger, error) {
	cfg, err := config.Load(file)
	if err != nil {
		return cfg, nil, fmt.Errorf("%w\nnext: clusterd --print-default-config shows every key", err)
	}
	if witness {
		cfg.Roles = config.Roles{Voter: true, Witness: true}
		if err := cfg.Validate(); err != nil {
			return cfg, nil, err
		}
	}
	log, err := logging.New(cfg.Log.Level, cfg.Log.Format)
	return cfg, log, err
}

// work runs a worker until control or a signal ends it. SIGTERM drains: it is
// what an administrator sends who means it; control's own end sends nothing.
func work(file string, run func(context.Context, config.Config, *zap.Logger) error) error {
	cfg, log, err := load(file, false)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	return run(ctx, cfg, log)
}

func notify(log *zap.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("cannot tell systemd", zap.String("state", state), zap.Error(err))
	}
}
