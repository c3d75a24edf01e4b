package fsck

import (
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// checkBitmaps compares what the trees use with the bitmaps and counters of
// every resource group, and makes those right. Groups that were seen empty and
// in which nothing was found are not read again.
func (c *checker) checkBitmaps() error {
	unlinked := map[uint64]bool{}
	if err := c.each(func(ip *inode) error {
		if ip.unlinked {
			unlinked[ip.addr] = true
		}
		return nil
	}); err != nil {
		return err
	}
	c.res.Total, c.res.Free, c.res.Inodes = 0, 0, 0
	var bits []byte
	for i := range c.rgs {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		r := &c.rgs[i]
		c.res.Total += uint64(r.Data)
		if c.clean[i] && c.blocks.empty(r.Data0, uint64(r.Data)) {
			c.res.Free += uint64(r.Data)
			continue
		}
		need := int(r.Length) << c.g.Shift
		if cap(bits) < need {
			bits = make([]byte, need)
		}
		bits = bits[:need]
		if err := c.f.ReadBlocks(bits, r.Addr); err != nil {
			return err
		}
		if err := c.reconcile(i, bits, unlinked); err != nil {
			return err
		}
		c.cfg.Progress("bitmaps", uint64(i+1), uint64(len(c.rgs)))
	}
	return nil
}

func (c *checker) reconcile(i int, bits []byte, unlinked map[uint64]bool) error {
	r := &c.rgs[i]
	var h ondisk.Rgrp
	if err := h.Decode(bits); err != nil {
		return err
	}
	var counts [4]uint64
	dirty := make([]bool, r.Length)
	shown := 0
	const perGroup = 8 // lines; a wiped bitmap has tens of thousands of differences
	for k := range int(r.Length) {
		off, n, first := c.g.BitmapSpan(k, r.Bitbytes)
		m := bits[k<<c.g.Shift+off:][:n]
		for j := range m {
			want := byte(0)
			base := r.Data0 + first + uint64(j)*ondisk.NBBY
			for s := range uint64(ondisk.NBBY) {
				st := c.blocks.get(base + s)
				if st == ondisk.DinodeSt && unlinked[base+s] {
					st = ondisk.Unlinked
				}
				counts[st]++
				want |= byte(st) << (2 * s)
			}
			if want == m[j] {
				continue
			}
			for s := range uint64(ondisk.NBBY) {
				is, to := ondisk.BlockState(m[j]>>(2*s))&3, ondisk.BlockState(want>>(2*s))&3
				if is == to {
					continue
				}
				if shown++; shown <= perGroup {
					c.problem("Block %d is marked %s and is %s", base+s, stateName[is], stateName[to])
				}
			}
			m[j] = want
			dirty[k] = true
		}
	}
	if shown > perGroup {
		c.problem("Resource group %d: %d more blocks are marked wrongly", i, shown-perGroup)
	}
	c.res.Free += counts[ondisk.Free]
	c.res.Inodes += counts[ondisk.DinodeSt]
	if uint64(h.Free) != counts[ondisk.Free] || uint64(h.Dinodes) != counts[ondisk.DinodeSt] {
		c.problem("Resource group %d: %d free blocks and %d inodes counted, the header says %d and %d",
			i, counts[ondisk.Free], counts[ondisk.DinodeSt], h.Free, h.Dinodes)
		h.Free, h.Dinodes = uint32(counts[ondisk.Free]), uint32(counts[ondisk.DinodeSt])
		dirty[0] = true
	}
	for k, d := range dirty {
		if !d {
			continue
		}
		b := bits[k<<c.g.Shift : (k+1)<<c.g.Shift]
		if k == 0 {
			if err := h.Encode(b); err != nil {
				return err
			}
			ondisk.SealRgrp(b)
		}
		if err := c.put(r.Addr+uint64(k), b); err != nil {
			return err
		}
	}
	return nil
}

var stateName = [4]string{"free", "in use", "an unlinked inode", "an inode"}
