# gantry: everything a developer or CI runs. `make` alone prints what there is.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(CURDIR)/.cache
PEERS := $(CACHE)/bin
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X github.com/gantryd/gantry/plugin/config.Version=$(VERSION)
PREFIX ?= /usr/local

# Tests and the demo find the built programs through these.
export GANTRY_PEERS := $(PEERS)
export GANTRY_BIN := $(CURDIR)/bin
export GANTRY_CACHE := $(CACHE)

PEER_NAMES := containerd ctr containerd-shim-runc-v2 runc registry
PEER_BINS := $(addprefix $(PEERS)/,$(PEER_NAMES))
EROFS_BINS := $(addprefix $(PEERS)/,mkfs.erofs fsck.erofs dump.erofs)
OLDER := v2.2 v2.3
OLDER_BINS := $(foreach line,$(OLDER),$(addprefix $(PEERS)/$(line)/,containerd ctr containerd-shim-runc-v2))
BUILDKIT_BINS := $(addprefix $(PEERS)/,buildkitd buildctl)
PACKLAYER := $(PEERS)/packlayer
KUBELET := $(PEERS)/kubelet
LINTER := $(PEERS)/golangci-lint

.PHONY: help
help: ## print this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

.PHONY: build
build: ## build bin/gantryd and bin/gantry
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...

.PHONY: demo
demo: build peers ## pull and run an image through gantry in a private folder (root; IMAGE=ref for one of yours)
	go run ./integration/demo $(if $(IMAGE),-image '$(IMAGE)')

.PHONY: test
test: test-unit test-integration ## run all tests (root)

# With the race detector tests are shorter (-short), or left out; these packages have such tests.
SHORTER = $$(grep -rlE --include='*_test.go' 'short\.Size|testing\.Short|go:build !race' cmd content plugin snapshotter | xargs -n 1 dirname | sort -ur | sed 's|^|./|')

# The last by name, the snapshotter's, take longest and often wait for disks: they begin first, and one package more than
# there are processors is tested at once. With two more the longest would be held up.
UNIT = $$(go list ./... | grep -v /integration | sort -r)

.PHONY: test-unit
test-unit: prerequisites ## run the tests beside the code (RACE=1: and with the race detector)
	$(if $(RACE),go test -count=1 -race -short -p 3 -timeout 20m $(UNIT))
	go test -count=1 -p 3 -timeout 20m $(if $(RACE),$(SHORTER),$(UNIT))

.PHONY: test-integration
test-integration: build peers prerequisites ## run the tests against containerd, runc and a registry (RUN=regexp)
	go test -count=1 -timeout 20m $(if $(RUN),-run '$(RUN)') $(if $(V),-v) ./integration/...

.PHONY: corpus-random
corpus-random: ## compare random hostile layers with overlayfs, in each mode (root; FOR=10m SEED=1)
	go test -count=1 -v -timeout 0 -run 'TestRandomCorpus$$' ./snapshotter -args -corpus.for=$(or $(FOR),10m) -corpus.seed=$(or $(SEED),1) | grep -vE '^ *(=== |--- PASS)|level='

# A target of its own, with a file of its own tag: whoever runs `make test` need not build Kubernetes.
.PHONY: test-kubelet
test-kubelet: build peers $(KUBELET) kubelet-prerequisites ## have a real kubelet run pods on gantry (root; builds it once, some minutes: CI has no time for it)
	go test -count=1 -timeout 10m -tags kubelet -run '^TestKubelet$$' $(if $(V),-v) ./integration

