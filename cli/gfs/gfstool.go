package gfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/blockhouse-san/blockhouse/gfs/disk"
	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
	"github.com/blockhouse-san/blockhouse/gfs/tool"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

// gfsTool is one run of gfs_tool or gfs2_tool.
type gfsTool struct {
	*App
	ctx  context.Context
	name string
	yes  bool
	args []string
}

// errUsage is a command line that does not fit its verb.
var errUsage = errors.New("usage")

var toolVerbs = []struct {
	name, args, what string
	run              func(g *gfsTool) error
}{
	{"df", "[MOUNTPOINT|DEVICE]...", "usage of filesystems", (*gfsTool).df},
	{"sb", "DEVICE proto|table|ondisk|multihost|uuid|all [NEW]", "show or change the superblock", (*gfsTool).sb},
	{"getsb", "MOUNTPOINT|DEVICE", "all fields of the superblock", (*gfsTool).getsb},
	{"jindex", "MOUNTPOINT|DEVICE", "the journals", (*gfsTool).jindex},
	{"journals", "MOUNTPOINT|DEVICE", "the journals with their sizes", (*gfsTool).journals},
	{"rindex", "MOUNTPOINT|DEVICE", "the resource groups", (*gfsTool).rindex},
	{"quota", "MOUNTPOINT|DEVICE", "the quota file", (*gfsTool).quota},
	{"stat", "DEVICE PATH", "the dinode of a file", (*gfsTool).stat},
	{"layout", "DEVICE PATH", "where the blocks of a file lie", (*gfsTool).layout},
	{"list", "", "mounted filesystems", (*gfsTool).list},
	{"freeze", "MOUNTPOINT", "stop writing", (*gfsTool).freeze},
	{"unfreeze", "MOUNTPOINT", "go on writing", (*gfsTool).unfreeze},
	{"gettune", "MOUNTPOINT", "tunables", (*gfsTool).gettune},
	{"settune", "MOUNTPOINT NAME VALUE", "change a tunable", (*gfsTool).settune},
	{"withdraw", "MOUNTPOINT", "make this node leave the filesystem", (*gfsTool).withdraw},
	{"lockdump", "MOUNTPOINT", "the glocks of this node", (*gfsTool).lockdump},
	{"reclaim", "MOUNTPOINT", "nothing to do on GFS2", (*gfsTool).reclaim},
	{"shrink", "MOUNTPOINT", "drop clean cached inodes", (*gfsTool).shrink},
	{"version", "", "version of this program", (*gfsTool).version},
}

func (a *App) gfsTool(ctx context.Context, name string, args []string) int {
	g := &gfsTool{App: a, ctx: ctx, name: name}
	for _, s := range args {
		switch s {
		case "-h", "--help", "help":
			g.help(a.Out)
			return 0
		case "-V", "--version":
			args = []string{"version"}
		case "-O", "-y":
			g.yes = true
		default:
			g.args = append(g.args, s)
		}
	}
	if len(args) == 1 && args[0] == "version" {
		g.args = args
	}
	if len(g.args) == 0 {
		g.help(a.Err)
		return 1
	}
	verb := g.args[0]
	g.args = g.args[1:]
	for _, v := range toolVerbs {
		if v.name != verb {
			continue
		}
		err := v.run(g)
		switch {
		case errors.Is(err, errUsage):
			fmt.Fprintf(a.Err, "Usage: %s %s %s\n", name, v.name, v.args)
			return 1
		case err != nil:
			fmt.Fprintf(a.Err, "%s: %v\n", name, err)
			return 1
		}
		return 0
	}
	fmt.Fprintf(a.Err, "%s: no action %q; try %s help\n", name, verb, name)
	return 1
}

func (g *gfsTool) help(w io.Writer) {
	fmt.Fprintf(w, "Usage: %s ACTION [ARGUMENT]...\n\nActions:\n", g.name)
	for _, v := range toolVerbs {
		fmt.Fprintf(w, "  %-40s %s\n", v.name+" "+v.args, v.what)
	}
}

func mountinfo() (io.ReadCloser, error) { return os.Open("/proc/self/mountinfo") }

const sysfsGFS2 = "/sys/fs/gfs2"

func findMount(path string) (tool.Mount, error) {
	f, err := mountinfo()
	if err != nil {
		return tool.Mount{}, err
	}
	defer f.Close()
	return tool.FindMount(path, f, sysfsGFS2)
}

