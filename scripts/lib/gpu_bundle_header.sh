#!/bin/sh
# Pillion's check of a GPU machine, in one file: the daemon, the Python module and the check itself.
# Needs an NVIDIA driver and python3 with numpy; torch, where it is there, is used for more checks.
# usage: sh pillion-gpu-check.run [--json FILE] [--quick] [--only NAME…] [--seconds N]
# Ends with 0: all is well; 1: something failed, was missed or was not run; 3: there is no GPU (the line says why).
set -eu
umask 077
bundle=$0
place=$(mktemp -d "${TMPDIR:-/tmp}/pillion-gpu-check.XXXXXX")
child=
# shellcheck disable=SC2329 # called by the trap
leave() {
    trap - INT TERM HUP
    if [ -n "$child" ]; then kill "$child" 2>/dev/null && wait "$child"; fi
    rm -rf "$place"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
first=$(grep -a -n -m 1 '^# the archive follows$' "$bundle" | cut -d : -f 1)
tail -n "+$((first + 1))" "$bundle" | tar -xzf - -C "$place"
PILLION_BIN=$place/bin/pillion
PILLION_GPU_CHECK_COMMIT=$(cat "$place/commit")
PYTHONPATH=$place/site:$place/tests:$place/tests/gpu${PYTHONPATH:+:$PYTHONPATH}
PYTHONDONTWRITEBYTECODE=1
PYTHONSAFEPATH=1 # the caller's folder is no place for modules
PYTHONUNBUFFERED=1
export PILLION_BIN PILLION_GPU_CHECK_COMMIT PYTHONPATH PYTHONDONTWRITEBYTECODE PYTHONSAFEPATH PYTHONUNBUFFERED
"${PYTHON:-python3}" -m gpu_check "$@" &
child=$!
code=0
wait "$child" || code=$?
child=
exit "$code"
# the archive follows
