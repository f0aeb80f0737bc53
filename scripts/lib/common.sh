# Shell helpers for everything in scripts/: where things are, and how progress is shown.
# Sourced, never run. Needs bash 4.
# shellcheck shell=bash

set -euo pipefail

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)
VENVS=$ROOT/.venv
LOGS=$ROOT/target/logs
# shellcheck disable=SC2034 # for scripts that take paths: what the caller names is relative to here
CALLER=$PWD
mkdir -p "$VENVS" "$LOGS"
cd "$ROOT"

say() { printf '==> %s\n' "$*" >&2; }
note() { printf '    %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# commit_name: the commit that is checked out, and whether there is more.
commit_name() {
    have git && git -C "$ROOT" rev-parse --git-dir >/dev/null 2>&1 || return 0
    local name
    name=$(git -C "$ROOT" rev-parse HEAD 2>/dev/null) || return 0
    [[ -z $(git -C "$ROOT" status --porcelain 2>/dev/null) ]] || name+=-changed
    printf '%s' "$name"
}

# quiet NAME TEXT COMMAND...: runs the command with its output in target/logs/NAME.log,
# shows that it is alive, how long it took and, where it failed, the end of its log.
quiet() {
    local name=$1 text=$2 log=$LOGS/$1.log start=$SECONDS pid rc=0 ticks=0
    shift 2
    say "$text"
    "$@" >"$log" 2>&1 </dev/null &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.2
        ticks=$((ticks + 1))
        if ((ticks % 75 == 0)); then
            note "… $((SECONDS - start)) s: $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-100)"
        fi
    done
    wait "$pid" || rc=$?
    if ((rc != 0)); then
        printf 'error: %s failed with exit code %s; the end of %s:\n' "$name" "$rc" "${log#"$ROOT"/}" >&2
        tail -n 40 "$log" >&2
        return "$rc"
    fi
    if ((SECONDS - start > 1)); then note "done in $((SECONDS - start)) s"; fi
}

# locked NAME FUNCTION...: one at a time, so that two scripts never fill the same environment.
locked() {
    local name=$1
    shift
    (
        if have flock; then
            flock -w 3 9 || {
                note "waiting for another script that is setting up $name"
                flock 9
            }
        fi
        "$@" 9>&-
    ) 9>"$VENVS/.lock-$name"
}