// mount wants exactly one argument, a mount point.
func (g *gfsTool) mount(n int) (tool.Mount, error) {
	if len(g.args) != n {
		return tool.Mount{}, errUsage
	}
	return findMount(g.args[0])
}

// openFS opens the filesystem at a mount point or on a device for reading.
func (g *gfsTool) openFS(target string) (*fs.FS, disk.Device, *tool.Mount, error) {
	var m *tool.Mount
	dev := target
	if !strings.Contains(target, "://") {
		if found, err := findMount(target); err == nil {
			m, dev = &found, found.Source
		}
	}
	d, err := g.open(g.ctx, dev, false)
	if err != nil {
		return nil, nil, nil, errors.New(pathText(dev, err))
	}
	f, err := fs.Open(d)
	if err != nil {
		return nil, nil, nil, errors.Join(fmt.Errorf("%s: %w", dev, err), d.Close())
	}
	return f, d, m, nil
}

// with runs f on the filesystem that the first argument names.
func (g *gfsTool) with(n int, f func(v *fs.FS, m *tool.Mount) error) error {
	if len(g.args) != n {
		return errUsage
	}
	v, d, m, err := g.openFS(g.args[0])
	if err != nil {
		return err
	}
	return errors.Join(f(v, m), d.Close())
}

func (g *gfsTool) df() error {
	targets := g.args
	if len(targets) == 0 {
		f, err := mountinfo()
		if err != nil {
			return err
		}
		s := bufio.NewScanner(f)
		for s.Scan() {
			pre, post, _ := strings.Cut(s.Text(), " - ")
			if p := strings.Fields(pre); strings.HasPrefix(post, "gfs2 ") && len(p) > 4 {
				targets = append(targets, p[4])
			}
		}
		if err := errors.Join(s.Err(), f.Close()); err != nil {
			return err
		}
	}
	for i, t := range targets {
		v, d, m, err := g.openFS(t)
		if err != nil {
			return err
		}
		if i > 0 {
			fmt.Fprintln(g.Out)
		}
		u, err := tool.ReadUsage(v)
		if err := errors.Join(err, d.Close()); err != nil {
			return err
		}
		g.printDF(t, u, m)
	}
	return nil
}

// printDF is the layout of GFS1's gfs_tool df. GFS2 has no pools of inodes and
// metadata: each row's total is what is used of the kind and what is free.
func (g *gfsTool) printDF(path string, u tool.Usage, m *tool.Mount) {
	w := g.Out
	var proto, table, host string
	jid, oopses, local := "", "no", "FALSE"
	if m != nil {
		proto, table, host = m.Options["lockproto"], m.Options["locktable"], m.Options["hostdata"]
		if proto == "" {
			proto = ondisk.CString(u.Super.LockProto[:])
		}
		if table == "" {
			table = ondisk.CString(u.Super.LockTable[:])
		}
		if b, err := os.ReadFile(filepath.Join(m.Sysfs, "lock_module", "jid")); m.Sysfs != "" && err == nil {
			jid = strings.TrimSpace(string(b))
		}
		if m.Options["errors"] == "panic" || m.Options["debug"] != "" {
			oopses = "yes"
		}
	}
	yes := func(opt string) string {
		if m == nil {
			return local
		}
		if _, ok := m.Options[opt]; ok {
			return "TRUE"
		}
		return "FALSE"
	}
	oops := "TRUE"
	if oopses == "yes" {
		oops = "FALSE"
	}
	fmt.Fprintf(w, "%s:\n", path)
	fmt.Fprintf(w, "  SB lock proto = \"%s\"\n", ondisk.CString(u.Super.LockProto[:]))
	fmt.Fprintf(w, "  SB lock table = \"%s\"\n", ondisk.CString(u.Super.LockTable[:]))
	fmt.Fprintf(w, "  SB ondisk format = %d\n", u.Super.FSFormat)
	fmt.Fprintf(w, "  SB multihost format = %d\n", u.Super.MultihostFormat)
	fmt.Fprintf(w, "  Block size = %d\n", u.BlockSize)
	fmt.Fprintf(w, "  Journals = %d\n", u.Journals)
	fmt.Fprintf(w, "  Resource Groups = %d\n", u.RGs)
	fmt.Fprintf(w, "  Mounted lock proto = \"%s\"\n", proto)
	fmt.Fprintf(w, "  Mounted lock table = \"%s\"\n", table)
	fmt.Fprintf(w, "  Mounted host data = \"%s\"\n", host)
	fmt.Fprintf(w, "  Journal number = %s\n", jid)
	fmt.Fprintf(w, "  Lock module flags = 0x%.8X\n", 0)
	fmt.Fprintf(w, "  Local flocks = %s\n", yes("localflocks"))
	fmt.Fprintf(w, "  Local caching = %s\n", yes("localcaching"))
	fmt.Fprintf(w, "  Oopses OK = %s\n", oops)
	fmt.Fprintln(w)
	fmt.Fprintf(w, "  %-15s%-15s%-15s%-15s%-15s\n", "Type", "Total", "Used", "Free", "use%")
	fmt.Fprintf(w, "  %s\n", strings.Repeat("-", 72))
	line := func(kind string, used uint64) {
		total := used + u.Free
		pc := uint64(0)
		if total > 0 {
			pc = (100*used + total/2) / total
		}
		fmt.Fprintf(w, "  %-15s%-15d%-15d%-15d%-15s\n", kind, total, used, u.Free, fmt.Sprintf("%d%%", pc))
	}
	line("inodes", u.Dinodes)
	// Metadata and data share the state "used"; the bitmaps of resource groups
	// and what is no dinode count as data.
	line("metadata", 0)
	line("data", u.Total-u.Free-u.Dinodes)
}

