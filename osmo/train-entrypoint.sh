#!/usr/bin/env bash
# One attempt at training, as the command of an OSMO task: take up an earlier attempt's checkpoint, train, hand over.
#
#   bash train-entrypoint.sh [--bags=DIR | --bags-dataset=DIR] [--resume-from=DIR] [--output=DIR] \
#       LAUNCHER... train.py ARGUMENT...
#
# The recordings lie in --bags, or below --bags-dataset as OSMO lays a dataset out. LAUNCHER is `python`, or `torchrun`
# with its options. --resume is added: an attempt goes on from the newest complete checkpoint in its own directory (a
# restart on the same node), else from the one in --resume-from (another node).
# Only a completed run is copied to --output, because OSMO uploads what lies there after a failure as well.
#
# Exit codes: 0 complete, 1 failed, 75 run it again (the workflows reschedule it). torchrun turns every code into 1,
# so what it ended with is told by the marker and the error line that train.py leaves.
set -euo pipefail

run_dir=/output/train-rosbag-act # training.output_dir of the config
bags_dir=/data/rosbags           # data.bag_dir of the config
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
peer_wait_s=${PEER_WAIT_S:-600}  # how long a node whose peer was lost waits for OSMO to restart it in place

say() { echo "train-entrypoint: $*"; }
die() {
  echo "error: train-entrypoint: $*" >&2
  exit 1
}

