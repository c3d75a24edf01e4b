package verbs

import (
	"context"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/block/storeurl"
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
			{head: "STORE", wide: true, cell: func(v api.Volume) string { return dash(v.Store) }},
			{head: "CHECKSUMS", wide: true, cell: checksums},
		},
	}
}

// checksums says in one cell what the checksums told.
func checksums(v api.Volume) string {
	if !v.Integrity {
		return "off"
	}
	c := v.Checksums
	if c == nil {
		return "on"
	}
	out := "on, ok"
	if c.Damaged > 0 {
		out = fmt.Sprintf("on, %d damaged blocks at %v", c.Damaged, c.Offsets)
	}
	if c.Doubt > 0 {
		out += fmt.Sprintf(", %d MiB in doubt after a crash", 4*c.Doubt)
	}
	if c.Adopted > 0 {
		out += fmt.Sprintf(", %d blocks taken as they were", c.Adopted)
	}
	if s := c.Scrub; s != nil && s.Size > 0 {
		out += fmt.Sprintf("; scrub %s at %d %%", s.State, s.Done*100/s.Size)
		if s.State == "done" {
			out += " " + s.Ended.UTC().Format(time.RFC3339)
		}
		if s.Error != "" {
			out += ": " + s.Error
		}
	}
	return out
}

// storeHelp is the help of --store.
const storeHelp = "put it on an existing file:/path, block:/dev/x, nbd://host/export or nbd+unix:///export?socket=/path; its size is taken (mem: wants --size)"

// storeSize checks --size and --store together.
func storeSize(cmd, name, store string, sz int64, needed bool) error {
	u, err := (*storeurl.URL)(nil), error(nil)
	if store != "" {
		if u, err = storeurl.Parse(store); err != nil {
			return usagef("", "%s: --store: %v", cmd, err)
		}
	}
	switch {
	case u != nil && u.OwnSize() && sz != 0:
		return usagef("", "%s: --size and --store: the size is the store's", cmd)
	case u != nil && !u.OwnSize() && sz == 0, u == nil && sz == 0 && needed:
		return usagef("clusteradm "+cmd+" "+name+" --size 1GiB", "%s: --size is missing", cmd)
	}
	return nil
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
		if err := storeSize("volume create", args[0], req.Store, int64(sz), true); err != nil {
			return err
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
	create.Long = "Make a volume: bytes without a LUN number. \"clusteradm lun create\" makes volume and\nLUN in one step.\n\nSizes: " + size.Help + ".\n\nWith --store it lies on a file, device or export that exists, and which stays when\nthe volume is deleted (docs/stores.md). With --integrity a crc32c of every 4 KiB is\nkept and verified on read."
	f := create.Flags()
	f.Var(&sz, "size", size.Help)
	f.IntVar(&req.BlockSize, "block-size", 512, "logical block in bytes: 512 or 4096")
	f.IntVar(&req.Replicas, "replicas", 1, "copies on different nodes")
	f.StringVar(&req.Node, "node", "", "node of the first copy (default: chosen)")
	f.StringVar(&req.Store, "store", "", storeHelp)
	f.BoolVar(&req.Integrity, "integrity", false, "keep a checksum of every 4 KiB and verify it on read")
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
	var (
		rate sizeFlag
		stop bool
	)
	scrub := a.verb("scrub NAME", "verify all checksums of a volume in the background", func(ctx context.Context, args []string) error {
		if stop && rate != 0 {
			return usagef("", "volume scrub: --stop and --rate: a scrub that ends has no rate")
		}
		d, err := post[api.Done](ctx, a, api.PathVolumes+"/"+url.PathEscape(args[0])+"/scrub", api.VolumeScrub{Rate: int64(rate), Stop: stop})
		if err != nil {
			return err
		}
		return a.printDone(d, "the scrub of volume "+args[0]+" has begun")
	})
	scrub.Long = "Read the whole volume and compare it with its checksums (--integrity), in the\nbackground. \"volume show\" tells progress and what was found, \"events\" the end."
	scrub.Example = "  clusteradm volume scrub v1 --rate 50M"
	scrub.Flags().Var(&rate, "rate", "bytes a second at most (default: no limit): "+size.Help)
	scrub.Flags().BoolVar(&stop, "stop", false, "end a scrub that runs")
	show.ValidArgsFunction, del.ValidArgsFunction, scrub.ValidArgsFunction = volumes, volumes, volumes
	return a.group(&cobra.Command{Use: "volume", Short: "volumes: the bytes", Aliases: []string{"vol"}}, create, alias(list, "ls"), show, scrub, alias(del, "rm"))
}
