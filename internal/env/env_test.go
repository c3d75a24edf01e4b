package env

import (
	"context"
	"testing"
	"time"
)

func TestRealClockIsBoottime(t *testing.T) {
	a := Real{}.Now()
	if err := (Real{}).Sleep(t.Context(), 2*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if d := (Real{}).Now().Sub(a); d < 2*time.Millisecond {
		t.Fatalf("slept 2ms, clock moved %v", d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if (Real{}).Sleep(ctx, time.Hour) == nil {
		t.Fatal("sleep outlived its context")
	}
}

func TestManualClockWakesAtItsTime(t *testing.T) {
	m := NewManual(5)
	done := make(chan Boot)
	go func() {
		_ = m.Sleep(t.Context(), 10)
		done <- m.Now()
	}()
	for {
		select {
		case at := <-done:
			if at < 15 {
				t.Fatalf("woke at %d", at)
			}
			return
		default:
			m.Step(1)
		}
	}
}

func TestBootID(t *testing.T) {
	id, err := BootID()
	if err != nil || len(id) != 36 {
		t.Fatalf("%q %v", id, err)
	}
	if _, err := bootID("/proc/self/comm"); err == nil {
		t.Fatal("accepted something that is no uuid")
	}
}
