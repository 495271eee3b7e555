#!/usr/bin/env bash
# Evaluate the newest checkpoint below --checkpoint on the recordings that its training held out, below --bags, or on
# the LeRobot dataset below --dataset; results go to --output.
#
#   eval-entrypoint.sh --checkpoint=DIR (--bags=DIR | --dataset=DIR) --output=DIR [OPTION OF offline_eval]...
#   eval-entrypoint.sh --check ...          (the same; for the task that trains first)
#
# --check looks at the options and the dataset, and prints the dataset's own folder, in which no more than
# meta/info.json has to be. --check=options looks at the options alone, as `python -m osmo.submit` does.
#
# EVAL_EPISODES (for example "0 1 2 3"; those that are not there are left out, and named) and EVAL_DEVICE choose what
# and where. With --bags EVAL_EPISODES can be empty: the held-out recordings. EVAL_CACHE_DIR keeps decoded frames.
# OSMO can report an upload as complete that was not, so nothing here is taken on trust: a checkpoint that is missing,
# or not as its manifest says, ends the task instead of passing an older one off as the result.
#
# Exit codes: 0 done, 1 something is missing or torn, 3 a gate (--max-mae, --max-p99-ms) was exceeded.
set -euo pipefail

die() {
  echo "error: eval-entrypoint: $*" >&2
  exit 1
}

checkpoint='' dataset='' bags='' output='' check=''
while (($#)); do
  case $1 in
    --check) check=all ;;
    --check=options) check=options ;;
    --checkpoint=*) checkpoint=${1#--checkpoint=} ;;
    --dataset=*) dataset=${1#--dataset=} ;;
    --bags=*) bags=${1#--bags=} ;;
    --output=*) output=${1#--output=} ;;
    *) break ;;
  esac
  shift
  [[ -z $checkpoint || -z $dataset$bags || -z $output ]] || break # what follows is eval_args
done
[[ -n $checkpoint && -n $dataset$bags && -n $output && (-z $dataset || -z $bags) ]] ||
  die "expected --checkpoint=DIR, --bags=DIR or --dataset=DIR, --output=DIR"
[[ -n $bags || ${EVAL_EPISODES:-} == *[![:space:]]* ]] ||
  die "EVAL_EPISODES is empty; expected episode numbers, for example \"0 1 2 3\""
[[ ${EVAL_DEVICE:-} =~ ^(auto|cuda|cpu)$ ]] || die "EVAL_DEVICE: found '${EVAL_DEVICE:-}', expected cuda or cpu"
read -ra episodes <<<"${EVAL_EPISODES:-}"
seen=' '
for episode in "${episodes[@]}"; do
  [[ $episode =~ ^[0-9]{1,9}$ ]] ||
    die "EVAL_EPISODES: found $episode, expected episode numbers, for example \"0 1 2 3\""
  [[ $seen != *" $((10#$episode)) "* ]] || die "EVAL_EPISODES: found $episode twice, expected each number once"
  seen+="$((10#$episode)) "
done

