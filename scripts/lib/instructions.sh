# Counts the instructions of the client's calls. Sourced, never run.
# shellcheck shell=bash

# shellcheck source=scripts/lib/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

# instructions [--write]
instructions() {
    need_rust
    need_program valgrind "which counts instructions"
    locked "vllm-$VLLM_MAIN" vllm_env "$VLLM_MAIN"
    "$ROOT/scripts/build-wheel"
    locked "vllm-$VLLM_MAIN" install_wheel "$VLLM_MAIN"
    # By way of the C library: valgrind knows nothing of the kernel's own clock page, which rustix reads otherwise. And in
    # a folder of its own, for such flags make everything anew.
    RUSTFLAGS=--cfg=rustix_use_libc CARGO_TARGET_DIR=$ROOT/target/instructions quiet instructions "building what is counted" \
        cargo build --release --locked -p pillion-instructions
    exec "$VENVS/vllm-$VLLM_MAIN/bin/python" "$ROOT/scripts/lib/instructions.py" \
        "$ROOT/target/instructions/release/pillion-instructions" "$VENVS/vllm-$VLLM_MAIN/bin/pillion" "$@"
}
