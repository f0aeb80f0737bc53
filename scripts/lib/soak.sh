# Runs the campaigns of tests/soak, with what they need. Sourced, never run, after env.sh.
# shellcheck shell=bash

# soak NAME ARGUMENTS...: paths among the arguments are relative to where the caller is.
soak() {
    local args=("$@")
    need_system
    need_rust
    locked "vllm-$VLLM_MAIN" vllm_env "$VLLM_MAIN"
    "$ROOT/scripts/build-wheel"
    locked "vllm-$VLLM_MAIN" install_wheel "$VLLM_MAIN"
    if [[ $1 == ssd-faults ]]; then
        quiet faultfs "building the faulty disk" cargo build --locked -p pillion-faultfs
    fi
    callers_paths args
    PYTHONPATH=$ROOT/tests:$ROOT/scripts/lib exec "$VENVS/vllm-$VLLM_MAIN/bin/python" -m soak "${args[@]}"
}
