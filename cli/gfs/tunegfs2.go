package gfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/gfs/tool"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// Exit statuses of tunegfs2: sysexits(3).
const (
	exUsage   = 64
	exDataErr = 65
	exIOErr   = 74
)

const tuneUsage = "Usage: tunegfs2 [-hlV] [-L <label>] [-U <UUID>] [-o <mount options>] [-r <version>] <device>\n"

func (a *App) tunegfs2(ctx context.Context, name string, args []string) int {
	fail := func(rc int, format string, x ...any) int {
		fmt.Fprintf(a.Err, format+"\n", x...)
		return rc
	}
	opts, err := getopt(name, "hL:U:lo:Vr:", nil, args)
	if err != nil {
		fmt.Fprint(a.Out, tuneUsage)
		return fail(exUsage, "%v", err)
	}
	var list, setLabel, setUUID, setProto, setTable, setFormat bool
	var label, proto, table, format, uuidText, dev string
	for _, o := range opts {
		switch o.letter {
		case 'h':
			fmt.Fprint(a.Out, tuneUsage)
			return 0
		case 'V':
			fmt.Fprintf(a.Out, "%s %s\n", name, version.String())
			return 0
		case 'l':
			list = true
		case 'L':
			label, setLabel = o.arg, true
		case 'U':
			uuidText, setUUID = o.arg, true
		case 'r':
			format, setFormat = o.arg, true
		case 'o':
			for _, kv := range strings.Split(o.arg, ",") {
				k, v, _ := strings.Cut(kv, "=")
				switch k {
				case "lockproto":
					proto, setProto = v, true
				case "locktable":
					table, setTable = v, true
				default:
					return fail(exDataErr, "Invalid option '%s': lockproto=NAME and locktable=CLUSTER:FSNAME are stored in the superblock", k)
				}
			}
		case 0:
			if dev != "" {
				fmt.Fprint(a.Out, tuneUsage)
				return fail(exUsage, "Incorrect number of arguments")
			}
			dev = o.arg
		}
	}
	if dev == "" {
		fmt.Fprint(a.Out, tuneUsage)
		return fail(exUsage, "Incorrect number of arguments")
	}
	change := setLabel || setUUID || setProto || setTable || setFormat
	d, err := a.open(ctx, dev, change)
	if err != nil {
		var pe *os.PathError
		if errors.As(err, &pe) {
			return fail(exIOErr, "Unable to open device %s", pathText(dev, err))
		}
		return fail(exIOErr, "Unable to open device %s: %v", dev, err)
	}
	rc := func() int {
		sb, err := tool.ReadSuper(d)
		if err != nil {
			return fail(exIOErr, "%v", err)
		}
		if change {
			err := tool.EditSuper(d, func(sb *ondisk.Superblock) error {
				if setProto {
					if proto != "lock_dlm" && proto != "lock_nolock" {
						return fmt.Errorf("Invalid lock protocol: %s", proto)
					}
					if err := tool.SetName(&sb.LockProto, proto); err != nil {
						return err
					}
				}
				for _, t := range []struct {
					set  bool
					text string
				}{{setTable, table}, {setLabel, label}} {
					if !t.set {
						continue
					}
					if len(t.text) >= ondisk.LockNameLen {
						return errors.New("Invalid lock table: too long")
					}
					// A filesystem of one node may carry any label.
					if ondisk.CString(sb.LockProto[:]) == "lock_dlm" || strings.Contains(t.text, ":") {
						if err := mkfs.CheckLockTable(t.text); err != nil {
							return err
						}
					}
					if err := tool.SetName(&sb.LockTable, t.text); err != nil {
						return err
					}
				}
				if setUUID {
					u, err := uuid.Parse(uuidText)
					if err != nil || len(uuidText) != 36 {
						return fmt.Errorf("Invalid UUID '%s': the form is 1b4e28ba-2fa1-11d2-883f-b9a761bde3fb", uuidText)
					}
					sb.UUID = [16]byte(u)
				}
				if setFormat {
					n, err := strconv.ParseUint(format, 10, 32)
					switch {
					case err != nil || n != ondisk.Format1801 && n != ondisk.Format1802:
						return fmt.Errorf("Invalid format option '%s'", format)
					case uint32(n) < sb.FSFormat:
						return errors.New("Regressing the filesystem format is not supported")
					}
					sb.FSFormat = uint32(n)
				}
				return nil
			})
			if err != nil {
				return fail(exDataErr, "%v", err)
			}
			if sb, err = tool.ReadSuper(d); err != nil {
				return fail(exIOErr, "%v", err)
			}
		}
		if list {
			a.printSuper(sb)
		}
		return 0
	}()
	if err := d.Close(); err != nil && rc == 0 {
		return fail(exIOErr, "close %s: %v", dev, err)
	}
	return rc
}

func (a *App) printSuper(sb ondisk.Superblock) {
	fmt.Fprintf(a.Out, "File system volume name: %s\n", ondisk.CString(sb.LockTable[:]))
	fmt.Fprintf(a.Out, "File system UUID: %s\n", ondisk.FormatUUID(sb.UUID))
	fmt.Fprintf(a.Out, "File system magic number: 0x%x\n", sb.Magic)
	fmt.Fprintf(a.Out, "File system format version: %d\n", sb.FSFormat)
	fmt.Fprintf(a.Out, "Block size: %d\n", sb.BlockSize)
	fmt.Fprintf(a.Out, "Block shift: %d\n", sb.BlockShift)
	fmt.Fprintf(a.Out, "Root inode: %d\n", sb.Root.Addr)
	if sb.FSFormat == ondisk.Format1802 { // the original shows it for its newest format only
		fmt.Fprintf(a.Out, "Master inode: %d\n", sb.Master.Addr)
	}
	fmt.Fprintf(a.Out, "Lock protocol: %s\n", ondisk.CString(sb.LockProto[:]))
	fmt.Fprintf(a.Out, "Lock table: %s\n", ondisk.CString(sb.LockTable[:]))
}
