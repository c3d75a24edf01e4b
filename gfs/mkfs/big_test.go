package mkfs

import (
	"os"
	"testing"
)

// TestBigSparse: a 10 TiB sparse file, geometry against mkfs.gfs2. It writes
// 2 x 3.8 GiB, so only when asked (BLOCKHOUSE_PROVE).
func TestBigSparse(t *testing.T) {
	if os.Getenv("BLOCKHOUSE_PROVE") == "" {
		t.Skip("skip: writes 8 GiB; set BLOCKHOUSE_PROVE=1")
	}
	need(t, "mkfs.gfs2", "gfs2_edit", "fsck.gfs2")
	compare(t, combo{size: 10 << 40, j: 5, align: -1})
}

// TestWriteCalls: at 1 GiB, at most 1/100 of the 12 888 writes of mkfs.gfs2
// (facts §5.1).
func TestWriteCalls(t *testing.T) {
	t.Parallel()
	res, err := makeOurs(t, sparse(t, "img", 1<<30), combo{j: 5, align: -1}.config())
	if err != nil {
		t.Fatal(err)
	}
	if res.Writes > 12888/100 {
		t.Errorf("%d write calls", res.Writes)
	}
}
