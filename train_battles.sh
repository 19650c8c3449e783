#!/usr/bin/env bash
# Train a policy for Pokémon battles and let it play in the arena. Makes its environment first (./init.sh --with battles).
#
#   ./train_battles.sh                             without settings, the demonstration: at most ten minutes on two cores
#   MODEL_NAME=google/gemma-3-270m TRAJECTORIES=outputs/trajectories ./train_battles.sh    a real one, on your battles
#   ./train_battles.sh --lora_r 32                 arguments go to scripts/sft_battles.py
#   ./train_battles.sh --resume_from_checkpoint    continue a run that was stopped
#
# Variables, from the environment or .env (the environment wins): TRAJECTORIES BATTLE_FORMAT TEAMS_FILE (for formats
# without random teams; the demonstration has one team for all) NUM_BATTLES (recorded by the demonstration) NUM_ROUNDS (of
# the arena, two battles each). From the environment only, since those of .env are ./train_gemma3.sh's: MODEL_NAME
# OUTPUT_DIR MAX_STEPS
# TRAJECTORIES is a folder of trajectory files (FORMAT/NAME.json.lz4), or one that scripts/battles_pack.py wrote.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

case ${1:-} in
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' train_battles.sh; exit 0 ;;
esac

fail() {
    echo "error: $*" >&2
    exit 2
}

# First pass: create the environment, then run this script again with the settings of .env.
if [[ -z ${POKEGEMMA_PYTHON:-} ]]; then
    ./init.sh --quiet --with battles
    POKEGEMMA_PYTHON=$(./init.sh --print-python)
    export POKEGEMMA_PYTHON
    # What is set here, also to nothing, is not read from .env: a model with vision, its folder and its steps may be there.
    export MODEL_NAME=${MODEL_NAME:-} OUTPUT_DIR=${OUTPUT_DIR:-} MAX_STEPS=${MAX_STEPS:-}
    exec "$POKEGEMMA_PYTHON" -m pokegemma.settings "$BASH" "$0" "$@"
fi
python=$POKEGEMMA_PYTHON
unset POKEGEMMA_PYTHON

# --- what to do

resume=false overwrite=false
for argument in "$@"; do
    name=${argument%%=*}
    case ${name//-/_} in
        __output_dir) fail "$name: set OUTPUT_DIR instead; the arena reads it, too" ;;
        __trajectories_dir) fail "$name: set TRAJECTORIES instead; packing and checks read it, too" ;;
        __model_name_or_path | __model_name) fail "$name: set MODEL_NAME instead" ;;
        __resume_from_checkpoint) resume=true ;;
        __overwrite) overwrite=true ;;
    esac
done

battle_format=${BATTLE_FORMAT:-gen1ou}
teams_file=${TEAMS_FILE:-}
demonstration=false
train_options=()
if [[ -z ${TRAJECTORIES:-} ]]; then
    [[ -z ${MODEL_NAME:-} ]] || fail "MODEL_NAME=$MODEL_NAME, but TRAJECTORIES is not set: set it to a folder of trajectories"
    demonstration=true
    output_dir=${OUTPUT_DIR:-outputs/battles}
    trajectories=$output_dir/trajectories packed=$output_dir/packed model=$output_dir/base_model
    train_options+=(--config training_configs/battles.yaml)
    num_steps=7
    if [[ $battle_format == gen1ou ]]; then teams_file=${TEAMS_FILE:-training_configs/battles_team.txt}; fi
    echo "MODEL_NAME and TRAJECTORIES are not set: running the demonstration."
    echo "A tiny Gemma 3 learns to play $battle_format from battles of poke-env's heuristic."
else
    [[ -d $TRAJECTORIES ]] || fail "TRAJECTORIES=$TRAJECTORIES: no such folder"
    model=${MODEL_NAME:-google/gemma-3-270m}
    output_dir=${OUTPUT_DIR:-outputs/battles-$(basename "$model")}
    trajectories=$TRAJECTORIES packed=$output_dir/packed num_steps=5
    if [[ -f $TRAJECTORIES/pack.json ]]; then packed=$TRAJECTORIES num_steps=4; fi
fi
policy=$output_dir/policy arena=$output_dir/arena
mark=$output_dir/.pokegemma_battles
if [[ ! -e $mark && -n $(ls -A "$output_dir" 2>/dev/null || true) ]]; then
    fail "OUTPUT_DIR=$output_dir contains files that are not from ./train_battles.sh; choose a new folder"
