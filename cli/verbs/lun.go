package verbs

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/size"
)

func lunView() view[api.LUN] {
	return view[api.LUN]{
		kind: "LUN",
		name: lunName,
		cols: []col[api.LUN]{
			{head: "TARGET", cell: func(l api.LUN) string { return l.Target }},
			{head: "LUN", right: true, cell: func(l api.LUN) string { return strconv.Itoa(l.LUN) }},
			{head: "VOLUME", cell: func(l api.LUN) string { return l.Volume }},
			{head: "STATE", state: true, cell: func(l api.LUN) string { return dash(string(l.State)) }},
			{head: "RO", cell: func(l api.LUN) string { return readOnly(l.ReadOnly) }},
			{head: "WWID", cell: func(l api.LUN) string { return dash(l.WWID) }},
			{head: "URL", cell: func(l api.LUN) string { return join(l.URLs) }},
			{head: "GENERATION", wide: true, right: true, cell: func(l api.LUN) string { return strconv.FormatUint(l.Generation, 10) }},
		},
	}
}

// readOnly is the RO cell: neither answer is a good or a bad state.
func readOnly(b bool) string {
	if b {
		return "ro"
	}
	return "rw"
}

func lunName(l api.LUN) string { return l.Target + "/" + strconv.Itoa(l.LUN) }

// splitLUN takes IQN/N apart.
func splitLUN(s string) (iqn string, n int, err error) {
	i := strings.LastIndexByte(s, '/')
	if i > 0 {
		n, err = strconv.Atoi(s[i+1:])
	}
	if i <= 0 || err != nil || n < 0 || n > 16383 {
		return "", 0, usagef("clusteradm lun list -o name", "%q is not IQN/NUMBER with a number from 0 to 16383", s)
	}
	return s[:i], n, nil
}

func (a *app) lunCmd() *cobra.Command {
	var (
		sz  sizeFlag
		req api.LUNCreate
	)
	create := a.verb("create VOLUME", "give a volume a number under a target; with --size or --store make the volume too", func(ctx context.Context, args []string) error {
		switch {
		case req.Target == "":
			return usagef("clusteradm target list", "lun create: --target is missing")
		case req.LUN < -1 || req.LUN > 16383:
			return usagef("", "lun create: --lun %d: a LUN is 0 to 16383", req.LUN)
		case sz == 0 && req.Store == "" && (req.Node != "" || req.Integrity):
			return usagef("", "lun create: --node and --integrity are of a new volume; without --size or --store none is made")
		case req.Replicas < 1:
			return usagef("", "lun create: --replicas %d: at least one copy", req.Replicas)
		}
		if err := storeSize("lun create", args[0], req.Store, int64(sz), false); err != nil {
			return err
		}
		if err := checkBlockSize("lun create", req.BlockSize); err != nil {
			return err
		}
		req.Volume, req.Size, req.RequestID = args[0], int64(sz), uuid.NewString()
		l, err := post[api.LUN](ctx, a, api.PathLUNs, req)
		if err != nil {
			return err
		}
		return printOne(a, l, lunView())
	})
	create.Long = `Give a volume a LUN under a target. With --size or --store the volume is made in the same step.

Sizes: ` + size.Help + `.`
	create.Example = "  clusteradm lun create v1 --target iqn.2026-11.example:disks --size 64M"
	f := create.Flags()
	f.StringVar(&req.Target, "target", "", "the target (required)")
	f.Var(&sz, "size", "also make the volume: "+size.Help)
	f.IntVar(&req.BlockSize, "block-size", 512, "logical block of a new volume: 512 or 4096")
	f.IntVar(&req.Replicas, "replicas", 1, "copies of a new volume")
	f.StringVar(&req.Node, "node", "", "node of a new volume's first copy (default: chosen)")
	f.StringVar(&req.Store, "store", "", "of a new volume: "+storeHelp)
	f.BoolVar(&req.Integrity, "integrity", false, "of a new volume: keep a checksum of every 4 KiB and verify it on read")
	f.IntVar(&req.LUN, "lun", -1, "the number (default: next free)")
	f.BoolVar(&req.ReadOnly, "read-only", false, "initiators may not write")
	f.BoolVar(&req.IfNotExists, "if-not-exists", false, "succeed if the same LUN is there already")
	a.completeNodes(create, "node")
	_ = create.RegisterFlagCompletionFunc("target", a.targets())
	create.ValidArgsFunction = complete(a, api.PathVolumes, func(v api.Volume) string { return v.Name })

	list := a.verb("list", "list the LUNs", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.LUN]](ctx, a, api.PathLUNs)
		if err != nil {
			return err
		}
		return printList(a, l, lunView())
	})
	del := a.verb("delete IQN/LUN [LUN]", "take a LUN away from a target; the volume stays", func(ctx context.Context, args []string) error {
		name := strings.Join(args, "/") // "IQN 1" is "IQN/1"
		iqn, n, err := splitLUN(name)
		if err != nil {
			return err
		}
		if err := a.confirm(ctx, "take LUN "+name+" away from its initiators"); err != nil {
			return err
		}
		d, err := a.delete(ctx, fmt.Sprintf("%s/%s/%d", api.PathLUNs, url.PathEscape(iqn), n))
		if err != nil {
			return err
		}
		return a.printDone(d, "LUN "+name+" is deleted; its volume stays")
	})
	del.ValidArgsFunction = complete(a, api.PathLUNs, lunName)
	return a.group(&cobra.Command{Use: "lun", Short: "LUNs: numbers under a target"}, create, alias(list, "ls"), a.lunShowCmd(), a.lunTopCmd(), alias(del, "rm"))
}
