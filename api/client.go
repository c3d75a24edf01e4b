package api

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// HeaderTimeout carries how long the client waits, in milliseconds.
const HeaderTimeout = "X-Blockhouse-Timeout"

// Client talks to one clusterd. It may be used by many goroutines.
type Client struct {
	base string
	http *http.Client
	name string // of the far end, for messages
	head http.Header
}

// SetHeader adds a header to every request. Call it before the first one.
func (c *Client) SetHeader(key, value string) {
	if c.head == nil {
		c.head = http.Header{}
	}
	c.head.Set(key, value)
}

// Dial makes a client for the daemon on this host (unix socket). It does not
// connect yet.
func Dial(socket string) *Client {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		MaxIdleConns: 4, IdleConnTimeout: 10 * time.Second,
	}
	return &Client{base: "http://clusterd", http: &http.Client{Transport: t}, name: socket}
}

// DialTLS makes a client for host:port with a client certificate in cfg.
func DialTLS(addr string, cfg *tls.Config) *Client {
	t := &http.Transport{TLSClientConfig: cfg, MaxIdleConns: 4, IdleConnTimeout: 10 * time.Second,
		DialContext: (&net.Dialer{Timeout: 3 * time.Second}).DialContext, TLSHandshakeTimeout: 3 * time.Second}
	return &Client{base: "https://" + addr, http: &http.Client{Transport: t}, name: addr}
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Do sends in (nil: no body) and decodes the answer into out (nil: dropped).
// Every error is an *Error; its Code gives the exit status.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return Errorf(CodeInternal, "", "encode %s %s: %v", method, path, err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return Errorf(CodeUsage, "", "%s %s: %v", method, path, err)
	}
	for k, v := range c.head {
		req.Header[k] = v
	}
	if end, ok := ctx.Deadline(); ok {
		req.Header.Set(HeaderTimeout, strconv.FormatInt(max(1, time.Until(end).Milliseconds()), 10))
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode >= 400 {
		return c.answerError(resp)
	}
	if out == nil {
		_, _ = io.Copy(io.Discard, resp.Body)
		return nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		if ctx.Err() != nil { // the deadline fell into the body: a timeout, not a bad answer
			return c.transportError(ctx, err)
		}
		return Errorf(CodeInternal, "", "decode the answer to %s %s: %v", method, path, err)
	}
	return nil
}

// answerError makes the error of an answer whose status says failure.
func (c *Client) answerError(resp *http.Response) error {
	var eb ErrorBody
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if json.Unmarshal(b, &eb) == nil && eb.Error != nil {
		return eb.Error
	}
	return Errorf(CodeInternal, "", "%s answered %s: %s", c.name, resp.Status, strings.TrimSpace(string(b)))
}

func (c *Client) transportError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return Errorf(CodeTimeout, "", "no answer from clusterd at %s: %v", c.name, ctx.Err())
	}
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	// A certificate that was refused says so itself (membership/pki).
	var denied interface{ Denied() bool }
	if errors.As(err, &denied) && denied.Denied() {
		return Errorf(CodeDenied, "", "connect to clusterd at %s: %v", c.name, err)
	}
	next := "systemctl status clusterd"
	if errors.Is(err, os.ErrPermission) {
		return Errorf(CodeDenied, "run it as root or as the user that runs clusterd", "connect to clusterd at %s: %v", c.name, err)
	}
	return Errorf(CodeUnreachable, next, "connect to clusterd at %s: %v", c.name, err)
}

// Get reads a document.
func Get[T any](ctx context.Context, c *Client, path string) (T, error) {
	var v T
	err := c.Do(ctx, http.MethodGet, path, nil, &v)
	return v, err
}

// Post sends a change and reads its answer.
func Post[T any](ctx context.Context, c *Client, path string, in any) (T, error) {
	var v T
	err := c.Do(ctx, http.MethodPost, path, in, &v)
	return v, err
}

// Delete removes an object.
func Delete(ctx context.Context, c *Client, path string) (Done, error) {
	var v Done
	err := c.Do(ctx, http.MethodDelete, path, nil, &v)
	return v, err
}

// Events reads server-sent events until ctx ends or fn returns an error.
func (c *Client) Events(ctx context.Context, fn func(Event) error) error {
	return c.events(ctx, PathEvents, fn)
}

// RecentEvents reads the events that the daemon still remembers and returns.
func (c *Client) RecentEvents(ctx context.Context, fn func(Event) error) error {
	return c.events(ctx, PathEvents+"?follow=0", fn)
}

func (c *Client) events(ctx context.Context, path string, fn func(Event) error) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.base+path, nil)
	if err != nil {
		return Errorf(CodeUsage, "", "events: %v", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.transportError(ctx, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		return c.answerError(resp)
	}
	dec := newLineReader(resp.Body)
	for {
		line, err := dec()
		if err != nil {
			if errors.Is(err, io.EOF) || ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("read events: %w", err)
		}
		data, ok := strings.CutPrefix(line, "data: ")
		if !ok {
			continue
		}
		var ev Event
		if err := json.Unmarshal([]byte(data), &ev); err != nil {
			return Errorf(CodeInternal, "", "decode event: %v", err)
		}
		if err := fn(ev); err != nil {
			return err
		}
	}
}
