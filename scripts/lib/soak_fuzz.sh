# Builds the fuzz targets with libFuzzer and runs them. Sourced, never run.
# shellcheck shell=bash

# shellcheck source=scripts/lib/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

FUZZ_DIR=tests/fuzz/cargo-fuzz

# soak_fuzz ARGUMENTS...: those of scripts/lib/fuzz.py.
soak_fuzz() {
    need_rust
    need_python
    cargo +nightly --version >/dev/null 2>&1 ||
        die "expected a nightly Rust toolchain, which libFuzzer's coverage needs, found none: run 'rustup toolchain install nightly', then run this again"
    cargo fuzz --version >/dev/null 2>&1 || locked cargo-fuzz cargo_fuzz
    local host args=("$@")
    host=$(rustc +nightly -vV | sed -n 's/^host: //p')
    callers_paths args
    PATH=$VENVS/cargo-tools/bin:$PATH quiet fuzz-build "building the fuzz targets (some minutes the first time)" \
        cargo +nightly fuzz build --fuzz-dir "$FUZZ_DIR" --target-dir "$ROOT/target/fuzz"
    "$PYTHON" "$ROOT/scripts/lib/fuzz.py" --binaries "$ROOT/target/fuzz/$host/release" --commit "$(commit_name)" "${args[@]}"
}
