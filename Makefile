# Everything that is done with this tree. `make help` lists it.
.DEFAULT_GOAL := build
.DELETE_ON_ERROR:

GO       ?= go
VERSION  ?= 0.1.0
PKG      ?= ./...
RUN      ?= .
FUZZTIME ?= 10s
N        ?= 20

TOOL    := $(GO) tool -modfile=tools/go.mod
TESTSUM := bin/tools/testsum
# Assertions that cost too much in production are on in every test.
TAGS    := invariants
RACE    := -race -tags $(TAGS) -count=1
LDFLAGS := -s -w -X github.com/blockhouse-san/blockhouse/internal/version.Version=$(VERSION)

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the three programs into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: demo
demo: build ## three nodes on this machine, one LUN, a filesystem on it
	bin/clusteradm demo up

.PHONY: deps
deps: ## install the peers that the tests need (Debian, as root)
	tools/deps

# The packages outside test/ run first and two at a time. Those under test/ boot
# kernels and clusters: one at a time, so that none starves another.
.PHONY: test
test: testsum build vet ## everything that a change must pass; installs nothing
	$(TESTSUM) \
	  -- $(GO) test -json $(RACE) -timeout 10m $$($(GO) list ./... | grep -v '/blockhouse/test\(/\|$$\)') \
	  -- $(GO) test -json $(RACE) -timeout 20m -p 1 ./test/...

# Built first, because `go run` would write its own word after the closing line.
.PHONY: testsum
testsum:
	@$(GO) build -o $(TESTSUM) ./internal/cmd/testsum

.PHONY: vet
vet: ## go vet, with and without the assertions
	$(GO) vet ./...
	$(GO) vet -tags $(TAGS) ./...

.PHONY: prove
prove: testsum ## full counts: make prove [N=20] [PKG=./fence/...] [RUN=TestX]
	BLOCKHOUSE_PROVE=$(N) $(TESTSUM) -- $(GO) test -json $(RACE) -timeout 4h -p 1 -run '$(RUN)' $(PKG)

SEEDS ?= 200

.PHONY: sim
sim: testsum ## the simulated cluster: make sim [SEEDS=2000]; then each safety rule switched off
	SIM_SEEDS=$(SEEDS) $(TESTSUM) -- $(GO) test -json -tags $(TAGS) -count=1 -timeout 4h ./test/sim

.PHONY: lint
lint: ## golangci-lint: layers, pure cores, docs, errors, format
	$(TOOL) golangci-lint run ./...

# The database of vulnerabilities comes as a Go module: closed networks reach the
# module proxy, and a run today says what the same run says tomorrow.
VULNMOD = $(shell $(GO) list -modfile=tools/go.mod -m -f '{{.Version}}' golang.org/x/vulndb)
VULNDB  = $(CURDIR)/.cache/vulndb-$(VULNMOD)

.PHONY: vuln
vuln: ## govulncheck: findings in modules fail
	@if [ ! -e '$(VULNDB)/index' ]; then \
	  $(GO) mod download -modfile=tools/go.mod golang.org/x/vulndb; \
	  src=$$($(GO) list -modfile=tools/go.mod -m -f '{{.Dir}}' golang.org/x/vulndb); \
	  rm -rf .cache/vulndb-*; mkdir -p .cache; \
	  $(TOOL) indexdb -vulns "$$src/data/osv" -out '$(VULNDB).new'; \
	  mv '$(VULNDB).new' '$(VULNDB)'; \
	fi
	$(GO) run ./internal/cmd/vulngate -- $(TOOL) govulncheck -format json -db 'file://$(VULNDB)' -tags $(TAGS) ./...

.PHONY: vuln-update
vuln-update: ## take the newest database of vulnerabilities
	$(GO) get -modfile=tools/go.mod golang.org/x/vulndb@latest

.PHONY: fuzz
fuzz: ## every fuzz target for FUZZTIME (10s)
	$(GO) run ./internal/cmd/fuzzall -fuzztime $(FUZZTIME) -tags $(TAGS) $(PKG)

.PHONY: lab
lab: testsum build ## the tests with a real Linux kernel
	$(TESTSUM) -- $(GO) test -json $(RACE) -timeout 20m -p 1 ./test/lab/...

.PHONY: bench
bench: bench-target ## Go benchmarks, and the target beside tgtd: make bench [PKG=./iscsi] [RUN=BenchmarkX]
	$(GO) test -run '^$$' -bench '$(RUN)' -benchmem $(PKG)

# BENCHARGS: -rows REGEXP, -time 2s, -reps 3, -out docs/proof/3-bench.md, -json FILE; -help tells the rest.
.PHONY: bench-target
bench-target: ## our target beside tgtd, under 10 minutes: make bench-target [BENCHARGS='-out docs/proof/3-bench.md']
	$(GO) build -o bin/tools/bench ./test/bench
	bin/tools/bench $(BENCHARGS)

.PHONY: deb
deb: build ## the Debian package, in dist/
	VERSION=$(VERSION) packaging/build-deb

.PHONY: clean
clean: ## remove what was built
	rm -rf bin dist .cache