fi
if [[ -e $policy ]] && ! $resume && ! $overwrite; then
    if $demonstration; then train_options+=(--overwrite); overwrite=true; else
        fail "$policy contains an earlier run: continue with ./train_battles.sh --resume_from_checkpoint, start over" \
            "with --overwrite, or set OUTPUT_DIR to a new folder"
    fi
fi
mkdir -p "$output_dir"
: >"$mark"
if $demonstration && ! $resume; then rm -rf "$trajectories" "$packed"; fi  # of other settings, maybe
if [[ -n ${MAX_STEPS:-} ]]; then train_options+=(--max_steps "$MAX_STEPS"); fi
train_options+=("$@")

facts=$("$python" scripts/describe_environment.py --shell)
num_cores=1
eval "$facts"
# accelerate sets OMP_NUM_THREADS=1 where it is not set, which halves the speed of two cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$num_cores}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false} PYTHONUNBUFFERED=1
if $demonstration; then export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}; fi

teams=()
if [[ -n $teams_file ]]; then teams=(--teams_file "$teams_file"); fi

# --- steps

number=0 child="" stop_status=""
stop() {  # stop EXIT_STATUS: pass the signal on; training saves a checkpoint and ends
    stop_status=$1
    if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

run_step() {  # run_step "what it does" RESULT command...
    local what=$1 result=$2 started=$SECONDS status=0
    shift 2
    number=$((number + 1))
    printf '\n[%s/%s] %s ...\n' "$number" "$num_steps" "$what"
    # In the background, since bash would handle a signal only after a command in the foreground had ended.
    "$@" </dev/null &
    child=$!
    while :; do
        status=0
        wait "$child" || status=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=""
    if grep -qs '"status": "interrupted"' "$policy/run.json" && [[ -n $stop_status ]]; then
        echo "training was stopped; continue, with the same variables and arguments: ./train_battles.sh" \
            "--resume_from_checkpoint" >&2
    fi
    if [[ -n $stop_status ]]; then exit "$stop_status"; fi
    if [[ $status -ne 0 ]]; then
        echo "error: step $number failed with exit status $status: $what" >&2
        exit "$status"
    fi
    echo "[$number/$num_steps] took $((SECONDS - started)) s; result: $result"
}

if $demonstration; then
    run_step "Recording battles of the heuristic" "$trajectories" "$python" scripts/battles_record.py \
        --battle_format "$battle_format" --num_battles "${NUM_BATTLES:-500}" --output_dir "$trajectories" \
        ${teams[@]+"${teams[@]}"}
fi
if [[ $packed != "$trajectories" ]]; then
    run_step "Packing the trajectories" "$packed" "$python" scripts/battles_pack.py \
        --trajectories_dir "$trajectories" --output_dir "$packed"
fi
run_step "Checking the trajectories" "$packed" "$python" scripts/battles_check.py --trajectories_dir "$trajectories"
if $demonstration && { ! $resume || [[ ! -d $model ]]; }; then
    run_step "Making a tiny Gemma 3 with random weights" "$model" "$python" scripts/battles_tiny_model.py \
        --trajectories_dir "$packed" --output_dir "$model" --overwrite
fi
run_step "Training" "$policy" "$python" scripts/sft_battles.py --trajectories_dir "$packed" \
    --model_name_or_path "$model" --output_dir "$policy" ${train_options[@]+"${train_options[@]}"}
rm -rf "$arena"  # a name in an arena stands for one checkpoint
# A process for each core plays, so one thread each.
run_step "Playing in the arena" "$arena/report.html" env OMP_NUM_THREADS=1 "$python" scripts/battles_arena.py \
    --battle_format "$battle_format" --players "policy=$policy" random max-base-power heuristic --against policy \
    --baseline policy --num_rounds "${NUM_ROUNDS:-100}" --output_dir "$arena" \
    ${teams[@]+"${teams[@]}"}
run_step "Writing the model card" "$policy/README.md" "$python" scripts/battles_card.py \
    --policy_path "$policy" --arena_dir "$arena"

printf '\ndone in %s min %s s; policy: %s; report: %s\n' \
    $((SECONDS / 60)) $((SECONDS % 60)) "$policy" "$arena/report.html"