var sbFields = []struct{ field, text string }{
	{"proto", "lock protocol name"}, {"table", "lock table name"}, {"ondisk", "ondisk format"}, {"multihost", "multihost format"}, {"uuid", "uuid"},
}

func sbValue(sb *ondisk.Superblock, field string) string {
	switch field {
	case "proto":
		return fmt.Sprintf("%q", ondisk.CString(sb.LockProto[:]))
	case "table":
		return fmt.Sprintf("%q", ondisk.CString(sb.LockTable[:]))
	case "ondisk":
		return strconv.FormatUint(uint64(sb.FSFormat), 10)
	case "multihost":
		return strconv.FormatUint(uint64(sb.MultihostFormat), 10)
	case "uuid":
		return ondisk.FormatUUID(sb.UUID)
	}
	return ""
}

func (g *gfsTool) sb() error {
	if len(g.args) < 2 || len(g.args) > 3 {
		return errUsage
	}
	dev, field := g.args[0], g.args[1]
	text := ""
	for _, f := range sbFields {
		if f.field == field {
			text = f.text
		}
	}
	write := len(g.args) == 3
	if text == "" && (field != "all" || write) {
		return errUsage
	}
	if write && !g.yes {
		fmt.Fprintln(g.Out, "You shouldn't change any of these values if the filesystem is mounted.")
		fmt.Fprint(g.Out, "\nAre you sure? [y/n] ")
		s, err := bufio.NewReader(g.In).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		fmt.Fprintln(g.Out)
		if c := strings.TrimSpace(s); c == "" || c[0] != 'y' && c[0] != 'Y' {
			return errors.New("aborted")
		}
	}
	d, err := g.open(g.ctx, dev, write)
	if err != nil {
		return errors.New(pathText(dev, err))
	}
	err = func() error {
		sb, err := tool.ReadSuper(d)
		if err != nil {
			return err
		}
		if field == "all" {
			g.printFields(ondisk.TypeSB, &sb)
			return nil
		}
		fmt.Fprintf(g.Out, "current %s = %s\n", text, sbValue(&sb, field))
		if !write {
			return nil
		}
		if err := tool.EditSuper(d, func(sb *ondisk.Superblock) error { return setSB(sb, field, g.args[2]) }); err != nil {
			return err
		}
		if sb, err = tool.ReadSuper(d); err != nil {
			return err
		}
		fmt.Fprintf(g.Out, "new %s = %s\nDone\n", text, sbValue(&sb, field))
		return nil
	}()
	return errors.Join(err, d.Close())
}

func setSB(sb *ondisk.Superblock, field, value string) error {
	switch field {
	case "proto":
		if err := mkfs.CheckLocking(value, "a:b"); err != nil {
			return err
		}
		return tool.SetName(&sb.LockProto, value)
	case "table":
		if err := mkfs.CheckLockTable(value); err != nil {
			return err
		}
		return tool.SetName(&sb.LockTable, value)
	case "ondisk":
		if value != "1801" && value != "1802" {
			return fmt.Errorf("ondisk format is 1801 or 1802, not %s", value)
		}
		n, err := strconv.ParseUint(value, 10, 32)
		if err == nil && uint32(n) < sb.FSFormat {
			err = errors.New("the format can only rise: files may already use what the older one lacks")
		}
		sb.FSFormat = uint32(n)
		return err
	}
	return fmt.Errorf("%s cannot be changed here; tunegfs2 -U sets the uuid", field)
}

