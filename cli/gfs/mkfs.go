package gfs

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/cli/size"
	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// Exit statuses of mkfs.gfs2.
const (
	mkfsRefused = 255 // exit(-1): bad input, or the answer was no
	mkfsFailed  = 1   // the device cannot be opened, read or written
)

type mkfsRun struct {
	*App
	ctx    context.Context
	name   string
	gfs1   bool // gfs_mkfs: the table of GFS1
	cfg    mkfs.Config
	target string

	haveSUnit, haveSWidth, haveTable    bool
	force, quiet, debug, keep, jsonText bool
	uuidText                            string
	done                                bool // -h, -V or -o help: nothing is left to do
}

func (a *App) mkfs(ctx context.Context, name string, args []string) int {
	m := &mkfsRun{App: a, ctx: ctx, name: name, gfs1: name == "gfs_mkfs"}
	err := m.parse(args)
	if err == nil && !m.done {
		err = m.run()
	}
	var rc exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &rc):
		if rc.err == nil {
			return rc.code
		}
		err = rc.err
	default:
		rc.code = mkfsRefused
	}
	fmt.Fprintln(a.Err, err)
	var me *mkfs.Error
	if errors.As(err, &me) && me.Hint != "" {
		fmt.Fprintf(a.Err, "%s: %s\n", name, me.Hint)
	}
	var ue *usageError
	if errors.As(err, &ue) {
		fmt.Fprintln(a.Err, "Please use '-h' for help.")
	}
	return rc.code
}

// exitError carries an exit status; err is nil when all has been said.
type exitError struct {
	code int
	err  error
}

func (e exitError) Error() string {
	if e.err == nil {
		return "exit status " + strconv.Itoa(e.code)
	}
	return e.err.Error()
}
func (e exitError) Unwrap() error { return e.err }

func bad(hint, format string, a ...any) error {
	return &mkfs.Error{Msg: fmt.Sprintf(format, a...), Hint: hint}
}