# The sandboxes of a kubelet need a runc with seccomp, which the peers' is built without.
.PHONY: kubelet-prerequisites
kubelet-prerequisites: ## install what the kubelet needs from Debian (runc)
	@if ! [ -x /usr/sbin/runc ] && [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && apt-get install -qy --no-install-recommends runc; \
	fi
	@[ -x /usr/sbin/runc ] || { echo "runc is missing: apt-get install runc" >&2; exit 1; }

# The same: systemd is no part of every machine that runs the tests.
.PHONY: test-systemd
test-systemd: build systemd-prerequisites ## have systemd itself restart gantryd by its unit, in namespaces of their own (root)
	go test -count=1 -timeout 5m -tags systemd -run '^TestUnit$$' $(if $(V),-v) ./integration

.PHONY: systemd-prerequisites
systemd-prerequisites: ## install what test-systemd needs from Debian (systemd)
	@if ! [ -x /lib/systemd/systemd ] && [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && apt-get install -qy --no-install-recommends systemd; \
	fi
	@[ -x /lib/systemd/systemd ] || { echo "systemd is missing: apt-get install systemd" >&2; exit 1; }

.PHONY: lint
lint: $(LINTER) ## run golangci-lint
	$(LINTER) run ./...

.PHONY: bench
bench: build peers bench-prerequisites ## pulls, starts and reads beside containerd's and skopeo's, deflate, stages, memory (ROUNDS=5 GB=10 KINDS=gantry,skopeo ONLY=pull,wide,large,stored,small,tail,deflate,stages,memory,gc,start,read; all of it takes half an hour)
	go run ./integration/bench -rounds $(or $(ROUNDS),5) -gb $(or $(GB),10) $(if $(ONLY),-only $(ONLY)) $(if $(KINDS),-kinds $(KINDS))

# Installed when missing and we may. The bench goes on without them, and says what it did not measure. mkfs.erofs is `make erofs-utils`'s.
.PHONY: bench-prerequisites
bench-prerequisites: ## install what the bench needs from Debian (skopeo, linux-perf)
	@if ! { command -v skopeo && command -v perf; } >/dev/null && [ "$$(id -u)" = 0 ]; then \
		{ apt-get update -q && apt-get install -qy --no-install-recommends skopeo linux-perf; } || echo "skopeo or linux-perf is missing" >&2; \
	fi

.PHONY: soak
soak: build peers ## pull, run and remove from 20 clients while gantryd is killed (MINUTES=10 CYCLES=500 SEED=1 RETAIN=all UPPER=directory)
	go run ./integration/soak -minutes $(or $(MINUTES),10) -cycles $(or $(CYCLES),500) -seed $(or $(SEED),1) \
		-retain $(or $(RETAIN),all) -upper $(or $(UPPER),directory)

.PHONY: install
install: build ## install both programs under PREFIX (default /usr/local)
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin bin/gantryd bin/gantry

.PHONY: clean
clean: ## remove what was built, peers and cached test images too
	rm -rf bin .cache

.PHONY: peers
peers: $(PEER_BINS) $(OLDER_BINS) $(BUILDKIT_BINS) $(PACKLAYER) ## build containerd, ctr, the shim (and two older lines of them), runc, buildkit and the registry for tests

# One recipe a program, made again only when its module file changes.
$(PEERS)/%: CGO_ENABLED := 0
$(PEERS)/runc: CGO_ENABLED := 1
$(PEERS)/containerd: PEER_LDFLAGS := -X github.com/containerd/containerd/v2/version.Version=v2.4.2
$(PEER_BINS): integration/peers/go.mod
	@mkdir -p $(PEERS)
	@echo "build $(@F)"
	@cd integration/peers && CGO_ENABLED=$(CGO_ENABLED) go build -trimpath -ldflags '-s -w $(PEER_LDFLAGS)' -o $@ "$$(go list -f '{{.ImportPath}}' tool | grep -E '/$(@F)$$')"
	@touch $@

# Programs that share most of their packages, built together, from a module whose versions are theirs alone.
CONTAINERD := github.com/containerd/containerd/v2
define build-together
	@mkdir -p $(@D)
	@echo "build $(notdir $(@D))/$(@F) and what goes with it"
	@cd $(<D) && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X $(CONTAINERD)/version.Version=$$(go list -m -f '{{.Version}}' $(CONTAINERD))" -o $(@D)/ tool
	@touch $(1)
endef

define older-line
$(addprefix $(PEERS)/$(1)/,containerd ctr containerd-shim-runc-v2) &: integration/peers/$(1)/go.mod
	$$(call build-together,$(PEERS)/$(1)/*)
endef
$(foreach line,$(OLDER),$(eval $(call older-line,$(line))))

$(BUILDKIT_BINS) &: integration/peers/buildkit/go.mod
	$(call build-together,$(BUILDKIT_BINS))

# A module of its own: it alone needs the libraries that write eStargz and zstd:chunked.
$(PACKLAYER): $(wildcard integration/formats/*.go) integration/formats/go.mod
	@mkdir -p $(PEERS)
	@echo "build $(@F)"
	@cd integration/formats && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@ .

$(KUBELET): integration/peers/kubelet/go.mod
	@mkdir -p $(PEERS)
	@echo "build $(@F)"
	@cd $(<D) && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@ k8s.io/kubernetes/cmd/kubelet
	@touch $@

$(LINTER): integration/lint/go.mod
	@mkdir -p $(PEERS)
	@echo "build $(@F)"
	@cd integration/lint && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o $@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@

.PHONY: debian
debian: prerequisites ## make the layers of the Debian images in .cache (root; minutes of network, once)
	go run ./integration/debian

# With -j the network and the processors are busy at once.
.PHONY: ready
ready: peers $(LINTER) debian ## build and fetch all that CI needs (use -j)

.PHONY: erofs-utils
erofs-utils: $(EROFS_BINS) ## put mkfs.erofs and fsck.erofs 1.7 or later beside the peers (root)

$(EROFS_BINS) &: integration/tools/erofs-utils.sh
	@integration/tools/erofs-utils.sh $(CACHE)/tools $(PEERS)
	@touch -h $(EROFS_BINS)

# debootstrap makes the Debian test image, mkfs.xfs a file system that shares blocks. Installed when missing and we may;
# the tests themselves fail without them.
.PHONY: prerequisites
prerequisites: erofs-utils ## install what the tests need from Debian (debootstrap, xfsprogs; erofs-utils into .cache)
	@if ! { command -v debootstrap && command -v mkfs.xfs; } >/dev/null && [ "$$(id -u)" = 0 ]; then \
		apt-get update -q && apt-get install -qy --no-install-recommends debootstrap xfsprogs; \
	fi
	@for p in debootstrap mkfs.xfs; do command -v $$p >/dev/null || \
		{ echo "$$p is missing: apt-get install debootstrap xfsprogs" >&2; exit 1; }; done
