package gfs

import (
	"fmt"
	"io"
	"strings"

	"github.com/blockhouse-san/blockhouse/gfs/mkfs"
)

// progressBar shows the stages of mkfs: a moving bar on a terminal, a line for
// each finished stage elsewhere. The journals lie among the resource groups, so
// both stages advance together; the lines come in the order of mkfs.gfs2.
type progressBar struct {
	w       io.Writer
	silent  bool
	draw    bool
	stage   mkfs.Stage
	open    bool // a stage is announced and not done
	percent uint64
}

var stageText = [...]string{
	mkfs.StageJournals: "Adding journals: ",
	mkfs.StageRGs:      "Building resource groups: ",
	mkfs.StageQuota:    "Creating quota file: ",
	mkfs.StageSuper:    "Writing superblock and syncing: ",
}

func (p *progressBar) update(s mkfs.Stage, done, total uint64) {
	if p.silent || s < p.stage || p.stage == mkfs.StageJournals && s == mkfs.StageRGs && p.open {
		return
	}
	if s > p.stage {
		p.stage, p.percent = s, 0
	}
	if !p.open {
		fmt.Fprint(p.w, stageText[s])
		p.open = true
	}
	if done < total {
		if pc := done * 100 / max(total, 1); p.draw && pc > p.percent {
			p.percent = pc
			fill := int(pc) / 4
			fmt.Fprintf(p.w, "\r%s[%s%s] %2d%%", stageText[s], strings.Repeat("=", fill), strings.Repeat(" ", 25-fill), pc)
		}
		return
	}
	if p.draw {
		fmt.Fprintf(p.w, "\r%s\x1b[K", stageText[s])
	}
	fmt.Fprintln(p.w, "Done")
	p.open = false
	p.stage, p.percent = s+1, 0
}

// end closes the line of a stage that did not finish.
func (p *progressBar) end() {
	if p.open && !p.silent {
		fmt.Fprintln(p.w)
	}
}
