# Builds and runs the program that measures the SSD tier and the index. Sourced, never run.
# shellcheck shell=bash

# shellcheck source=scripts/lib/bench_harness.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/bench_harness.sh"

NIXL=1.5.1

need_fio() {
    need_program fio "which our figures stand beside"
}

# A peer's command goes to the program as a variable, one word a line; or "!" and why there is none.
peer_foyer() { peer_crate foyer FOYER; }
peer_dashmap() { peer_crate dashmap DASHMAP; }

# peer_crate NAME VARIABLE: a program of bench/peers.
peer_crate() {
    local said='!it does not build here'
    need_rust
    if quiet "peer-$1" "building $1, a peer (some minutes, once)" env CARGO_TARGET_DIR="$ROOT/target/peers" \
        cargo build --release --locked --manifest-path "$ROOT/bench/peers/$1/Cargo.toml"; then
        said=$ROOT/target/peers/release/pillion-peer-$1
    fi
    export "PILLION_PEER_$2=$said"
}

peer_nixl() {
    local dir=$VENVS/peers recipe="nixl $NIXL"
    need_python
    if ! is_stamped "$dir" "$recipe"; then
        rm -rf "$dir"
        # Its POSIX backend needs neither torch nor CUDA, which would be gigabytes.
        if ! quiet peers-venv "making .venv/peers" "$PYTHON" -m venv "$dir" ||
            ! quiet peers "installing NIXL, a peer" "$dir/bin/python" -m pip install --quiet --no-deps "nixl==$NIXL" "nixl-cu12==$NIXL" numpy; then
            export PILLION_PEER_NIXL='!its wheel cannot be installed here'
            return 0
        fi
        printf '%s' "$recipe" >"$dir/.complete"
    fi
    printf -v PILLION_PEER_NIXL '%s\n%s' "$dir/bin/python" "$ROOT/bench/peers/nixl_posix.py"
    export PILLION_PEER_NIXL
}

# Its environment is gigabytes: where other benches made one.
peer_lmcache_fs() {
    local dir=$VENVS/lmcache-$LMCACHE
    PILLION_PEER_LMCACHE_FS='!not installed: ./scripts/bench copy installs it'
    [[ ! -f $dir/.complete ]] || printf -v PILLION_PEER_LMCACHE_FS '%s\n%s' "$dir/bin/python" "$ROOT/bench/peers/lmcache_fs.py"
    export PILLION_PEER_LMCACHE_FS
}

# set_aside MIB: so much memory in 2 MiB pages, until this shell ends.
set_aside() {
    local pages=/proc/sys/vm/nr_hugepages before
    before=$(<"$pages")
    # shellcheck disable=SC2064 # what it is now
    trap "echo $before >$pages" EXIT
    echo $((before + $1 / 2)) >"$pages" 2>/dev/null || die "cannot set memory aside in 2 MiB pages: expected to be root"
}

# bench_native COMMAND ARGUMENTS...: paths among the arguments are relative to where the caller is.
bench_native() {
    need_rust
    quiet bench-native "building bench/native" cargo build --release --locked -p pillion-bench
    local args=() commit word
    for word in "$@"; do
        if [[ $word == --huge-pages ]]; then set_aside 1700; else args+=("$word"); fi
    done
    callers_paths args
    commit=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)
    PILLION_COMMIT=$commit "$ROOT/target/release/pillion-bench" "${args[@]}"
}
