# Builds and runs the program that measures the SSD tier. Sourced, never run.
# shellcheck shell=bash

# shellcheck source=scripts/lib/env.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"

# bench_ssd COMMAND ARGUMENTS...: paths among the arguments are relative to where the caller is.
bench_ssd() {
    need_rust
    quiet bench-ssd "building bench/ssd" cargo build --release --locked -p pillion-bench-ssd
    local args=("$@") i commit
    for ((i = 0; i < ${#args[@]}; i++)); do
        case ${args[i]} in
        --dir | --json)
            i=$((i + 1))
            if [[ -n ${args[i]:-} && ${args[i]} != /* ]]; then args[i]=$CALLER/${args[i]}; fi
            ;;
        esac
    done
    commit=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)
    PILLION_COMMIT=$commit exec "$ROOT/target/release/pillion-bench-ssd" "${args[@]}"
}
