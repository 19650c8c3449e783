#!/usr/bin/env bash
# Train Gemma 3 on recorded play, merge the adapter and evaluate the model. Makes its environment first (./init.sh).
#
#   ./train_gemma3.sh                               without settings, the demonstration: about two minutes on two CPU cores
#   DATASET_PATH=training_data ./train_gemma3.sh    google/gemma-3-4b-it on your data
#   ./train_gemma3.sh --lora_r 32                   arguments go to scripts/sft_pokemon_gemma3.py
#   ./train_gemma3.sh --resume_from_checkpoint      continue a run that was stopped
#
# Variables, from the environment or .env (.env.example explains each; the environment wins): MODEL_NAME DATASET_PATH
# EVAL_DATASET_PATH OUTPUT_DIR MAX_STEPS BATCH_SIZE GRAD_ACCUM LEARNING_RATE LAYOUT ACCELERATE_CONFIG
# CUDA_VISIBLE_DEVICES HUGGINGFACE_TOKEN WANDB_API_KEY WANDB_PROJECT WANDB_ENTITY
# Relative paths start at this folder. On Ctrl-C or SIGTERM training saves a checkpoint and stops. A second one stops it
# at once, without saving.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' train_gemma3.sh; exit 0 ;;
esac

fail() {
    echo "error: $*" >&2
    exit 2
}

# First pass: create the environment, then run this script again with the settings of .env. Tokens are never printed, not
# even under `bash -x`.
if [[ -z ${POKEGEMMA_PYTHON:-} ]]; then
    ./init.sh --quiet
    POKEGEMMA_PYTHON=$(./init.sh --print-python)
    export POKEGEMMA_PYTHON
    exec "$POKEGEMMA_PYTHON" -m pokegemma.settings "$BASH" "$0" "$@"
fi
python=$POKEGEMMA_PYTHON
unset POKEGEMMA_PYTHON
launcher=${LAUNCHER:-./train_gemma3.sh}  # train_gemma3n.sh sets this and DEFAULT_MODEL

# --- what to do

resume=false overwrite=false own_config=false
for argument in "$@"; do
    name=${argument%%=*}
    case ${name//-/_} in
        __output_dir) fail "$name: set OUTPUT_DIR instead; merging and evaluation read it, too" ;;
        __dataset_path | __eval_dataset_path) fail "$name: set DATASET_PATH, EVAL_DATASET_PATH instead; other steps read them" ;;
        __model_name_or_path | __model_name) fail "$name: set MODEL_NAME instead; the check before training reads it, too" ;;
        __layout) fail "$name: set LAYOUT instead; evaluation must use the same" ;;
        __resume_from_checkpoint) resume=true ;;
        __overwrite) overwrite=true ;;
        __config) own_config=true ;;
    esac
done

demonstration=false
if [[ -z ${DATASET_PATH:-} ]]; then
    [[ -z ${MODEL_NAME:-} ]] ||
        fail "MODEL_NAME=$MODEL_NAME, but DATASET_PATH is not set: set it to what scripts/convert_eevee_data_v2.py wrote"
    [[ -z ${EVAL_DATASET_PATH:-} ]] || fail "EVAL_DATASET_PATH=$EVAL_DATASET_PATH, but DATASET_PATH is not set"
    [[ -z ${DEFAULT_MODEL:-} ]] || fail "DATASET_PATH is not set; $launcher has no demonstration, ./train_gemma3.sh has"
    demonstration=true
    output_dir=${OUTPUT_DIR:-outputs/toy}
    model=$output_dir/base_model dataset=$output_dir/dataset
    evaluation_dataset=$dataset
