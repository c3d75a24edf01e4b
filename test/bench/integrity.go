package main

import (
	"context"
	"errors"

	"github.com/google/uuid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/block/file"
	"github.com/blockhouse-san/blockhouse/block/integrity"
)

// openIntegrity opens a store with checksums, which are made anew: the data in it were
// there before, as for a volume that is given checksums later.
func openIntegrity(ctx context.Context, path string) (_ block.Device, err error) {
	o := file.Options{Cache: file.Buffered}
	data, err := file.Open(path, o)
	if err != nil {
		return nil, err
	}
	side, err := file.Create(path+".sums", integrity.SideSize(data.Info().Size), o)
	if err != nil {
		return nil, errors.Join(err, data.Close())
	}
	id := uuid.UUID{15: 1}
	err = integrity.Format(ctx, side, data.Info().Size, id, true)
	var d *integrity.Device
	if err == nil {
		d, err = integrity.Open(ctx, data, side, integrity.Options{UUID: id})
	}
	if err != nil {
		return nil, errors.Join(err, data.Close(), side.Close())
	}
	return d, nil
}