func (m *mkfsRun) parse(args []string) error {
	spec := "b:c:DhJ:j:KOo:p:qr:t:U:V"
	if m.gfs1 {
		spec += "s:"
	}
	opts, err := getopt(m.name, spec, map[string]bool{"json": false, "help": false, "version": false}, args)
	if err != nil {
		return err
	}
	c := &m.cfg
	for _, o := range opts {
		switch {
		case o.letter == 'h' || o.long == "help":
			m.usage()
			m.done = true
			return nil
		case o.letter == 'V' || o.long == "version":
			fmt.Fprintf(m.Out, "%s %s\n", m.name, version.String())
			m.done = true
			return nil
		case o.long == "json":
			m.jsonText = true
		}
		switch o.letter {
		case 'b':
			n, err := size.Parse(o.arg)
			if err != nil || n <= 0 || n > 1<<30 {
				return bad("", "Block size must be a power of two between 512 and %d", min(os.Getpagesize(), ondisk.MaxBlock))
			}
			c.BlockSize = int(n)
		case 'c':
			if c.QuotaMB, err = megabytes(o.arg); err != nil || c.QuotaMB == 0 {
				return bad("-c takes 1 to 64 megabytes", "Bad quota change size")
			}
		case 'J':
			if c.JournalMB, err = megabytes(o.arg); err != nil || c.JournalMB == 0 {
				return bad("-J takes 8 to 1024 megabytes, as in -J 64 or -J 64M", "Bad journal size")
			}
		case 'r':
			if c.RGMB, err = megabytes(o.arg); err != nil || c.RGMB == 0 {
				return bad("-r takes 32 to 2048 megabytes", "Bad resource group size")
			}
		case 'j':
			n, err := strconv.Atoi(o.arg)
			switch {
			case err != nil && strings.ContainsAny(o.arg[:min(1, len(o.arg))], "123456789"):
				return bad("-j takes a whole number, one journal for each node", "Invalid number of journals: %s", o.arg)
			case err != nil || n == 0:
				return bad("-j takes a whole number, one journal for each node", "No journals specified")
			case n > 1<<16:
				return bad("", "Invalid number of journals: %s", o.arg)
			}
			c.Journals = n
		case 'p':
			c.LockProto = o.arg
			if o.arg == "" {
				c.LockProto = " "
			}
		case 't':
			if o.arg == "" {
				return bad("the form is -t CLUSTER:FSNAME", "Lock table is empty.")
			}
			c.LockTable, m.haveTable = o.arg, true
		case 'U':
			m.uuidText = o.arg
		case 'o':
			if err := m.extended(o.arg); err != nil || m.done {
				return err
			}
		case 's':
			fmt.Fprintf(m.Err, "%s: -s (blocks in a journal segment) has no meaning in GFS2; ignored\n", m.name)
		case 'D':
			m.debug = true
		case 'K':
			m.keep = true
		case 'O':
			m.force = true
		case 'q':
			m.quiet = true
		case 0:
			if o.long != "" || o.arg == "gfs2" || o.arg == "gfs" { // mkfs -t gfs2 may pass the type on
				continue
			}
			n, nerr := strconv.ParseUint(o.arg, 10, 64)
			switch {
			case m.target == "":
				m.target = o.arg
			case c.Blocks == 0 && nerr == nil && n > 0:
				c.Blocks = n
			case c.Blocks == 0 && o.arg[:min(1, len(o.arg))] != "" && o.arg[0] >= '0' && o.arg[0] <= '9':
				return bad("the size is a number of filesystem blocks", "Invalid size: %s", o.arg)
			default:
				return bad("", "More than one device specified (try -h for help)")
			}
		}
	}
	if m.target == "" {
		return bad("", "No device specified. Use -h for help")
	}
	if m.haveSUnit != m.haveSWidth {
		return bad("say -o sunit=BYTES,swidth=BYTES", "Stripe unit and stripe width must be specified together")
	}
	if err := c.Check(); err != nil {
		return err
	}
	if m.uuidText == "" {
		c.UUID = [16]byte(uuid.New())
		return nil
	}
	u, err := uuid.Parse(m.uuidText)
	if err != nil || len(m.uuidText) != 36 {
		return bad("the form is 1b4e28ba-2fa1-11d2-883f-b9a761bde3fb", "Failed to parse UUID option.")
	}
	c.UUID = [16]byte(u)
	return nil
}

// megabytes reads a size whose plain number means megabytes. 32MB is what the
// original prints sizes as, so it is read like 32M here.
func megabytes(s string) (int, error) {
	if n, err := strconv.Atoi(s); err == nil {
		return n, nil
	}
	if t := strings.TrimSuffix(strings.TrimSuffix(s, "B"), "b"); strings.HasSuffix(s, "B") && len(t) > 0 && strings.ContainsAny(t[len(t)-1:], "MG") {
		s = t
	}
	n, err := size.Parse(s)
	if err != nil {
		return 0, err
	}
	if n <= 0 || n%(1<<20) != 0 || n>>20 > 1<<20 {
		return 0, fmt.Errorf("%s is not a whole number of megabytes", s)
	}
	return int(n >> 20), nil
}

var extOptions = []struct{ key, what string }{
	{"help", "Display this help, then exit"},
	{"swidth=N", "Specify the stripe width of the device, overriding probed values"},
	{"sunit=N", "Specify the stripe unit of the device, overriding probed values"},
	{"align=[0|1]", "Disable or enable alignment of resource groups"},
	{"format=N", "Specify the format version number"},
}

func (m *mkfsRun) extHelp() {
	fmt.Fprintln(m.Out, "Extended options:")
	for _, o := range extOptions {
		fmt.Fprintf(m.Out, "%15s  %s\n", o.key, o.what)
	}
}

