#!/usr/bin/env bash
# Evaluate the newest checkpoint below --checkpoint on the LeRobot dataset below --dataset; results go to --output.
#
#   eval-entrypoint.sh --checkpoint=DIR --dataset=DIR --output=DIR [OPTION OF offline_eval]...
#
# EVAL_EPISODES (for example "0 1 2 3"; those that the dataset lacks are left out, and named) and EVAL_DEVICE choose
# what and where. OSMO can report an upload as complete that was not, so nothing here is taken on trust: a checkpoint
# that is missing, or not as its manifest says, ends the task instead of passing an older one off as the result.
#
# Exit codes: 0 done, 1 something is missing or torn, 3 a gate (--max-mae, --max-p99-ms) was exceeded.
set -euo pipefail

die() {
  echo "error: eval-entrypoint: $*" >&2
  exit 1
}

checkpoint='' dataset='' output=''
while (($#)); do
  case $1 in
    --checkpoint=*) checkpoint=${1#--checkpoint=} ;;
    --dataset=*) dataset=${1#--dataset=} ;;
    --output=*) output=${1#--output=} ;;
    *) break ;;
  esac
  shift
done
[[ -n $checkpoint && -n $dataset && -n $output ]] || die "expected --checkpoint=DIR --dataset=DIR --output=DIR"
[[ ${EVAL_EPISODES:-} == *[![:space:]]* ]] || die "EVAL_EPISODES is empty; expected episode numbers, for example \"0 1 2 3\""
[[ ${EVAL_DEVICE:-} =~ ^(auto|cuda|mps|cpu)$ ]] || die "EVAL_DEVICE: found '${EVAL_DEVICE:-}', expected cuda or cpu"
read -ra episodes <<<"$EVAL_EPISODES"
for episode in "${episodes[@]}"; do
  [[ $episode =~ ^[0-9]+$ ]] || die "EVAL_EPISODES: found $episode, expected episode numbers, for example \"0 1 2 3\""
done

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

# -- the dataset --------------------------------------------------------------------------------------------------

[[ -d $dataset ]] || die "$dataset: no such directory; the evaluation dataset's input is not there"
mapfile -t found < <(find -L "$(realpath "$dataset")" -path '*/meta/info.json' -printf '%h\n' | sort)
found=("${found[@]%/meta}")
[[ -n ${found[*]} ]] || die "$dataset: no LeRobot dataset below it (no meta/info.json); upload its folder, see README.md"
[[ -z ${found[1]:-} ]] || die "$dataset: several LeRobot datasets (${found[*]}); give --dataset one of these folders"

# -- the evaluation -----------------------------------------------------------------------------------------------

mkdir -p "$output" || die "$output: cannot be made"
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
rc=0
(
  cd "$results" # so that the log and the report name the results without this folder, which goes away
  python -m ur10e_deploy.offline_eval --checkpoint "$newest" --dataset "${found[0]}" --episode "${episodes[@]}" \
    --skip-missing-episodes --device "$EVAL_DEVICE" --output eval "$@"
) || rc=$?
((rc == 0 || rc == 3)) || die "the evaluation failed with exit code $rc; its own line is above"
compgen -G "$results/eval/episode_*.parquet" >/dev/null || die "the evaluation wrote no episode_NNN.parquet"
cp -r "$results/eval/." "$output" || die "$output: could not copy the results there"
echo "eval-entrypoint: $(find "$results/eval" -name "episode_*.parquet" | wc -l) episodes evaluated; results in $output"
if ((rc == 3)); then
  echo "error: eval-entrypoint: a gate was exceeded (exit code 3); the results are complete" >&2
fi
exit "$rc"