// printFields prints "  name = value" lines as gfs_tool did.
func (g *gfsTool) printFields(t ondisk.MetaType, v interface{ Encode([]byte) error }) {
	b := make([]byte, 512)
	if err := v.Encode(b); err != nil {
		return
	}
	g.fields(ondisk.Fields(t), b)
}

func (g *gfsTool) fields(fields []ondisk.FieldInfo, b []byte) {
	for _, f := range fields {
		switch f.Kind {
		case ondisk.KindHex:
			fmt.Fprintf(g.Out, "  %s = 0x%.8X\n", f.Name, f.Uint(b))
		case ondisk.KindOct:
			fmt.Fprintf(g.Out, "  %s = 0%o\n", f.Name, f.Uint(b))
		case ondisk.KindString:
			fmt.Fprintf(g.Out, "  %s = %s\n", f.Name, ondisk.CString(b[f.Off:f.Off+f.Size]))
		case ondisk.KindUUID:
			fmt.Fprintf(g.Out, "  %s = %s\n", f.Name, ondisk.FormatUUID([16]byte(b[f.Off:f.Off+16])))
		case ondisk.KindSigned:
			fmt.Fprintf(g.Out, "  %s = %d\n", f.Name, int64(f.Uint(b)))
		default:
			fmt.Fprintf(g.Out, "  %s = %d\n", f.Name, f.Uint(b))
		}
	}
}

func (g *gfsTool) getsb() error {
	return g.with(1, func(v *fs.FS, _ *tool.Mount) error {
		g.printFields(ondisk.TypeSB, &v.Super)
		return nil
	})
}

func (g *gfsTool) jindex() error {
	return g.with(1, func(v *fs.FS, _ *tool.Mount) error {
		n, err := v.Journals()
		for i := 0; i < n && err == nil; i++ {
			var ip *fs.Inode
			if ip, err = v.Journal(i); err == nil {
				fmt.Fprintf(g.Out, "Journal %d:\n  no_formal_ino = %d\n  no_addr = %d\n  di_size = %d\n", i, ip.Num.Formal, ip.Num.Addr, ip.Size)
			}
		}
		return err
	})
}

func (g *gfsTool) journals() error {
	return g.with(1, func(v *fs.FS, _ *tool.Mount) error {
		n, err := v.Journals()
		for i := 0; i < n && err == nil; i++ {
			var ip *fs.Inode
			if ip, err = v.Journal(i); err == nil {
				fmt.Fprintf(g.Out, "journal%d - %dMB\n", i, ip.Size>>20)
			}
		}
		if err == nil {
			fmt.Fprintf(g.Out, "%d journal(s) found.\n", n)
		}
		return err
	})
}

func (g *gfsTool) rindex() error {
	return g.with(1, func(v *fs.FS, _ *tool.Mount) error {
		rgs, err := v.RGs()
		if err != nil {
			return err
		}
		b := make([]byte, ondisk.RindexSize)
		for i := range rgs {
			h, err := tool.ReadRgrp(v, &rgs[i])
			if err != nil {
				return err
			}
			if err := rgs[i].Encode(b); err != nil {
				return err
			}
			fmt.Fprintf(g.Out, "RG %d:\n", i)
			g.fields(ondisk.RindexFields(), b)
			g.printFields(ondisk.TypeRG, &h)
		}
		return nil
	})
}

func (g *gfsTool) quota() error {
	return g.with(1, func(v *fs.FS, _ *tool.Mount) error {
		qs, err := tool.Quotas(v)
		for _, q := range qs {
			kind := "user"
			if q.Group {
				kind = "group"
			}
			fmt.Fprintf(g.Out, "%5s %9d:  limit: %-10d warn: %-10d value: %-10d\n", kind, q.ID, q.Limit, q.Warn, int64(q.Value))
		}
		return err
	})
}

// inode finds a path inside the filesystem of the first argument.
func inode(v *fs.FS, path string) (*fs.Inode, error) {
	var parts []string
	for _, p := range strings.Split(path, "/") {
		if p != "" && p != "." {
			parts = append(parts, p)
		}
	}
	return v.Lookup(parts...)
}