else
    model=${MODEL_NAME:-${DEFAULT_MODEL:-google/gemma-3-4b-it}} dataset=$DATASET_PATH
    output_dir=${OUTPUT_DIR:-outputs/$(basename "$model")}
    converted="what scripts/convert_eevee_data_v2.py wrote; datasets of the Hub and of other trainers are not read"
    [[ -e $dataset ]] || fail "DATASET_PATH=$dataset: not found here; set it to $converted"
    # Evaluation is hours away: what it needs is looked for now.
    evaluation_dataset=${EVAL_DATASET_PATH:-$dataset}
    # Next to a file to train on, training looks for eval.jsonl; so does evaluation.
    if [[ -z ${EVAL_DATASET_PATH:-} && -f $dataset ]]; then evaluation_dataset=$(dirname "$dataset"); fi
    held_out=$evaluation_dataset
    case $held_out in *.jsonl) ;; *) held_out=$held_out/eval.jsonl ;; esac
    if [[ ! -e $dataset/train.jsonl ]]; then
        for sessions in "$dataset/runs" "$dataset"; do
            if compgen -G "$sessions/session_*" >/dev/null; then
                echo "error: DATASET_PATH=$dataset contains recorded sessions, not samples. Convert them first:" >&2
                echo "    $python scripts/convert_eevee_data_v2.py --eevee_data_dir $sessions --output_dir training_data" >&2
                echo "    DATASET_PATH=training_data $launcher" >&2
                exit 2
            fi
        done
        [[ ! -d $dataset ]] || fail "DATASET_PATH=$dataset: no train.jsonl in it; set it to $converted"
    fi
    for file in "$held_out" "$(dirname "$held_out")/train.jsonl"; do
        [[ -f $file ]] || fail "$file not found; evaluation needs it (DATASET_PATH, EVAL_DATASET_PATH)"
    done
fi
adapter=$output_dir/adapter merged=$output_dir/merged evaluation=$output_dir/evaluation

# --- where to run it

fitting_config="" num_gpus=0 num_cores=1
facts=$("$python" scripts/describe_environment.py --shell)
eval "$facts"

config=${ACCELERATE_CONFIG:-$fitting_config}
if $demonstration && [[ -z ${ACCELERATE_CONFIG:-} ]]; then config=cpu_mps; fi
config_file=""
for candidate in "accelerate_configs/$config.yaml" "accelerate_configs/$config" "$config"; do
    if [[ -f $candidate ]]; then config_file=$candidate; break; fi
done
[[ -n $config_file ]] || fail "ACCELERATE_CONFIG=$config: no such file, nor one of $(cd accelerate_configs && echo *.yaml)"
launch=("$python" -m accelerate.commands.launch --quiet --config_file "$config_file")
if ! grep -q '^num_processes:' "$config_file"; then
    [[ $num_gpus -gt 0 ]] || fail "ACCELERATE_CONFIG=$config needs NVIDIA GPUs and none is usable; $fitting_config fits"
    launch+=(--num_processes "$num_gpus")
elif grep -q '^distributed_type: *"NO"' "$config_file" && [[ $num_gpus -gt 1 ]]; then
    # One process that sees several GPUs would use DataParallel.
    first=${CUDA_VISIBLE_DEVICES:-0}
    export CUDA_VISIBLE_DEVICES=${first%%,*}
fi
# accelerate sets OMP_NUM_THREADS=1 where it is not set, which halves the speed of two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$num_cores}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} PYTHONUNBUFFERED=1

# --- what may be overwritten

replace=()
if $demonstration; then
    export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # it needs nothing from the network
    mark=$output_dir/.pokegemma_demonstration
    if [[ ! -e $mark && -n $(ls -A "$output_dir" 2>/dev/null || true) ]]; then
        fail "OUTPUT_DIR=$output_dir contains files that are not from the demonstration; choose a new folder"
    fi
    mkdir -p "$output_dir"
    : >"$mark"
    replace=(--overwrite)
elif [[ -e $adapter || -e $merged || -e $evaluation ]]; then
    $resume || $overwrite || fail "$output_dir contains an earlier run: continue with $launcher --resume_from_checkpoint," \
        "start over with --overwrite, or set OUTPUT_DIR to a new folder"
    replace=(--overwrite)
fi
logs=$output_dir/logs
mkdir -p "$logs"

