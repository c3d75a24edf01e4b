package fsm

import (
	"encoding/json"
	"io"
)

// WriteJSON is the body of Machine.Snapshot for a state that JSON gives one
// form: structs, slices in a fixed order and string-keyed maps (sorted by
// encoding/json).
func WriteJSON(w io.Writer, state any) error {
	b, err := json.Marshal(state)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return err
}

// ReadJSON is the body of Machine.Restore: strict.
func ReadJSON[T any](r io.Reader) (*T, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	v := new(T)
	if err := DecodeStrict(b, v); err != nil {
		return nil, err
	}
	return v, nil
}