bags='' folders=0 resume_from='' output=''
while (($#)); do
  case $1 in
    --bags=*) bags=${1#--bags=} ;;
    --bags-dataset=*) bags=${1#--bags-dataset=} folders=2 ;;
    --resume-from=*) resume_from=${1#--resume-from=} ;;
    --output=*) output=${1#--output=} ;;
    --*) die "$1: unknown option; expected --bags= or --bags-dataset=, --resume-from=, --output=, then the command" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die "no command to train with; expected for example: python /workspace/train.py --config=FILE"
for word in "$@"; do # found wrong only after training, the run would be lost: OSMO takes it from these folders
  case ${word#--override=} in
    training.output_dir=* | data.bag_dir=* | data.cache_dir=*)
      die "overrides: ${word#--override=}: this setting is fixed on OSMO, where the run goes to $run_dir and the" \
        "recordings are in $bags_dir; leave it out" ;;
  esac
done

# From here on SIGTERM and SIGINT mean: save, and end with 75.
asked='' sent='' child='' log=''
forward() {
  asked=yes
  [[ -n $child ]] || return 0
  sent=yes
  # To torchrun's ranks, not to torchrun: it would give them 30 s to save before it kills them. They all end together.
  local ranks=''
  [[ -z $log ]] || read -r ranks <"/proc/$child/task/$child/children" || true
  # shellcheck disable=SC2086 # several numbers
  kill -TERM ${ranks:-$child} 2>/dev/null || true
}
trap forward TERM INT
trap '[[ -z $log ]] || rm -f "$log"' EXIT

mkdir -p "$run_dir" "$(dirname "$bags_dir")" || die "$run_dir: cannot be made; the image makes /output and /data"
if [[ -n $bags ]]; then
  [[ -d $bags ]] || die "$bags: no such directory; the task's first input has to be the recordings"
  [[ -L $bags_dir || ! -e $bags_dir ]] || die "$bags_dir: there already, and no link; the recordings would be ignored"
  # OSMO puts a dataset into a folder named after it, and into that the folder that was uploaded. Episodes are named by
  # their path, and should have the same names here, in blob storage and at home: go down these two, and no further.
  for ((; folders > 0; folders--)); do
    only=$(ls -A "$bags")
    [[ -n $only && -d $bags/$only ]] || break
    ! compgen -G "$bags/$only/*.db3*" >/dev/null || break
    ! compgen -G "$bags/$only/*.mcap*" >/dev/null || break
    bags=$bags/$only
  done
  ln -sfn "$bags" "$bags_dir"
fi

# -- take up what an earlier attempt left -------------------------------------------------------------------------

if [[ -n $resume_from ]] && ! compgen -G "$run_dir/checkpoint_*" >/dev/null; then
  [[ -d $resume_from ]] || die "--resume-from=$resume_from: no such directory; the input with the earlier attempt"
  PYTHONPATH=$here python - "$resume_from/$(basename "$run_dir")" "$run_dir" <<'PY' || die "could not take up $resume_from"
import os, shutil, sys
from pathlib import Path
from lerobot_checkpoint import CheckpointError, best_checkpoint, newest_checkpoint, verify_checkpoint

earlier, run_dir = map(Path, sys.argv[1:])


def fetch(checkpoint):
    partial = run_dir / f".tmp-{checkpoint.name}"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(checkpoint, partial)
    os.rename(partial, run_dir / checkpoint.name)


newest = newest_checkpoint(earlier, on_bad=lambda line: print(f"train-entrypoint: passed over {line}"))
if newest is None:
    print(f"train-entrypoint: no complete checkpoint of an earlier attempt in {earlier}: starting at step 0")
    sys.exit()
if (earlier / "metrics.jsonl").exists():
    shutil.copy(earlier / "metrics.jsonl", run_dir)
fetch(newest)
print(f"train-entrypoint: taking up {newest.name} of an earlier attempt")
best = best_checkpoint(earlier)  # train.py points `best` at it again: links are not uploaded
if best is not None and best.name != newest.name:
    try:
        verify_checkpoint(best)
        fetch(best)
    except CheckpointError as error:
        print(f"train-entrypoint: the best checkpoint so far is lost: {error}")
PY
fi

# -- train --------------------------------------------------------------------------------------------------------

# Loader processes hand batches over in shared memory, of which a pod has 64 MiB unless its pool gives it more.
option() { sed -n "s/.*--$1[= ]\([0-9][0-9]*\).*/\1/p" <<<"$2"; } # NAME, command line
ranks_here=$(option nproc_per_node "$*")
shm_mib=$(($(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $2}' || echo 0) / 1024))
if ((shm_mib < 256 * ${ranks_here:-1})) && [[ "$*" != *training.num_workers=* ]]; then
  say "note: /dev/shm has $shm_mib MiB for ${ranks_here:-1} GPUs: batches are loaded in the training process" \
    "(training.num_workers=0); README.md says how a pool gets more"
  set -- "$@" --override=training.num_workers=0
fi

export PYTHONUNBUFFERED=1
rm -f "$run_dir/stopped.json"
if [[ -n $asked ]]; then
  say "stopped before the training began"
  exit 75
fi

if [[ $(basename "$1") == torchrun ]]; then
  log=$(mktemp)
  "$@" --resume 2>>"$log" &
  child=$!
  tail -n +1 -f --pid="$child" "$log" >&2 &
  tail_pid=$!
else
  "$@" --resume &
  child=$!
fi
[[ -z $asked || -n $sent ]] || forward # a signal that came between; a second one would end it without saving
rc=0
while :; do # `wait` also returns when a signal arrives; the trainer then saves, and is waited for again
  wait "$child" && rc=0 || rc=$?
  kill -0 "$child" 2>/dev/null || break
done
[[ -z $log ]] || wait "$tail_pid" || true

if [[ -n $asked ]] && ((rc == 143)); then
  rc=75 # the signal came before train.py could heed it
elif [[ -n $log ]] && ((rc == 1)); then
  # The failing rank's own line, or Python's last one (torch.AcceleratorError, but not torchrun's torch.distributed...);
  # a victim's line is no reason.
  own=$(grep -aE '^(\[rank[0-9]+\]: )?(error: |(torch\.)?[A-Za-z_]+(Error|Exception)\b)' "$log" |
    grep -av 'another rank is gone' || true)
  # Of the rank that failed first: those that torchrun then kills are in its table too.
  first=$(grep -aA 6 '^Root Cause' "$log" | sed -n 's/.*exitcode *: \(-\{0,1\}[0-9][0-9]*\).*/\1/p' | tail -n 1 || true)
  nodes=$(option nnodes "$*")
  if [[ -e $run_dir/stopped.json || $first == 75 ]]; then
    rc=75
  elif [[ -n $own ]]; then
    rc=1
  elif [[ $first == -9 ]]; then
    rc=137
    echo "error: train-entrypoint: a rank of this node was killed, most likely for want of memory; raise \`memory\`," \
      "or lower training.batch_size or training.num_workers" >&2
  elif [[ $first =~ ^-(4|7|8|11)$ ]]; then
    rc=1
    echo "error: train-entrypoint: a rank of this node crashed with signal ${first#-} (7: most likely /dev/shm is full," \
      "then set training.num_workers=0; else see above)" >&2
  elif [[ -n $asked || $first == -15 ]]; then
    rc=75
  elif ((${nodes:-1} == 1)); then # no other node that could have been lost: it would fail alike
    echo "error: train-entrypoint: the ranks failed, and none of them says why; see above" >&2
  else
    # Restarted in place, the node keeps its checkpoints and frame cache; on a new pod it would not.
    say "another node stopped or was lost; waiting up to $peer_wait_s s for OSMO to restart this one, then exit 75"
    sleep "$peer_wait_s" &
    child=$!
    wait "$child" || true
    kill "$child" 2>/dev/null || true
    rc=75
  fi
fi
((rc == 0)) || exit "$rc"

# -- hand over ----------------------------------------------------------------------------------------------------

[[ -n $output ]] || exit 0
delivered=$output/$(basename "$run_dir")
rm -rf "$delivered"
if ! mkdir -p "$delivered" || ! cp -r "$run_dir"/[!.]* "$delivered"; then
  die "$output: could not copy the run there; it is still in $run_dir"
fi
for link in last best; do # OSMO uploads no links to directories
  [[ ! -L $run_dir/$link ]] || readlink "$run_dir/$link" >"$delivered/$link.txt"
done
say "complete: $(find "$delivered" -maxdepth 1 -name 'checkpoint_*' | wc -l) checkpoints handed over to $output"
