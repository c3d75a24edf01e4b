package target

import (
	"encoding/hex"
	"slices"

	"github.com/blockhouse-san/blockhouse/scsi"
)

// vpdPages are what INQUIRY with EVPD answers, besides 00h.
var vpdPages = map[uint8]func(*exec) []byte{
	scsi.VPDSerial:        func(x *exec) []byte { return scsi.VPD(scsi.VPDSerial, []byte(x.serial())) },
	scsi.VPDDeviceID:      vpdDeviceID,
	scsi.VPDExtended:      vpdExtended,
	scsi.VPDBlockLimits:   vpdBlockLimits,
	scsi.VPDBlockDevice:   vpdBlockDevice,
	scsi.VPDLogicalBlocks: vpdProvisioning,
}

func (x *exec) serial() string {
	if x.lu.id.Serial != "" {
		return x.lu.id.Serial
	}
	return hex.EncodeToString(x.lu.id.UUID[:])
}

func checkInquiry(t *task) *scsi.Sense {
	page := uint8(t.cdb.Get(scsi.FPage))
	switch {
	case !t.cdb.Is(scsi.FEVPD):
		if page != 0 {
			return scsi.InvalidField(&t.cdb, scsi.FPage)
		}
	case page != scsi.VPDSupported && (vpdPages[page] == nil || t.lu == nil):
		return scsi.InvalidField(&t.cdb, scsi.FPage)
	}
	return nil
}

func runInquiry(x *exec) error {
	if x.lu == nil {
		if x.cdb.Is(scsi.FEVPD) {
			b := scsi.SupportedVPD()
			b[0] = scsi.QualifierNone<<5 | scsi.TypeUnknown
			x.reply(b)
			return nil
		}
		x.reply((&scsi.Inquiry{Qualifier: scsi.QualifierNone, DeviceType: scsi.TypeUnknown, Version: 6, CmdQue: true, Vendor: Vendor}).Bytes())
		return nil
	}
	if x.cdb.Is(scsi.FEVPD) {
		page := uint8(x.cdb.Get(scsi.FPage))
		if page == scsi.VPDSupported {
			var ps []uint8
			for p := range vpdPages {
				ps = append(ps, p)
			}
			x.reply(scsi.SupportedVPD(ps...))
			return nil
		}
		x.reply(vpdPages[page](x))
		return nil
	}
	rev := x.lu.id.Revision
	if rev == "" {
		rev = "0001"
	}
	x.reply((&scsi.Inquiry{
		DeviceType: scsi.TypeDisk, Removable: x.lu.removable, Version: 6, TPGS: 1, CmdQue: true, MultiPort: true, ThirdPartyCopy: true,
		Vendor: Vendor, Product: x.lu.id.Product, Revision: rev,
		Versions: []uint16{scsi.VersionSAM5, scsi.VersionISCSI, scsi.VersionSPC4, scsi.VersionSBC3},
	}).Bytes())
	return nil
}

func vpdDeviceID(x *exec) []byte {
	naa := scsi.NAA6(x.lu.id.UUID)
	c := x.s.tgt.conf.Load()
	return scsi.DeviceID(
		scsi.DesignatorNAAValue(naa[:]),
		scsi.DesignatorUUIDValue(x.lu.id.UUID),
		scsi.DesignatorT10Value(Vendor, x.serial()),
		scsi.DesignatorPortValue(c.RelPort),
		scsi.DesignatorTPGValue(c.TPGT),
		scsi.DesignatorName(scsi.AssocTarget, x.s.tgt.iqn),
	)
}

func vpdBlockDevice(x *exec) []byte {
	d := &scsi.BlockDevice{RotationRate: 1, WABEREQ: 1}
	if x.lu.canCryptoErase() {
		d.WACEREQ = 1
	}
	return d.Bytes()
}

func vpdExtended(x *exec) []byte {
	return (&scsi.Extended{Simple: true, Ordered: true, HeadOfQueue: true, VolatileCache: x.lu.mode.writeCache()}).Bytes()
}

