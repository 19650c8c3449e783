#!/usr/bin/env bash
# train_gemma3.sh for google/gemma-3n-E4B-it: the same steps, variables and arguments; see ./train_gemma3.sh --help.
#
#   DATASET_PATH=training_data ./train_gemma3n.sh   on your data; results in outputs/gemma-3n-E4B-it
#
# Its vision tower needs two more packages: ./init.sh --with gemma3n
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' train_gemma3n.sh; exit 0 ;;
esac

export DEFAULT_MODEL=google/gemma-3n-E4B-it LAUNCHER=./train_gemma3n.sh
exec ./train_gemma3.sh "$@"
