# What the GPU check runs on: our wheel unpacked, and the bundle that carries it all.
# Sourced, never run, after env.sh; PYTHON is set.
# shellcheck shell=bash

# unpack_wheel WHEEL FOLDER: the package under FOLDER/site, the daemon as FOLDER/bin/pillion.
unpack_wheel() {
    rm -rf "$2"
    mkdir -p "$2/site" "$2/bin"
    "$PYTHON" - "$1" "$2" <<'PY'
import pathlib
import sys
import zipfile

wheel, place = sys.argv[1], pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive:
    for name in archive.namelist():
        if name.startswith("pillion/"):
            archive.extract(name, place / "site")
        elif name.endswith(".data/scripts/pillion"):
            (place / "bin" / "pillion").write_bytes(archive.read(name))
            (place / "bin" / "pillion").chmod(0o755)
PY
}

# pack_bundle FOLDER FILE: FOLDER/site and FOLDER/bin and the check's Python, as one script that unpacks itself.
pack_bundle() {
    local folder=$1 file=$2 header=$ROOT/scripts/lib/gpu_bundle_header.sh
    mkdir -p "$folder/tests/chaos" "$folder/tests/gpu/gpu_check" "$(dirname -- "$file")"
    cp "$ROOT"/tests/chaos/{engine,sidecar}.py "$folder/tests/chaos/"
    cp "$ROOT"/tests/gpu/gpu_check/*.py "$folder/tests/gpu/gpu_check/"
    if have strip; then strip "$folder/bin/pillion" "$folder"/site/pillion/*.so; fi
    printf '%s\n' "${PILLION_GPU_CHECK_COMMIT:-}" >"$folder/commit"
    {
        cat "$header"
        # The same files make the same bundle: no times, no names, no umask.
        tar -C "$folder" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u+rwX,go=rX \
            --exclude=__pycache__ -cf - bin site tests commit | gzip -9n
    } >"$file.part"
    chmod +x "$file.part"
    mv "$file.part" "$file"
}
