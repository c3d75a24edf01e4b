package verbs

import (
	"context"
	"net/url"
	"strconv"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/size"
)

func volumeView() view[api.Volume] {
	return view[api.Volume]{
		kind: "Volume",
		name: func(v api.Volume) string { return v.Name },
		cols: []col[api.Volume]{
			{head: "NAME", cell: func(v api.Volume) string { return v.Name }},
			{head: "SIZE", right: true, cell: func(v api.Volume) string { return size.Format(v.Size) }},
			{head: "STATE", state: true, cell: func(v api.Volume) string { return dash(v.State) }},
			{head: "HEALTH", state: true, cell: func(v api.Volume) string { return dash(string(v.Health)) }},
			{head: "PRIMARY", cell: func(v api.Volume) string { return dash(v.Primary) }},
			{head: "COPIES", cell: func(v api.Volume) string { return join(v.Replicas) }},
			{head: "LUNS", cell: func(v api.Volume) string { return join(v.LUNs) }},
			{head: "CAUSE", cell: func(v api.Volume) string { return dash(v.Cause) }},
			{head: "BLOCK", wide: true, right: true, cell: func(v api.Volume) string { return strconv.Itoa(v.BlockSize) }},
			{head: "BYTES", wide: true, right: true, cell: func(v api.Volume) string { return strconv.FormatInt(v.Size, 10) }},
			{head: "EPOCH", wide: true, right: true, cell: func(v api.Volume) string { return strconv.FormatUint(v.Epoch, 10) }},
			{head: "IN-SYNC", wide: true, cell: func(v api.Volume) string { return join(v.ISR) }},
			{head: "UUID", wide: true, cell: func(v api.Volume) string { return v.UUID }},
		},
	}
}

// sizeFlag is a pflag.Value for a size in bytes.
type sizeFlag int64

func (s *sizeFlag) String() string {
	if *s == 0 {
		return ""
	}
	return size.Format(int64(*s))
}

func (s *sizeFlag) Set(v string) error {
	n, err := size.Parse(v)
	if err != nil {
		return err
	}
	if n == 0 {
		return size.ErrZero
	}
	*s = sizeFlag(n)
	return nil
}

func (s *sizeFlag) Type() string { return "SIZE" }

func checkBlockSize(cmd string, n int) error {
	if n != 512 && n != 4096 {
		return usagef("", "%s: --block-size %d: a logical block has 512 or 4096 bytes", cmd, n)
	}
	return nil
}

func (a *app) volumeCmd() *cobra.Command {
	var (
		sz      sizeFlag
		req     api.VolumeCreate
		volumes = complete(a, api.PathVolumes, func(v api.Volume) string { return v.Name })
	)
	create := a.verb("create NAME", "make a volume", func(ctx context.Context, args []string) error {
		switch {
		case req.Store != "" && sz != 0:
			return usagef("", "volume create: --size and --store: the size is the store's")
		case sz == 0 && req.Store == "":
			return usagef("clusteradm volume create "+args[0]+" --size 1GiB", "volume create: --size is missing")
		}
		if err := checkBlockSize("volume create", req.BlockSize); err != nil {
			return err
		}
		if req.Replicas < 1 {
			return usagef("", "volume create: --replicas %d: at least one copy", req.Replicas)
		}
		req.Name, req.Size, req.RequestID = args[0], int64(sz), uuid.NewString()
		v, err := post[api.Volume](ctx, a, api.PathVolumes, req)
		if err != nil {
			return err
		}
		return printOne(a, v, volumeView())
	})
	create.Long = "Make a volume: bytes without a LUN number. \"clusteradm lun create\" makes volume and\nLUN in one step.\n\nSizes: " + size.Help + ".\n\nWith --store it lies on a file or device that exists, and which stays when the\nvolume is deleted."
	f := create.Flags()
	f.Var(&sz, "size", size.Help)
	f.IntVar(&req.BlockSize, "block-size", 512, "logical block in bytes: 512 or 4096")
	f.IntVar(&req.Replicas, "replicas", 1, "copies on different nodes")
	f.StringVar(&req.Node, "node", "", "node of the first copy (default: chosen)")
	f.StringVar(&req.Store, "store", "", "put it on an existing file:/path or block:/dev/x of the node (default: this one)")
	f.BoolVar(&req.IfNotExists, "if-not-exists", false, "succeed if the same volume is there already")
	a.completeNodes(create, "node")

	list := a.verb("list", "list the volumes", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Volume]](ctx, a, api.PathVolumes)
		if err != nil {
			return err
		}
		return printList(a, l, volumeView())
	})
	show := a.verb("show NAME", "show everything known of a volume", func(ctx context.Context, args []string) error {
		v, err := get[api.Volume](ctx, a, api.PathVolumes+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return printOne(a, v, volumeView())
	})
	del := a.verb("delete NAME", "delete a volume and its data", func(ctx context.Context, args []string) error {
		if err := a.confirm(ctx, "delete volume "+args[0]+" and all of its data"); err != nil {
			return err
		}
		d, err := a.delete(ctx, api.PathVolumes+"/"+url.PathEscape(args[0]))
		if err != nil {
			return err
		}
		return a.printDone(d, "volume "+args[0]+" is deleted")
	})
	show.ValidArgsFunction, del.ValidArgsFunction = volumes, volumes
	return a.group(&cobra.Command{Use: "volume", Short: "volumes: the bytes", Aliases: []string{"vol"}}, create, alias(list, "ls"), show, alias(del, "rm"))
}
