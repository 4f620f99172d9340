#!/usr/bin/env bash
# Every measurement that waits for a GPU, in about ten minutes on one. What fails or takes too long is named, the rest goes on.
#
#     bash benchmarks/gpu.sh FOLDER           writes NAME.json, NAME.txt and summary.txt to FOLDER
#     SHORT=1 bash benchmarks/gpu.sh FOLDER   smallest sizes, on the CPU: shows that every command works
set -uo pipefail
[ $# -eq 1 ] || { sed -n '2,5s/^# \?//p' "$0"; exit 2; }
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
: >"$folder/summary.txt"
failed=0

# measure NAME SECONDS COMMAND...: the command with a limit; its words and its exit status are kept
measure() {
    local name=$1 limit=$2 begin=$SECONDS status=0
    shift 2
    [ "${SHORT:-0}" = 1 ] && limit=0 # none
    timeout "$limit" "$@" >"$folder/$name.txt" 2>&1 || status=$?
    [ "$status" -eq 0 ] || failed=1
    case $status in
        0) said="done" ;;
        124) said="stopped at its limit of $limit s" ;;
        *) said="failed, see $name.txt" ;;
    esac
    echo "$name: $said ($((SECONDS - begin)) s)" | tee -a "$folder/summary.txt"
}

if [ "${SHORT:-0}" = 1 ]; then
    common=(--device cpu --threads 1 --repeats 2 --warmup 1)
    body=(--width 8 --layers 1 --heads 2 --prefix 2 --prompt-width 4 --vocabulary 11)
    step=("${body[@]}" --batch 8 --length 10)
    decode=("${body[@]}" --batch 2 --prompt 2 --response 4 --forwards 1 2)
    full=("${body[@]}" --batch 1 --fill --memory 0.001 --prompt 2 --response 4 --forwards 1 2)
    solver=(--vocabulary 3000 --rows 2)
    qstar=(--batch 1 --width 16 --layers 2 --heads 2 --vocabulary 50 --prompt 3 --new 4)
    online=(--width 128 --split 1 1 1 --vocabulary 50 --codes 4 --batch 1 --prompt 8 --new 4 --compression 2)
    run=(trainer.accelerator=cpu trainer.max_steps=4 trainer.val_check_interval=4 data.train_rows=400 data.val_rows=64 data.test_rows=64)
    teacher=(teacher.max_steps=2)
else
    common=(--device cuda --repeats 5 --warmup 2)
    body=(--width 4096 --layers 2 --heads 32 --intermediate 12288 --vocabulary 126464) # two layers of an 8B model
    step=("${body[@]}" --batch 4 --length 512)
    decode=("${body[@]}" --batch 1 32)
    full=("${body[@]}" --batch 1 --fill --forwards 1 8 --repeats 2 --warmup 1)
    solver=()
    qstar=(--batch 1 32)
    online=(--batch 1 32 --prompt 4096 --compression 4)
    run=(trainer.accelerator=gpu)
    teacher=()
fi

measure qstar_solver 60 python benchmarks/qstar_solver.py "${common[@]}" "${solver[@]}" --json "$folder/qstar_solver.json"
measure meanflow_step 120 python benchmarks/meanflow_step.py "${common[@]}" "${step[@]}" --json "$folder/meanflow_step.json"
measure decoding 60 python benchmarks/decoding.py "${common[@]}" "${decode[@]}" --json "$folder/decoding.json"
measure decoding_full 60 python benchmarks/decoding.py "${common[@]}" "${full[@]}" --json "$folder/decoding_full.json"
measure qstar_decoding 60 python benchmarks/qstar_decoding.py "${common[@]}" "${qstar[@]}" --json "$folder/qstar_decoding.json"
for attention in sdpa flex; do
    measure "concept_online_$attention" 60 python benchmarks/concept_online.py "${common[@]}" "${online[@]}" \
        --attention "$attention" --json "$folder/concept_online_$attention.json"
done
measure objective 60 python run.py experiment=objectives "${run[@]}" "paths.output_dir=$folder/outputs" "paths.cache_dir=$folder/cache"
measure main_job 180 python run.py experiment=meanflow_llada "${run[@]}" "${teacher[@]}" "paths.output_dir=$folder/outputs" "paths.cache_dir=$folder/cache"
exit "$failed"