# --- steps

work=$(mktemp -d "${TMPDIR:-/tmp}/pokegemma.XXXXXX")
trap 'rm -rf "$work"' EXIT
number=0 child="" step_name="" stop_status=""

# Each step runs in the background, since bash would handle a signal only after a step in the foreground had ended.
stop() {  # stop EXIT_STATUS: send SIGTERM to the step, the second time SIGKILL
    local signal=KILL
    if [[ -z $stop_status ]]; then
        signal=TERM stop_status=$1
        echo "stopping ... (press Ctrl-C again to stop now without saving)" >&2 || true  # the terminal may be gone
    fi
    [[ -n $child ]] || return 0
    # In training the signal goes to the processes that `accelerate launch` started, and not to it: it would end without
    # them, or give them only 30 s to save a checkpoint.
    "$python" - "$child" "$signal" "$step_name" <<'PYTHON' || true
import signal, sys, psutil
pid, name, is_training = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "train"
try:
    launcher = psutil.Process(pid)
    workers = launcher.children(recursive=name == "KILL" or not is_training)
except psutil.NoSuchProcess:
    sys.exit()
for process in workers if is_training and name == "TERM" and workers else [*workers, launcher]:
    try:
        process.send_signal(signal.Signals["SIG" + name])
    except psutil.NoSuchProcess:
        pass
PYTHON
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

await() {  # await PID: its exit status, in spite of signals that end `wait` early
    local status=0
    while :; do
        status=0
        wait "$1" 2>/dev/null || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

run_step() {  # run_step NAME "what it does" RESULT command...
    local what=$2 result=$3 started=$SECONDS status=0 log pipe=$work/pipe tee_pid
    step_name=$1
    shift 3
    [[ -z $stop_status ]] || exit "$stop_status"
    number=$((number + 1))
    log=$logs/$number-$step_name.log
    printf '\n[%s/%s] %s ...\n' "$number" "$num_steps" "$what"
    rm -f "$pipe"
    mkfifo "$pipe"
    # A signal to the whole process group must not take the reader from a step that is saving.
    (trap '' INT TERM HUP; exec tee "$log" <"$pipe") &
    tee_pid=$!
    set -m  # a process group of its own: Ctrl-C comes to this script alone, which passes it on
    "$@" >"$pipe" 2>&1 </dev/null &
    child=$!
    set +m
    await "$child" || status=$?
    await "$tee_pid" || true  # it ends when the last process that writes has ended
    child=""
    if [[ $step_name == train ]] && [[ $status -eq 0 || -n $stop_status ]] &&
        grep -qs '"status": "interrupted"' "$adapter/run.json"; then
        echo "training was stopped after $((SECONDS - started)) s; its checkpoint is in $adapter" >&2
        echo "continue, with the same variables and arguments: $launcher --resume_from_checkpoint" >&2
        exit "${stop_status:-143}"
    fi
    if [[ -n $stop_status && $status -eq 0 ]]; then
        echo "stopped after step $number ($step_name); its result is complete: $result" >&2
        exit "$stop_status"
    fi
    if [[ -n $stop_status ]]; then
        echo "stopped in step $number ($step_name) after $((SECONDS - started)) s; its result is not complete" >&2
        exit "$stop_status"
    fi
    if [[ $status -ne 0 ]]; then
        echo "error: step $number ($step_name) failed with exit status $status; its output: $log" >&2
        exit "$status"
    fi
    echo "[$number/$num_steps] took $((SECONDS - started)) s; result: $result"
}

data_options=(--dataset_path "$dataset")
if [[ -n ${EVAL_DATASET_PATH:-} ]]; then data_options+=(--eval_dataset_path "$EVAL_DATASET_PATH"); fi
evaluate_options=(--dataset_path "$evaluation_dataset")
if [[ -n ${LAYOUT:-} ]]; then
    data_options+=(--layout "$LAYOUT")
    evaluate_options+=(--layout "$LAYOUT")
fi

train_options=()
if $demonstration && ! $own_config; then
    train_options+=(--config training_configs/toy.yaml)
    # A batch counts conversations, and one has up to 16 decisions.
    if [[ ${LAYOUT:-} == trajectory ]]; then BATCH_SIZE=${BATCH_SIZE:-1}; fi
    evaluate_options+=(--batch_size 32)  # a tiny model has room for more decisions at once
fi
if [[ -n ${MAX_STEPS:-} ]]; then train_options+=(--max_steps "$MAX_STEPS"); fi
if [[ -n ${BATCH_SIZE:-} ]]; then train_options+=(--per_device_train_batch_size "$BATCH_SIZE"); fi
if [[ -n ${GRAD_ACCUM:-} ]]; then train_options+=(--gradient_accumulation_steps "$GRAD_ACCUM"); fi
if [[ -n ${LEARNING_RATE:-} ]]; then train_options+=(--learning_rate "$LEARNING_RATE"); fi
if $demonstration && ! $resume && [[ -e $adapter ]]; then train_options+=(--overwrite); fi
train_options+=("$@")

num_steps=4
if $demonstration; then
    recorded=$output_dir/recorded
    if $resume && [[ -e $dataset/train.jsonl && -e $model/config.json ]]; then
        echo "continuing the demonstration in $output_dir: game, dataset and base model exist"
    else
        num_steps=$((num_steps + 3))
        echo "MODEL_NAME and DATASET_PATH are not set: running the demonstration."
        echo "A tiny Gemma 3 learns a small game, in which one frame is enough to choose the button."
        run_step record "Recording a scripted player in the toy game" "$recorded/runs" \
            "$python" scripts/record_toy_game.py --output_dir "$recorded" --seed 0 "${replace[@]}"
        run_step convert "Converting the recorded sessions to samples" "$dataset" \
            "$python" scripts/convert_eevee_data_v2.py --eevee_data_dir "$recorded/runs" --output_dir "$dataset" \
            --num_frames 1 "${replace[@]}"
        run_step base_model "Making a tiny Gemma 3 with random weights" "$model" \
            "$python" scripts/make_tiny_model.py --output_dir "$model" --num_image_tokens 64 "${replace[@]}"
    fi
else
    echo "training $model on $dataset, under $config_file"
fi
check_environment=()  # what accelerate launch sets for training, and --bf16 depends on
if grep -q '^use_cpu: *true' "$config_file"; then check_environment=(env ACCELERATE_USE_CPU=true); fi
run_step validate "Checking dataset, model and machine" "$output_dir/contact_sheet.png" \
    ${check_environment[@]+"${check_environment[@]}"} "$python" scripts/validate_training.py --model_name_or_path "$model" "${data_options[@]}" \
    --output_dir "$output_dir" --contact_sheet "$output_dir/contact_sheet.png" \
    ${train_options[@]+"${train_options[@]}"}
run_step train "Training" "$adapter" \
    "${launch[@]}" scripts/sft_pokemon_gemma3.py --model_name_or_path "$model" "${data_options[@]}" --output_dir "$adapter" \
    ${train_options[@]+"${train_options[@]}"}
if [[ -f $adapter/config.json ]]; then  # full fine-tuning: a whole model, nothing to merge
    merged=$adapter num_steps=$((num_steps - 1))
else
    run_step merge "Merging the adapter into the base model" "$merged" "$python" scripts/merge_qlora.py \
        --lora_path "$adapter" --output_path "$merged" --verify ${replace[@]+"${replace[@]}"}
fi
run_step evaluate "Evaluating the model next to the baselines" "$evaluation" \
    "$python" scripts/evaluate.py --model_path "$merged" "${evaluate_options[@]}" --output_dir "$evaluation" \
    ${replace[@]+"${replace[@]}"}

printf '\ndone in %s min %s s; model: %s; report: %s\n' \
    $((SECONDS / 60)) $((SECONDS % 60)) "$merged" "$evaluation/report.html"
