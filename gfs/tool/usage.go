package tool

import (
	"fmt"

	"github.com/blockhouse-san/blockhouse/gfs/fs"
	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// Usage is what a filesystem holds, counted from its resource groups.
type Usage struct {
	Super     ondisk.Superblock
	Journals  int
	RGs       int
	Total     uint64 // blocks
	Free      uint64
	Dinodes   uint64
	Metadata  uint64 // blocks in use that are neither dinodes nor free: data and metadata of files
	BlockSize int
}

// ReadUsage reads every resource group header.
func ReadUsage(f *fs.FS) (Usage, error) {
	u := Usage{Super: f.Super, BlockSize: f.Geometry().BlockSize}
	var err error
	if u.Journals, err = f.Journals(); err != nil {
		return u, err
	}
	rgs, err := f.RGs()
	if err != nil {
		return u, err
	}
	u.RGs = len(rgs)
	for i := range rgs {
		h, err := ReadRgrp(f, &rgs[i])
		if err != nil {
			return u, err
		}
		u.Total += uint64(rgs[i].Data)
		u.Free += uint64(h.Free)
		u.Dinodes += uint64(h.Dinodes)
	}
	return u, nil
}

// ReadRgrp reads the header of a resource group.
func ReadRgrp(f *fs.FS, ri *ondisk.Rindex) (ondisk.Rgrp, error) {
	var h ondisk.Rgrp
	b, err := f.Block(ri.Addr)
	if err != nil {
		return h, err
	}
	if err := ondisk.CheckMeta(b, ondisk.TypeRG); err != nil {
		return h, fmt.Errorf("resource group at block %d: %w: %w", ri.Addr, fs.ErrCorrupt, err)
	}
	return h, h.Decode(b)
}

// QuotaEntry is a line of the quota file that is not all zero.
type QuotaEntry struct {
	Group bool
	ID    uint32
	ondisk.Quota
}

// Quotas reads the quota file; holes and empty entries are skipped.
func Quotas(f *fs.FS) ([]QuotaEntry, error) {
	ip, err := f.System("quota")
	if err != nil {
		return nil, err
	}
	var out []QuotaEntry
	buf := make([]byte, ondisk.QuotaSize)
	// A file can be sparse up to 2^33 entries: look only where blocks are.
	each := func(from, to uint64) error {
		for off := from / ondisk.QuotaSize * ondisk.QuotaSize; off+ondisk.QuotaSize <= min(to+ondisk.QuotaSize, ip.Size); off += ondisk.QuotaSize {
			if n := len(out); n > 0 && quotaOff(out[n-1]) >= off {
				continue
			}
			if _, err := ip.ReadAt(buf, int64(off)); err != nil {
				return err
			}
			e := QuotaEntry{Group: off/ondisk.QuotaSize%2 == 1, ID: uint32(off / ondisk.QuotaSize / 2)}
			if err := e.Decode(buf); err != nil {
				return err
			}
			if e.Quota != (ondisk.Quota{}) {
				out = append(out, e)
			}
		}
		return nil
	}
	if ip.Stuffed() {
		return out, each(0, ip.Size)
	}
	unit := ip.Unit()
	for n := uint64(0); n*unit < ip.Size; n++ {
		a, err := ip.Map(n)
		if err != nil {
			return out, err
		}
		if a == 0 {
			continue
		}
		if err := each(n*unit, (n+1)*unit); err != nil {
			return out, err
		}
	}
	return out, nil
}

func quotaOff(e QuotaEntry) uint64 {
	n := uint64(e.ID) * 2
	if e.Group {
		n++
	}
	return n * ondisk.QuotaSize
}
