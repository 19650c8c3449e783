#!/usr/bin/env bash
# Measure on one NVIDIA GPU what docs/hardware.md estimates: in at most 8 minutes, without network, into one JSON.
#
#   benchmarks/on_gpu.sh                                     results in benchmarks/on_gpu.json
#   benchmarks/on_gpu.sh --wheels FOLDER --commit 0123abc    with packages that are missing here, outside a git checkout
#   benchmarks/on_gpu.sh --rehearse --output rehearsal.json  the same code with tiny shapes, on the CPU
#   benchmarks/on_gpu.sh --help                              all options
#
# It uses PYTHON if that is set, else the active environment, else .venv, else python3, and installs nothing there:
# wheels (60 MiB at most) go to a temporary folder. Of several GPUs it uses the first that CUDA_VISIBLE_DEVICES leaves.
set -euo pipefail
export ON_GPU_BEGAN
ON_GPU_BEGAN=$(date +%s)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "error: $*" >&2
    exit 2
}

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-}${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$python is not Python 3.11 or newer; set PYTHON"

# --- what the shell must know of the options

wheels="" rehearse=false previous=""
for argument in "$@"; do
    case $argument in
        --wheels=*) wheels=${argument#*=} ;;
        --rehearse | --rehearse=[Tt]rue) rehearse=true ;;
    esac
    if [[ $previous == --wheels ]]; then wheels=$argument; fi
    previous=$argument
done

# --- packages

export PYTHONPATH=$root
if [[ -n $wheels ]]; then
    compgen -G "$wheels/*.whl" >/dev/null || fail "--wheels $wheels: no wheels (*.whl) in it"
    size_mib=$(($(cat "$wheels"/*.whl | wc -c) / 1048576))
    ((size_mib <= 60)) || fail "--wheels $wheels: $size_mib MiB; at most 60 MiB are carried"
    export ON_GPU_SITE
    ON_GPU_SITE=$(mktemp -d)
    trap 'rm -rf "$ON_GPU_SITE"' EXIT # after exec, on_gpu.py deletes it
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$ON_GPU_SITE" "$wheels"/*.whl || fail "--wheels $wheels: pip could not install them"
    PYTHONPATH=$ON_GPU_SITE:$root
fi
"$python" "$root/benchmarks/gpu_parts/requirements.py" || exit 2

# --- run

if [[ $rehearse == true ]]; then
    export CUDA_VISIBLE_DEVICES=""
else
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*}
fi
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
exec "$python" "$root/benchmarks/on_gpu.py" "$@"