# The evaluator reads its options itself, but after the training. Those that this script gives are no one else's.
options=("$@")
number='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?'
while (($#)); do
  case ${1%%=*} in
    --rollout) pattern='' expected='no value' ;;
    --max-mae | --max-p99-ms) pattern=$number expected='a number' ;;
    --start-frame) pattern='[0-9]+' expected='a whole number' ;;
    --num-steps) pattern='0*[1-9][0-9]*' expected='a whole number of at least 1' ;;
    --backend) pattern='(auto|lerobot|native|onnx)' expected='auto, lerobot, native or onnx' ;;
    --mode) pattern='(auto|chunk|every-step|ensemble)' expected='auto, chunk, every-step or ensemble' ;;
    *) die "eval_args: found $1, expected --rollout, --max-mae=X, --max-p99-ms=X, --start-frame=N, --num-steps=N," \
      "--backend=NAME, --mode=NAME" ;;
  esac
  option=$1 value=''
  if [[ $1 == *=* ]]; then
    value=${1#*=}
  elif [[ -n $pattern && -n ${2:-} ]]; then
    value=$2
    shift
  fi
  shift
  [[ $option != --rollout=* && $value =~ ^$pattern$ ]] || die "eval_args: $option: found '$value', expected $expected"
done
set -- "${options[@]}"
[[ $check != options ]] || exit 0

# The one dataset below --dataset, becomes $found; with one of the episodes at least.
find_dataset() {
  [[ -d $dataset ]] || die "$dataset: no such directory; the evaluation dataset's input is not there"
  mapfile -t found < <(find -L "$(realpath "$dataset")" -path '*/meta/info.json' -printf '%h\n' | sort)
  found=("${found[@]%/meta}")
  [[ -n ${found[*]} ]] || die "$dataset: no LeRobot dataset below it (no meta/info.json); upload its folder, see README.md"
  [[ -z ${found[1]:-} ]] || die "$dataset: several LeRobot datasets (${found[*]}); give --dataset one of these folders"
  local total
  total=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["total_episodes"] + 0)' \
    "${found[0]}/meta/info.json" 2>/dev/null) || die "${found[0]}/meta/info.json: cannot be read; upload the dataset again"
  for episode in "${episodes[@]}"; do
    ((10#$episode >= total)) || return 0
  done
  die "EVAL_EPISODES: found $EVAL_EPISODES, expected at least one of the dataset's $total episodes, 0 to $((total - 1))"
}
if [[ -n $check ]]; then
  find_dataset
  echo "${found[0]}"
  exit 0
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

# -- the checkpoint -----------------------------------------------------------------------------------------------

[[ -d $checkpoint ]] || die "$checkpoint: no such directory; the checkpoint's input is not there"
[[ -n $(ls -A "$checkpoint") ]] || die "$checkpoint: empty; the training task uploaded nothing, see its log"
newest=$(
  python - "$checkpoint" <<'PY'
import sys
from pathlib import Path
from lerobot_checkpoint import CheckpointError, list_checkpoints, newest_checkpoint, verify_checkpoint


def die(message):
    print(f"error: eval-entrypoint: {message}", file=sys.stderr)
    sys.exit(1)


root = Path(sys.argv[1]).resolve()
runs = [folder for folder in [root, *sorted(p for p in root.rglob("*") if p.is_dir())] if list_checkpoints(folder)]
if not runs:
    die(f"{root}: no checkpoint_NNNNNN below it; the training task uploaded no checkpoint, see its log")
if len(runs) > 1:
    die(f"{root}: checkpoints of several runs ({', '.join(map(str, runs))}); give --checkpoint one of these")
newest = list_checkpoints(runs[0])[-1]
try:
    verify_checkpoint(newest)
except CheckpointError as error:
    older = newest_checkpoint(runs[0])
    die(
        f"the newest checkpoint arrived torn: {error}; run the training task's upload again"
        + (f" (the older {older.name} is whole: python -m ur10e_deploy.offline_eval takes it)" if older else "")
    )
print(newest)
PY
) || exit 1
echo "eval-entrypoint: evaluating $newest"

# -- the recordings -----------------------------------------------------------------------------------------------

if [[ -n $dataset ]]; then
  find_dataset
  data=(--dataset "${found[0]}")
else
  [[ -d $bags ]] || die "$bags: no such directory; the input with the recordings is not there"
  found=$(
    python - "$newest" "$bags" <<'PY'
import json, sys
from pathlib import Path

# Episodes are named by their path below the folder of bags, and OSMO puts a dataset into two more folders.
checkpoint, bags = map(Path, sys.argv[1:])
contract = json.loads((checkpoint / "pretrained_model/train_config.json").read_text())
held_out, trained = contract["held_out_episodes"], contract["training_episodes"]
roots = [bags, *bags.glob("*"), *bags.glob("*/*")]
root = next((root for root in roots if all((root / name).exists() for name in held_out + trained)), None)
if root is None:
    sys.exit(f"error: eval-entrypoint: {bags}: not the recordings of {checkpoint}, which names {', '.join(trained[:2])}, ...")
print(root.resolve(), *held_out, sep="\n")
PY
  ) || exit 1
  mapfile -t lines <<<"$found" # the folder, then the names of the held-out recordings
  [[ -n ${lines[1]:-} || -n ${episodes[*]} ]] ||
    die "$newest: its training held nothing out; record five episodes or more, or evaluate on a LeRobot dataset"
  data=(--bags "${lines[0]}" --cache-dir "${EVAL_CACHE_DIR:-frame-cache}")
fi
[[ -z ${episodes[*]} ]] || data+=(--episode "${episodes[@]}" --skip-missing-episodes)

# -- the evaluation -----------------------------------------------------------------------------------------------

mkdir -p "$output" || die "$output: cannot be made"
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
rc=0
(
  cd "$results" # so that the log and the report name the results without this folder, which goes away
  python -m ur10e_deploy.offline_eval --checkpoint "$newest" "${data[@]}" --device "$EVAL_DEVICE" --output eval "$@"
) || rc=$?
((rc == 0 || rc == 3)) || die "the evaluation failed with exit code $rc; its own line is above"
compgen -G "$results/eval/episode_*.parquet" >/dev/null || die "the evaluation wrote no episode_NNN.parquet"
cp -r "$results/eval/." "$output" || die "$output: could not copy the results there"
echo "eval-entrypoint: $(find "$results/eval" -name "episode_*.parquet" | wc -l) episodes evaluated; results in $output"
if ((rc == 3)); then
  echo "error: eval-entrypoint: a gate was exceeded (exit code 3); the results are complete" >&2
fi
exit "$rc"
