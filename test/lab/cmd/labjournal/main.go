// Labjournal writes the records of package journal in a guest until the file of -stop is there, or checks them.
//
//	labjournal -to /dev/sdb -direct -slots 16384 -run 7 -notes /lab/notes -stop /lab/stop
//	labjournal -check -to /mnt/journal -slots 16384 -run 7 -notes /lab/notes
//
// Every write is O_DSYNC, and with -direct O_DIRECT too. A write that fails ends it with exit code 1, so does a record that
// was acknowledged and is not there.
package main

import (
	"flag"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/test/lab/internal/journal"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "labjournal:", err)
		os.Exit(1)
	}
}

func run() error {
	to := flag.String("to", "", "disk or file")
	direct := flag.Bool("direct", false, "past the page cache")
	slots := flag.Uint64("slots", 1024, "records that there is room for")
	id := flag.Uint64("run", 1, "number of the run")
	notes := flag.String("notes", "", "file for the numbers of what was acknowledged")
	stop := flag.String("stop", "", "file whose being there ends it")
	check := flag.Bool("check", false, "check what is there")
	flag.Parse()
	if *check {
		f, err := os.Open(*to)
		if err != nil {
			return err
		}
		defer f.Close()
		b, err := os.ReadFile(*notes)
		if err != nil {
			return err
		}
		r, err := journal.Check(f, *slots, *id, b)
		fmt.Printf("%d acknowledged, %d ahead\n", r.Acked, r.Ahead)
		return err
	}
	flags := os.O_WRONLY | os.O_CREATE | unix.O_DSYNC
	if *direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(*to, flags, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := os.OpenFile(*notes, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer n.Close()
	w := &journal.Writer{To: f, Slots: *slots, Run: *id, Notes: n, Buf: block.Alloc(journal.Size)}
	last, err := w.Write(func() bool {
		_, err := os.Stat(*stop)
		return err == nil
	})
	fmt.Printf("%d records\n", last)
	return err
}