// Limits that VPD page B0 advertises and the handlers hold.
const (
	maxCompareAndWrite  = 255
	maxUnmapDescriptors = 256
	maxUnmapBytes       = 1 << 30
	maxWriteSameBytes   = 128 << 20
)

func vpdBlockLimits(x *exec) []byte {
	i := x.lu.dev.Info()
	bs := uint32(i.BlockSize)
	l := &scsi.BlockLimits{
		MaxCompareAndWrite: maxCompareAndWrite,
		OptimalGranularity: uint16(i.PhysBlock / i.BlockSize),
		MaxTransfer:        maxTransfer / bs,
		OptimalTransfer:    1 << 20 / bs,
		MaxPrefetch:        maxTransfer / bs,
		MaxWriteSame:       uint64(maxWriteSameBytes / bs),
	}
	if i.Caps.Thin {
		l.MaxUnmapBlocks = x.lu.maxUnmapBlocks()
		l.MaxUnmapDescriptors = maxUnmapDescriptors
		l.UnmapGranularity = uint32(i.PhysBlock / i.BlockSize)
		l.UnmapAlignmentValid = true
	}
	if n, unit := x.lu.atomicLimits(); n > 0 {
		l.MaxAtomic, l.AtomicAlignment, l.AtomicGranularity = n, unit, unit
	}
	return l.Bytes()
}

func (u *logicalUnit) maxUnmapBlocks() uint32 {
	i := u.dev.Info()
	n := int64(maxUnmapBytes)
	if i.MaxUnmap > 0 {
		n = min(n, i.MaxUnmap)
	}
	return uint32(min(n/int64(i.BlockSize), 1<<20)) // more at once starves other commands
}

func vpdProvisioning(x *exec) []byte {
	c := x.lu.dev.Info().Caps
	p := &scsi.Provisioning{}
	if c.Thin {
		*p = scsi.Provisioning{ThresholdExponent: thresholdExponent, LBPU: true, LBPWS: true, LBPWS10: true, LBPRZ: c.UnmapZeroes, Type: 2}
	}
	return p.Bytes()
}

// REPORT LUNS select codes (SPC-4 table 272).
const (
	selectAddressable = 0x00 // without well-known logical units
	selectWellKnown   = 0x01
	selectAll         = 0x02
	selectAdmin       = 0x10 // administrative logical units: none
	selectConglom     = 0x11
	selectSubsidiary  = 0x12
)

func checkReportLuns(t *task) *scsi.Sense {
	switch t.cdb.Get(scsi.FSelectReport) {
	case selectAddressable, selectWellKnown, selectAll, selectAdmin, selectConglom, selectSubsidiary:
	default:
		return scsi.InvalidField(&t.cdb, scsi.FSelectReport)
	}
	if t.cdb.Get(scsi.FAlloc) < 16 { // SPC-4 6.33: at least 16 bytes
		return scsi.InvalidField(&t.cdb, scsi.FAlloc)
	}
	return nil
}

func runReportLuns(x *exec) error {
	var luns []scsi.LUN
	switch x.cdb.Get(scsi.FSelectReport) {
	case selectAddressable, selectAll, selectConglom:
		for n := range *x.s.tgt.luns.Load() {
			luns = append(luns, n)
		}
		slices.Sort(luns)
	}
	x.s.unattend(scsi.ASCReportedLunsChanged)
	x.reply(scsi.ReportLuns(luns))
	return nil
}

func runRequestSense(x *exec) error {
	s := scsi.Check(scsi.NoSense, scsi.ASCNone)
	desc := x.cdb.Is(scsi.FDesc)
	if x.lu == nil {
		s = scsi.Check(scsi.IllegalRequest, scsi.ASCLUNotSupported)
	} else if p := x.lu.medium.sanitizing.Load(); p >= 0 {
		s = &scsi.Sense{Key: scsi.NotReady, Code: scsi.ASC(x.lu.medium.busy.Load()), HasProgress: true, Progress: uint16(p)}
	} else if code, ok := x.s.attention(x.lu); ok {
		s = scsi.Check(scsi.UnitAttention, code)
	}
	x.reply(s.Bytes(desc))
	return nil
}
