// Package api is the contract of the admin plane: the types that /v1 speaks, the
// errors with their exit codes, and the client. The server's handlers are in
// node/control; clusteradm prints these very types with -o json; web pages are
// made of them.
//
// It holds no logic of the cluster. cli, webui and node may import it; it
// imports nothing of ours.
package api

// Version is what every JSON document carries as apiVersion.
const Version = "blockhouse/v1"