func (g *gfsTool) stat() error {
	return g.with(2, func(v *fs.FS, _ *tool.Mount) error {
		ip, err := inode(v, g.args[1])
		if err != nil {
			return err
		}
		g.printFields(ondisk.TypeDI, &ip.Dinode)
		return ip.EachEA(func(name string, value []byte) error {
			fmt.Fprintf(g.Out, "  ea %s = %d bytes\n", name, len(value))
			return nil
		})
	})
}

func (g *gfsTool) layout() error {
	return g.with(2, func(v *fs.FS, _ *tool.Mount) error {
		ip, err := inode(v, g.args[1])
		if err != nil {
			return err
		}
		fmt.Fprintf(g.Out, "dinode %d, height %d, %d blocks\n", ip.Num.Addr, ip.Height, ip.Blocks)
		type run struct{ first, n uint64 }
		var data, meta []run
		add := func(l []run, a uint64) []run {
			if k := len(l); k > 0 && l[k-1].first+l[k-1].n == a {
				l[k-1].n++
				return l
			}
			return append(l, run{a, 1})
		}
		if err := ip.EachBlock(func(a uint64, _ int, d bool) error {
			if d {
				data = add(data, a)
			} else {
				meta = add(meta, a)
			}
			return nil
		}); err != nil {
			return err
		}
		for _, l := range []struct {
			what string
			runs []run
		}{{"indirect", meta}, {"data", data}} {
			for _, r := range l.runs {
				fmt.Fprintf(g.Out, "  %-8s %d-%d (%d)\n", l.what, r.first, r.first+r.n-1, r.n)
			}
		}
		return nil
	})
}

func (g *gfsTool) list() error {
	dirs, err := os.ReadDir(sysfsGFS2)
	if errors.Is(err, os.ErrNotExist) {
		return nil // no module, no mounts
	}
	for _, d := range dirs {
		id, _ := os.ReadFile(filepath.Join(sysfsGFS2, d.Name(), "id"))
		fmt.Fprintf(g.Out, "%s %s\n", strings.TrimSpace(string(id)), d.Name())
	}
	return err
}

func (g *gfsTool) freeze() error {
	m, err := g.mount(1)
	if err != nil {
		return err
	}
	return tool.Freeze(m.Point)
}

func (g *gfsTool) unfreeze() error {
	m, err := g.mount(1)
	if err != nil {
		return err
	}
	return tool.Thaw(m.Point)
}

func (g *gfsTool) gettune() error {
	m, err := g.mount(1)
	if err != nil {
		return err
	}
	names, values, err := m.Tune()
	for i := range names {
		fmt.Fprintf(g.Out, "%s = %s\n", names[i], values[i])
	}
	return err
}

func (g *gfsTool) settune() error {
	m, err := g.mount(3)
	if err != nil {
		return err
	}
	names, _, err := m.Tune()
	if err != nil {
		return err
	}
	if i := sort.SearchStrings(names, g.args[1]); i == len(names) || names[i] != g.args[1] {
		return fmt.Errorf("%s is no tunable; there are %s", g.args[1], strings.Join(names, ", "))
	}
	return m.Set("tune/"+g.args[1], g.args[2])
}

func (g *gfsTool) withdraw() error {
	m, err := g.mount(1)
	if err != nil {
		return err
	}
	return m.Set("withdraw", "1")
}

func (g *gfsTool) lockdump() error {
	m, err := g.mount(1)
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join("/sys/kernel/debug/gfs2", filepath.Base(m.Sysfs), "glocks"))
	if err != nil {
		return fmt.Errorf("%w: is debugfs mounted?", err)
	}
	_, err = io.Copy(g.Out, f)
	return errors.Join(err, f.Close())
}

func (g *gfsTool) reclaim() error {
	if _, err := g.mount(1); err != nil {
		return err
	}
	fmt.Fprintln(g.Out, "GFS2 gives unused metadata back by itself: nothing to do.")
	return nil
}

func (g *gfsTool) shrink() error {
	if _, err := g.mount(1); err != nil {
		return err
	}
	// Dentries and inodes, of all filesystems: GFS2 has no knob of its own.
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("2\n"), 0)
}

func (g *gfsTool) version() error {
	fmt.Fprintf(g.Out, "%s %s\n", g.name, version.String())
	return nil
}
