package fs

import (
	"fmt"

	"github.com/blockhouse-san/blockhouse/gfs/ondisk"
)

// EABlocks calls f for every block that the inode's extended attributes take:
// the indirect block first where there is one, EA blocks, then the data blocks
// of each.
func (ip *Inode) EABlocks(f func(addr uint64, t ondisk.MetaType) error) error {
	return ip.eas(f, func(uint64, *ondisk.EA) error { return nil })
}

// EachEA calls f for every extended attribute.
func (ip *Inode) EachEA(f func(name string, value []byte) error) error {
	return ip.eas(func(uint64, ondisk.MetaType) error { return nil }, func(_ uint64, e *ondisk.EA) error {
		v := append([]byte(nil), e.Value...)
		if e.Ptrs != nil {
			v = make([]byte, 0, e.DataLen)
			for _, p := range e.Ptrs {
				b, err := ip.S.Block(p)
				if err != nil {
					return err
				}
				if err := ondisk.CheckMeta(b, ondisk.TypeED); err != nil {
					return fmt.Errorf("EA data block %d of inode %d: %w: %w", p, ip.Num.Addr, ErrCorrupt, err)
				}
				v = append(v, b[ondisk.MetaHeaderSize:min(len(b), ondisk.MetaHeaderSize+int(e.DataLen)-len(v))]...)
			}
		}
		return f(ondisk.EAPrefix(e.Type)+string(e.Name), v)
	})
}

func (ip *Inode) eas(block func(uint64, ondisk.MetaType) error, attr func(uint64, *ondisk.EA) error) error {
	if ip.Eattr == 0 {
		return nil
	}
	one := func(addr uint64) error {
		if err := block(addr, ondisk.TypeEA); err != nil {
			return err
		}
		b, err := ip.S.Block(addr)
		if err != nil {
			return err
		}
		if err := ondisk.CheckMeta(b, ondisk.TypeEA); err != nil {
			return fmt.Errorf("EA block %d of inode %d: %w: %w", addr, ip.Num.Addr, ErrCorrupt, err)
		}
		b = append([]byte(nil), b...) // the callbacks may read other blocks
		var inner error
		err = ondisk.EachEA(b, func(e *ondisk.EA) bool {
			for _, p := range e.Ptrs {
				if inner = block(p, ondisk.TypeED); inner != nil {
					return false
				}
			}
			if !e.Unused() {
				inner = attr(addr, e)
			}
			return inner == nil
		})
		if inner != nil {
			return inner
		}
		if err != nil {
			return fmt.Errorf("EA block %d of inode %d: %w: %w", addr, ip.Num.Addr, ErrCorrupt, err)
		}
		return nil
	}
	if ip.Flags&ondisk.DIEAIndirect == 0 {
		return one(ip.Eattr)
	}
	if err := block(ip.Eattr, ondisk.TypeIN); err != nil {
		return err
	}
	b, err := ip.S.Block(ip.Eattr)
	if err != nil {
		return err
	}
	if err := ondisk.CheckMeta(b, ondisk.TypeIN); err != nil {
		return fmt.Errorf("EA indirect block %d of inode %d: %w: %w", ip.Eattr, ip.Num.Addr, ErrCorrupt, err)
	}
	var ptrs []uint64
	for off := ondisk.MetaHeaderSize; off+8 <= len(b); off += 8 {
		p := be.Uint64(b[off:])
		if p == 0 {
			break
		}
		ptrs = append(ptrs, p)
	}
	for _, p := range ptrs {
		if err := one(p); err != nil {
			return err
		}
	}
	return nil
}
