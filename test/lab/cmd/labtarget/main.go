// Labtarget serves files as the LUNs 1, 2, ... of one iSCSI target with the product's own target package and no cluster, for
// scenarios about the target alone.
//
//	labtarget -iqn iqn.2026-11.lab:disk1 -portal 10.99.0.1:3260 [-portal ...] -lun FILE [-lun ...]
//
// It writes "serving IQN" when logins are taken and ends at SIGTERM or SIGINT with exit code 0.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/target"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "labtarget:", err)
		os.Exit(1)
	}
}

func run(args []string) (err error) {
	t := target.Target{TPGT: 1, RelPort: 1, ACL: target.ACL{Open: true}}
	var files []string
	fs := flag.NewFlagSet("labtarget", flag.ContinueOnError)
	fs.StringVar(&t.IQN, "iqn", "", "name of the target")
	fs.Func("portal", "ADDRESS:PORT to listen on; may be repeated", func(s string) error {
		p, err := netip.ParseAddrPort(s)
		t.Portals = append(t.Portals, p)
		return err
	})
	fs.Func("lun", "file or block device of the next LUN; may be repeated", func(s string) error {
		files = append(files, s)
		return nil
	})
	tpgt := fs.Uint("tpgt", 1, "target portal group tag, also the relative port")
	if err := fs.Parse(args); err != nil {
		return err
	}
	if *tpgt == 0 || *tpgt > 65535 || fs.NArg() > 0 || len(files) == 0 {
		return errors.New("want -iqn, -portal, at least one -lun, and -tpgt from 1 to 65535")
	}
	t.TPGT, t.RelPort = uint16(*tpgt), uint16(*tpgt)
	log, err := zap.NewDevelopment()
	if err != nil {
		return err
	}
	for i, f := range files {
		dev, err := file.Open(f, file.Options{Logger: log})
		if err != nil {
			return err
		}
		// Behind the server's end: Close of the server has drained all I/O.
		defer func() { err = errors.Join(err, dev.Close()) }()
		t.LUNs = append(t.LUNs, lun(scsi.LUN(i+1), f, dev))
	}
	srv, err := target.New(target.Options{Logger: log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, srv.Close()) }()
	if err := srv.Apply(target.Config{Targets: []target.Target{t}}); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	fmt.Println("serving", t.IQN)
	<-ctx.Done()
	return nil
}

// lun derives the identity from the file's name, so that a restarted target shows the same disk.
func lun(n scsi.LUN, name string, dev *file.File) target.LUN {
	if abs, err := filepath.Abs(name); err == nil {
		name = abs
	}
	id := uuid.NewSHA1(uuid.NameSpaceURL, []byte("file://"+name))
	text := id.String()
	return target.LUN{
		Number: n, Volume: text, Generation: 1, Device: dev, Gate: target.Open{},
		Identity: target.Identity{Product: text[:8] + "-lab", Revision: "0001", Serial: text, UUID: id},
	}
}
