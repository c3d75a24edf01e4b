package fsck

import (
	"errors"
	"fmt"
	"sort"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// checkRindex trusts, in this order: the rindex where entry and header agree;
// an entry that is possible by itself (the header is rebuilt); a header that is
// possible by itself and that the rindex lacks (found by a scan).
func (c *checker) checkRindex() error {
	rgs, err := c.f.RGs()
	if err != nil && !errors.Is(err, fs.ErrCorrupt) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrRange) {
		return err
	}
	bad := err != nil
	if err != nil {
		c.problem("The rindex file cannot be read: %v", err)
	}
	var good []ondisk.Rindex
	end := c.g.SBBlock() + 1
	for i, r := range rgs {
		if !c.possible(r) || r.Addr < end {
			c.problem("Entry %d of the rindex is impossible: resource group of %d+%d blocks at %d", i, r.Length, r.Data, r.Addr)
			bad = true
			continue
		}
		good = append(good, r)
		end = r.Data0 + uint64(r.Data)
	}
	for i := range good {
		// A hole between two groups that could hold one: the entry is lost.
		if i+1 < len(good) {
			next := good[i+1].Addr
			if e := good[i].Data0 + uint64(good[i].Data); next-e >= 16 && c.headerIn(e, next) {
				bad = true
			}
		}
	}
	if len(good) == 0 {
		bad = true
	}
	if bad {
		if good, err = c.scan(good); err != nil {
			return err
		}
		if len(good) == 0 {
			return fmt.Errorf("%w: no resource group was found", fs.ErrCorrupt)
		}
		if err := c.writeRindex(good); err != nil {
			return err
		}
	}
	return c.loadRindex()
}

// possible judges an entry without looking at the disk.
func (c *checker) possible(r ondisk.Rindex) bool {
	return r.Addr > c.g.SBBlock() && r.Data > 0 && r.Data%ondisk.NBBY == 0 && r.Bitbytes == r.Data/ondisk.NBBY &&
		r.Data0 == r.Addr+uint64(r.Length) && uint64(r.Length) >= c.g.BitBlocks(uint64(r.Data)) && uint64(r.Length) <= c.g.BitBlocks(uint64(r.Data))+1 &&
		r.Data0+uint64(r.Data) > r.Data0 && r.Data0+uint64(r.Data) <= c.f.Blocks()
}

// header reads block a as a resource group's header and makes the rindex entry
// that goes with it. A copy in a journal says that it belongs elsewhere.
func (c *checker) header(b []byte, a uint64) (ondisk.Rindex, bool) {
	var h ondisk.Rgrp
	if ondisk.CheckMeta(b, ondisk.TypeRG) != nil || h.Decode(b) != nil || !ondisk.RgrpCRCOK(b) || h.Data0 <= a || h.Data0-a > 1<<20 {
		return ondisk.Rindex{}, false
	}
	r := ondisk.Rindex{Addr: a, Length: uint32(h.Data0 - a), Data0: h.Data0, Data: h.Data, Bitbytes: h.Bitbytes}
	return r, c.possible(r)
}

// headerIn looks for a header in the first blocks of a gap.
func (c *checker) headerIn(from, to uint64) bool {
	for a := from; a < min(to, from+8); a++ {
		if b, err := c.f.Block(a); err == nil {
			if _, ok := c.header(b, a); ok {
				return true
			}
		}
	}
	return false
}

// scan reads the device for headers that are where they say, and adds those
// that known does not cover.
func (c *checker) scan(known []ondisk.Rindex) ([]ondisk.Rindex, error) {
	out := append([]ondisk.Rindex(nil), known...)
	const window = 1 << 20
	buf := make([]byte, window)
	for a := c.g.SBBlock() + 1; a < c.f.Blocks(); {
		if i, _ := fs.FindRG(out, a); i >= 0 {
			a = out[i].Data0 + uint64(out[i].Data)
			continue
		}
		n := min(uint64(window)>>c.g.Shift, c.f.Blocks()-a)
		if err := c.f.ReadBlocks(buf[:n<<c.g.Shift], a); err != nil {
			return nil, err
		}
		next := a + n
		for k := range n {
			r, ok := c.header(buf[k<<c.g.Shift:(k+1)<<c.g.Shift], a+k)
			if !ok {
				continue
			}
			// Found ones may not run into what is known already.
			if i := sort.Search(len(out), func(x int) bool { return out[x].Addr > r.Addr }); i < len(out) && r.Data0+uint64(r.Data) > out[i].Addr {
				continue
			}
			c.problem("Resource group at block %d is not in the rindex", r.Addr)
			out = append(out, r)
			sort.Slice(out, func(i, j int) bool { return out[i].Addr < out[j].Addr })
			next = r.Data0 + uint64(r.Data)
			break
		}
		a = next
		c.cfg.Progress("scan", a, c.f.Blocks())
	}
	return out, nil
}

// writeRindex puts entries into the blocks that the rindex file has. Every
// filesystem has room for all its entries there unless the dinode is lost too.
func (c *checker) writeRindex(rgs []ondisk.Rindex) error {
	c.f.Drop()
	ip, err := c.f.System("rindex")
	if err != nil {
		return fmt.Errorf("rebuild rindex: %w", err)
	}
	data := make([]byte, len(rgs)*ondisk.RindexSize)
	for i := range rgs {
		if err := rgs[i].Encode(data[i*ondisk.RindexSize:]); err != nil {
			return err
		}
	}
	di, err := c.block(ip.Num.Addr)
	if err != nil {
		return err
	}
	ip.Size = uint64(len(data))
	if err := ip.Encode(di); err != nil {
		return err
	}
	if ip.Stuffed() {
		if len(data) > c.g.StuffedMax() {
			return fmt.Errorf("rebuild rindex: %w: %d entries do not fit into the dinode", fs.ErrCorrupt, len(rgs))
		}
		clear(di[ondisk.DinodeSize:])
		copy(di[ondisk.DinodeSize:], data)
		return c.put(ip.Num.Addr, di)
	}
	for n := uint64(0); len(data) > 0; n++ {
		a, err := ip.Map(n)
		if err != nil || a == 0 {
			return fmt.Errorf("rebuild rindex: %w: block %d of the file is missing: %w", fs.ErrCorrupt, n, err)
		}
		b := make([]byte, c.g.BlockSize)
		data = data[copy(b, data):]
		if err := c.put(a, b); err != nil {
			return err
		}
	}
	return c.put(ip.Num.Addr, di)
}

// loadRindex reads the repaired index and rebuilds headers that do not agree
// with it; their counters come right in the bitmaps pass.
func (c *checker) loadRindex() error {
	c.f.Drop()
	rgs, err := c.f.RGs()
	if err != nil {
		return err
	}
	c.rgs = append([]ondisk.Rindex(nil), rgs...)
	c.lastRG = 0
	if c.blocks == nil {
		c.blocks = newBlockMap(c.f.Blocks() + 1)
	}
	c.clean = make([]bool, len(c.rgs))
	return nil
}