// extended reads the argument of -o.
func (m *mkfsRun) extended(s string) error {
	for _, part := range strings.Split(s, ",") {
		key, val, has := strings.Cut(part, "=")
		number := func() (uint64, error) {
			if !has || val == "" {
				return 0, bad("", "Missing argument to '%s'", key)
			}
			n, err := size.Parse(strings.ToUpper(val))
			if err != nil {
				return 0, bad("", "Value of '%s' is invalid", key)
			}
			return uint64(n), nil
		}
		var err error
		switch key {
		case "":
			return bad("", "Missing argument to '-o' option")
		case "help":
			m.extHelp()
			m.done = true
			return nil
		case "sunit":
			m.cfg.SUnit, err = number()
			m.haveSUnit = true
			if err == nil && m.cfg.SUnit == 0 {
				err = bad("", "Value of 'sunit' is invalid")
			}
		case "swidth":
			m.cfg.SWidth, err = number()
			m.haveSWidth = true
			if err == nil && m.cfg.SWidth == 0 {
				err = bad("", "Value of 'swidth' is invalid")
			}
		case "align":
			if val != "0" && val != "1" {
				return bad("", "Option 'align' must be either 1 or 0")
			}
			m.cfg.NoAlign = val == "0"
		case "format":
			var n uint64
			if n, err = number(); err == nil && n != ondisk.Format1801 && n != ondisk.Format1802 {
				err = bad("-o format takes 1801 or 1802", "Invalid filesystem format: %d", n)
			}
			m.cfg.Format = uint32(n)
		default:
			m.extHelp()
			return bad("", "Invalid extended option (specified with -o): '%s'", key)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// say prints on stdout unless -q or --json.
func (m *mkfsRun) say(format string, a ...any) {
	if !m.jsonText {
		fmt.Fprintf(m.Out, format, a...)
	}
}

func (m *mkfsRun) run() (err error) {
	dev, err := m.open(m.ctx, m.target, true)
	if err != nil {
		text := pathText(m.target, err)
		if strings.Contains(text, "busy") {
			text += "\n" + m.name + ": it is mounted or in use by another driver; unmount it first"
		}
		return exitError{mkfsFailed, errors.New(text)}
	}
	defer func() {
		if cerr := dev.Close(); cerr != nil && err == nil {
			err = exitError{mkfsFailed, fmt.Errorf("close %s: %w", m.target, cerr)}
		}
	}()
	found, err := disk.Probe(dev)
	if err != nil {
		return exitError{mkfsFailed, fmt.Errorf("read %s: %w", m.target, err)}
	}
	switch {
	case found.Table:
		m.say("It appears to contain a partition table (%s).\n", found.Type)
	case found.Type != "":
		m.say("It appears to contain an existing filesystem (%s)\n", found.Type)
	}
	t := dev.Topology()
	m.cfg.Now = m.Now().Unix()
	m.cfg.Rand = randomUint32
	l, err := mkfs.Plan(m.cfg, dev.Size(), mkfs.Topology{Logical: t.Logical, Physical: t.Physical, MinIO: t.MinIO, OptIO: t.OptIO})
	if err != nil {
		return err
	}
	if m.debug {
		m.printPlan(l)
	}
	if t.Physical > l.Geom.BlockSize {
		m.say("Warning: Block size %d is inefficient because it is less than the physical block size (%d).\n", l.Geom.BlockSize, t.Physical)
	}
	path := m.target
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSymlink != 0 {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			if real, err = filepath.Abs(real); err == nil {
				m.say("%s is a symbolic link to %s\n", path, real)
				path = real
			}
		}
	}
	m.say("This will destroy any data on %s\n", path)
	if !m.force {
		if err := m.confirm(); err != nil {
			return err
		}
	}
	if t.Block && !m.keep {
		m.line("Discarding device contents (may take a while on large devices): ")
		if err := dev.Discard(0, dev.Size()); err != nil && !errors.Is(err, disk.ErrNoDiscard) {
			// Not needed for a right filesystem: said, and gone on.
			fmt.Fprintf(m.Err, "%s: discard: %v\n", m.name, err)
		}
		m.line("Done\n")
	}
	bar := &progressBar{w: m.Out, silent: m.quiet || m.jsonText || m.gfs1, draw: isTerminal(m.Out)}
	if m.gfs1 && !m.quiet && !m.jsonText {
		m.table1(l, m.target)
		fmt.Fprintln(m.Out, "\nSyncing...")
	}
	res, err := mkfs.Make(m.ctx, dev, l, bar.update)
	if err != nil {
		bar.end()
		return exitError{mkfsFailed, fmt.Errorf("%s: %w\n%s: the device holds no filesystem now", m.target, err, m.name)}
	}
	switch {
	case m.jsonText:
		return m.printJSON(res, dev.Size())
	case m.quiet:
	case m.gfs1:
		fmt.Fprintln(m.Out, "All Done")
	default:
		m.table2(res, dev.Size())
	}
	return nil
}

// line prints progress text where plain progress is wanted.
func (m *mkfsRun) line(s string) {
	if !m.quiet && !m.jsonText && !m.gfs1 {
		fmt.Fprint(m.Out, s)
	}
}

// confirm asks until it gets an answer; the end of input is a no.
func (m *mkfsRun) confirm() error {
	r := bufio.NewReader(m.In)
	w := m.Out
	if m.jsonText {
		w = m.Err // stdout is for the result
	}
	for {
		fmt.Fprint(w, "Are you sure you want to proceed? [y/n] ")
		s, err := r.ReadString('\n')
		switch c := strings.TrimSpace(s); {
		case c != "" && (c[0] == 'y' || c[0] == 'Y'):
			return nil
		case c != "" && (c[0] == 'n' || c[0] == 'N'):
			return exitError{code: mkfsRefused}
		}
		if err != nil {
			fmt.Fprintln(w)
			if !errors.Is(err, io.EOF) {
				return exitError{mkfsFailed, fmt.Errorf("read the answer: %w", err)}
			}
			return exitError{code: mkfsRefused}
		}
	}
}

func row(w io.Writer, key, format string, a ...any) {
	fmt.Fprintf(w, "%-27s%s\n", key, fmt.Sprintf(format, a...))
}

func gigabytes(blocks, bs uint64) string {
	return fmt.Sprintf("%.2f GB (%d blocks)", float64(blocks)*float64(bs)/(1<<30), blocks)
}

func (m *mkfsRun) table2(res mkfs.Result, bytes int64) {
	l := res.Layout
	bs := uint64(l.Geom.BlockSize)
	row(m.Out, "Device:", "%s", m.target)
	row(m.Out, "Block size:", "%d", bs)
	row(m.Out, "Device size:", "%.2f GB (%d blocks)", float64(bytes)/(1<<30), uint64(bytes)/bs)
	row(m.Out, "Filesystem size:", "%s", gigabytes(l.FSBlocks, bs))
	row(m.Out, "Journals:", "%d", l.Journals)
	row(m.Out, "Journal size:", "%dMB", l.JournalMB)
	row(m.Out, "Resource groups:", "%d", len(l.RGs))
	row(m.Out, "Locking protocol:", "%q", l.LockProto)
	row(m.Out, "Lock table:", "%q", l.LockTable)
	row(m.Out, "UUID:", "%s", ondisk.FormatUUID(l.UUID))
}

// table1 is gfs_mkfs' table, which came before the work was done.
func (m *mkfsRun) table1(l *mkfs.Layout, dev string) {
	row(m.Out, "Device:", "%s", dev)
	row(m.Out, "Blocksize:", "%d", l.Geom.BlockSize)
	row(m.Out, "Filesystem Size:", "%d", l.FSBlocks)
	row(m.Out, "Journals:", "%d", l.Journals)
	row(m.Out, "Resource Groups:", "%d", len(l.RGs))
	row(m.Out, "Locking Protocol:", "%s", l.LockProto)
	row(m.Out, "Lock Table:", "%s", l.LockTable)
}

// mkfsJSON is the result of --json; sizes are bytes where the name does not say
// blocks.
type mkfsJSON struct {
	APIVersion       string `json:"apiVersion"`
	Kind             string `json:"kind"`
	Device           string `json:"device"`
	DeviceSize       int64  `json:"deviceSize"`
	BlockSize        int    `json:"blockSize"`
	FilesystemBlocks uint64 `json:"filesystemBlocks"`
	Journals         int    `json:"journals"`
	JournalSize      int64  `json:"journalSize"`
	ResourceGroups   int    `json:"resourceGroups"`
	LockProto        string `json:"lockProto"`
	LockTable        string `json:"lockTable"`
	UUID             string `json:"uuid"`
	Format           uint32 `json:"format"`
	WriteCalls       int    `json:"writeCalls"`
}

func (m *mkfsRun) printJSON(res mkfs.Result, bytes int64) error {
	l := res.Layout
	e := json.NewEncoder(m.Out)
	e.SetIndent("", "  ")
	return e.Encode(mkfsJSON{
		APIVersion: "v1", Kind: "Filesystem", Device: m.target, DeviceSize: bytes, BlockSize: l.Geom.BlockSize,
		FilesystemBlocks: l.FSBlocks, Journals: l.Journals, JournalSize: int64(l.JournalMB) << 20, ResourceGroups: len(l.RGs),
		LockProto: l.LockProto, LockTable: l.LockTable, UUID: ondisk.FormatUUID(l.UUID), Format: l.Format, WriteCalls: res.Writes,
	})
}

func (m *mkfsRun) printPlan(l *mkfs.Layout) {
	m.say("File system options:\n")
	m.say("  bsize = %d\n  qcsize = %d\n  jsize = %d\n  journals = %d\n", l.BlockSize, l.QuotaMB, l.JournalMB, l.Journals)
	m.say("  proto = %s\n  table = %s\n  rgsize = %d\n  fssize = %d\n", l.LockProto, l.LockTable, l.RGMB, l.Blocks)
	m.say("  sunit = %d\n  swidth = %d\n  format = %d\n", l.SUnit, l.SWidth, l.Format)
	if l.NoAlign || l.Align.Base == 0 {
		m.say("  rgrp align = (disabled)\n")
	} else {
		m.say("  rgrp align = %d+%d blocks\n", l.Align.Base, l.Align.Off)
	}
	for _, rg := range l.RGs {
		m.say("  ri_addr: %d  ri_length: %d  ri_data0: %d  ri_data: %d  ri_bitbytes: %d\n", rg.Addr, rg.Length, rg.Data0, rg.Data, rg.Bitbytes)
	}
}

func (m *mkfsRun) usage() {
	fmt.Fprintf(m.Out, "Usage:\n%s [options] <device> [size]\n\n", m.name)
	fmt.Fprint(m.Out, "Create a gfs2 file system on a device. If a size, in blocks, is not specified, the whole device will be used.\n"+
		"The device is a block device, a file, or iscsi://HOST[:PORT]/IQN/LUN.\n\nOptions:\n")
	rows := [][3]string{
		{"-b", "<size>", "File system block size, in bytes"},
		{"-c", "<size>", "Size of quota change file, in megabytes"},
		{"-D", "", "Enable debugging code"},
		{"-h", "", "Display this help, then exit"},
		{"-J", "<size>", "Size of journals, in megabytes"},
		{"-j", "<number>", "Number of journals"},
		{"--json", "", "Print the result as JSON"},
		{"-K", "", "Don't try to discard unused blocks"},
		{"-O", "", "Don't ask for confirmation"},
		{"-o", "<key>[=<value>][,...]", "Specify extended options. See '-o help'."},
		{"-p", "<name>", "Name of the locking protocol"},
		{"-q", "", "Don't print anything"},
		{"-r", "<size>", "Size of resource groups, in megabytes"},
		{"-t", "<name>", "Name of the lock table"},
		{"-U", "<UUID>", "The UUID of the file system"},
		{"-V", "", "Display program version information, then exit"},
	}
	if m.gfs1 {
		rows = append(rows, [3]string{"-s", "<blocks>", "Journal segment size: accepted and ignored"})
	}
	for _, r := range rows {
		fmt.Fprintf(m.Out, "%3s %-22s %s\n", r[0], r[1], r[2])
	}
}

func randomUint32() uint32 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return binary.NativeEndian.Uint32(b[:])
}
