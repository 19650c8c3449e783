#!/usr/bin/env bash
# Make the environment with the test tools, lint, test. Arguments go to pytest: ./run_tests.sh -x -m "not slow"
# Tests run in one process for each core; single tests (-k name, tests/test_cli.py) in this one; -n 4 in four.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

./init.sh --dev --with ray --with gguf --with mlx --with serve --with registry --with play --with pyboy --with battles --with showdown
python=$(./init.sh --print-python)

# What a caller has set for training must not reach the tests: they work offline, on the CPU, and log nowhere.
unset MODEL_NAME DATASET_PATH EVAL_DATASET_PATH OUTPUT_DIR MAX_STEPS BATCH_SIZE GRAD_ACCUM LEARNING_RATE LAYOUT
unset PYTHONDONTWRITEBYTECODE  # each process that a test starts would compile the project again
unset ACCELERATE_CONFIG HUGGINGFACE_TOKEN HF_TOKEN WANDB_API_KEY WANDB_PROJECT WANDB_ENTITY
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=disabled MPLBACKEND=Agg
export PYTHONUNBUFFERED=1

echo "Linting ..."
"$python" -m ruff check .
"$python" -m ruff format --check .
echo "Testing ..."
"$python" -m pytest -n auto --dist worksteal "$@"
