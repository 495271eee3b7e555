#!/usr/bin/env bash
# One attempt at training, as the command of an OSMO task: take up an earlier attempt's checkpoint, train, hand over.
#
#   bash train-entrypoint.sh [--check] [--bags=DIR | --bags-dataset=DIR] [--resume-from=DIR] [--upload-to=URL] \
#       [--output=DIR] [--run=NAME] [--workflow=ID] [--storage-url=URL] [--gpus=N] [--download=SCRIPT] \
#       [--eval-dataset=DIR | --eval-held-out=SETTINGS [--eval-option=WORD]...] LAUNCHER... train.py ARGUMENT...
#
# Whatever a submission can set is checked first, so that nothing of it is found wrong hours later: names, urls, numbers
# here; every setting by train.py, at its start, or by check_settings.py where --download or --eval-... is given. With
# --check that is all: it ends after the checks of names, urls and numbers (`python -m osmo.submit`).
#
# The recordings lie in --bags, or below --bags-dataset as OSMO lays a dataset out. LAUNCHER is `python`, or `torchrun`
# with its options. --resume is added: an attempt goes on from the newest complete checkpoint in its own directory (a
# restart on the same node), else from the one in --resume-from (another node). --download is run before, and then this
# script again. --eval-dataset is what a later task evaluates on, of which only the metadata have to be there; with
# --eval-held-out it evaluates on what the training holds out, and SETTINGS (separated by ;) are those that differ from
# other runs that it compares with this one. Only a completed run is copied to --output, because OSMO uploads what lies
# there after a failure as well. Beside the training run heartbeat.py, for the next attempt, and uploads.py, which sends
# the run to --upload-to. Every end but SIGKILL passes through finish().
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

# -- check what was asked for -------------------------------------------------------------------------------------

bags='' folders=0 resume_from='' upload_to='' output='' run=unnamed workflow='' storage_url='' gpus=1 download=''
eval_dataset='' check='' held_out='' differs='' again=() eval_options=()
while (($#)); do
  [[ $1 == --download=* || $1 != --* ]] || again+=("$1")
  case $1 in
    --check) check=yes ;;
    --bags=*) bags=${1#*=} ;;
    --bags-dataset=*) bags=${1#*=} folders=2 ;;
    --resume-from=*) resume_from=${1#*=} ;;
    --upload-to=*) upload_to=${1#*=} ;;
    --output=*) output=${1#*=} ;;
    --run=*) run=${1#*=} ;;
    --workflow=*) workflow=${1#*=} ;;
    --storage-url=*) storage_url=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --download=*) download=${1#*=} ;;
    --eval-dataset=*) eval_dataset=${1#*=} ;;
    --eval-held-out=*) held_out=yes differs=${1#*=} ;;
    --eval-option=*) eval_options+=("${1#*=}") ;;
    --*) die "$1: unknown option; the head of this script lists those there are, before the command" ;;
    *) break ;;
  esac
  shift
done
(($#)) || die "no command to train with; expected for example: python /workspace/train.py --config=FILE"

option() { sed -n "s/.*--$1[= ]\([^ ]*\).*/\1/p" <<<"$2"; } # NAME, command line
whole='^[1-9][0-9]*$' name='^[A-Za-z][A-Za-z0-9_.-]*$' component='[^[:space:]/,;*]+'
[[ $run =~ $name ]] || # empty, it would be the folder of everybody's runs; --set makes 100000.0 of 1e5
  die "run: found '$run', expected a letter, then letters, digits, _, . and -, for example run=ur10e-act-train-1"
if [[ -n $storage_url ]]; then
  [[ $storage_url =~ ^[a-z0-9]+://$component(/$component)*$ && ! $storage_url =~ ^azure://[^/]*$ ]] ||
    die "storage_url: found '$storage_url', expected azure://ACCOUNT/CONTAINER/PREFIX, with no slash at its end"
elif [[ -n $workflow && $run != "$workflow" ]]; then
  die "run: found '$run', but no storage_url, and without one there is no earlier run to continue; give both, or neither"
fi
nodes=$(option nnodes "$*") node=$(option node_rank "$*") ranks_here=$(option nproc_per_node "$*") # of torchrun
: "${node:=0}"
[[ ${nodes:=1} =~ $whole ]] || die "n_nodes: found '$nodes', expected a whole number of at least 1"
[[ ${ranks_here:=1} =~ $whole ]] || die "gpus_per_node: found '$ranks_here', expected a whole number of at least 1"
[[ $gpus == [01] ]] ||
  die "gpu: found '$gpus', expected 1: one process uses one GPU; for more in one machine, submit" \
    "osmo-workflow-ddp.yaml with n_nodes=1 gpus_per_node=$gpus"
[[ $peer_wait_s =~ ^[0-9]+$ ]] || die "PEER_WAIT_S: found '$peer_wait_s', expected a whole number of seconds"

seen=' ' # the settings so far, and whether the last word on wandb.enabled is true
wandb=$(sed -n '/^wandb:/,/^[a-z]/s/^  enabled: *\([a-zA-Z]*\).*/\1/p' "$(option config "$*")" 2>/dev/null || true)
for word in "$@"; do
  [[ $word == --override=* ]] || continue
  setting=${word#--override=}
  key=${setting%%=*}
  case $key in
    training.output_dir | data.bag_dir | data.cache_dir) # OSMO takes the run from there: elsewhere, it would be lost
      die "overrides: $setting: this setting is fixed on OSMO, where the run goes to $run_dir and the recordings are in" \
        "$bags_dir; leave it out" ;;
    training.resume) # a restarted task would begin again, or from that checkpoint instead of its own last one
      die "overrides: $setting: this setting is fixed on OSMO, where a run goes on from its newest checkpoint; to" \
        "continue an earlier run, give storage_url and run" ;;
    wandb.enabled) wandb=${setting#*=} ;;
    wandb.* | mlflow.*) ;; # those of a workflow are meant to be replaced
    *)
      [[ $seen != *" $key "* ]] || # the arms of a sweep would all be the same
        die "overrides: $setting: $key is given twice: in overrides, or there and by the workflow (steps, or what a" \
          "sweep varies); give it once" ;;
  esac
  seen+="$key "
done
[[ ${wandb,,} != true || -n ${WANDB_API_KEY:-} || ${WANDB_MODE:-} == @(offline|disabled|dryrun) ]] ||
  die "wandb.enabled: true, but there is no key (WANDB_API_KEY): submit osmo-workflow-wandb.yaml, or the sweep with" \
    "wandb=true, which take it from the credential wandb"
[[ -z $held_out || ";$differs" != *";"@(training.@(seed|val_fraction|hold_out)|data.@(episode*|keep_failures|min_episode_s))=* ]] ||
  die "sweep: $differs: each run would hold out other recordings, and there would be none to compare them on; leave it" \
    "out of the grid, or give eval_dataset, or compare=false"
[[ -z $check ]] || exit 0

# From here on SIGTERM and SIGINT mean: save, and end with 75.
asked='' sent='' child='' log=''
end_before_training() { # after a check has refused, which has said why, or because of a signal
  [[ -n $asked ]] || exit 1
  say "stopped before the training began"
  exit 75
}
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

heartbeat() { # ACTION [NAME=VALUE]
  python "$here/heartbeat.py" "$1" "$run_dir" node="$node" command="$HEARTBEAT_COMMAND" earlier="$resume_from" \
    upload_to="${upload_to:+$upload_to/$(basename "$run_dir")}" "${@:2}"
}
beside=() # processes beside the training
finish() {
  local rc=$?
  trap '' TERM INT
  [[ -z $log ]] || rm -f "$log"
  if [[ -n ${HEARTBEAT_COMMAND:-} ]]; then
    if [[ -n ${beside[*]} ]]; then
      kill "${beside[@]}" 2>/dev/null || true
      wait "${beside[@]}" 2>/dev/null || true
    fi
    heartbeat end code="$rc" || true
    if [[ -n $upload_to && $node == 0 ]]; then # a run that has not arrived is no success: 75 goes on from what has
      python "$here/uploads.py" send "$run_dir" --to="$upload_to" || ((rc)) || rc=75
      ((rc)) || say "complete: the run is in $upload_to"
    fi
  fi
  exit "$rc"
}
trap finish EXIT

# What is hours away, a download or an evaluation, is checked with all settings before: train.py would do so too late.
if [[ -n $eval_dataset ]]; then
  eval_dataset=$(bash "$here/eval-entrypoint.sh" --check --checkpoint=later --dataset="$eval_dataset" --output=later \
    "${eval_options[@]}") || end_before_training
elif [[ -n $held_out ]]; then
  bash "$here/eval-entrypoint.sh" --check=options --checkpoint=later --bags=later --output=later "${eval_options[@]}" ||
    end_before_training
fi
if [[ -n $download$eval_dataset$held_out ]]; then
  python "$here/check_settings.py" "$eval_dataset" "${held_out:+$bags}" "$@" || end_before_training
fi
[[ -z $asked ]] || end_before_training

mkdir -p "$run_dir" "$(dirname "$bags_dir")" || die "$run_dir: cannot be made; the image makes /output and /data"
if [[ -z ${HEARTBEAT_COMMAND:-} ]]; then # not after the download again
  HEARTBEAT_COMMAND=$( (echo "$run $workflow $*" && cat "$(option config "$*")" || true) 2>/dev/null |
    sed 's/--master_addr=[^ ]*//' | cksum) # another submission is another try
  export HEARTBEAT_COMMAND
  heartbeat begin || exit 1
fi
[[ -z $asked ]] || end_before_training
[[ -z $download ]] || exec bash "$download" bash "$0" "${again[@]}" "$@"

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

# OSMO's uploads leave out linked folders without a word, and end with 0 when some of them failed.
list=$bags_dir/bags.txt
if [[ -s $list ]]; then
  missing=$(find -L "$bags_dir/" -type f -printf '%s\t%P\n' | grep -Fxvf - "$list" || true)
  [[ -z $missing ]] ||
    die "$bags_dir: $(wc -l <<<"$missing") of the $(wc -l <"$list") files in bags.txt did not arrive whole:" \
      "$(cut -f 2 <<<"$missing" | head -n 3 | paste -sd ' '); list and upload them again, copies in place of linked folders"
else
  say "note: no bags.txt with the recordings, so nobody knows whether all of them arrived (README.md, Submit)"
fi

# -- take up what an earlier attempt left -------------------------------------------------------------------------

if [[ -n $resume_from && $node == 0 ]] && ! compgen -G "$run_dir/checkpoint_*" >/dev/null; then
  [[ -d $resume_from ]] || die "--resume-from=$resume_from: no such directory; the input with the earlier attempt"
  python "$here/uploads.py" take-up "$run_dir" "$resume_from/$(basename "$run_dir")" ||
    die "could not take up $resume_from"
fi

# -- train --------------------------------------------------------------------------------------------------------

# Loader processes hand batches over in shared memory, of which a pod has 64 MiB unless its pool gives it more.
shm_mib=$(($(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $2}' || echo 0) / 1024))
if ((shm_mib < 256 * ranks_here)) && [[ "$*" != *training.num_workers=* ]]; then
  say "note: /dev/shm has $shm_mib MiB for $ranks_here GPUs: batches are loaded in the training process" \
    "(training.num_workers=0); README.md says how a pool gets more"
  set -- "$@" --override=training.num_workers=0
fi

export PYTHONUNBUFFERED=1
rm -f "$run_dir/stopped.json"
[[ -z $asked ]] || end_before_training

heartbeat watch &
beside+=("$!")
if [[ -n $upload_to && $node == 0 ]]; then
  python "$here/uploads.py" watch "$run_dir" --to="$upload_to" &
  beside+=("$!")
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

want="most likely for want of memory; raise \`memory\`, or lower training.batch_size or training.num_workers"
if [[ -n $asked ]] && ((rc == 143)); then
  rc=75 # the signal came before train.py could heed it
elif [[ -z $log ]] && ((rc == 137)); then
  echo "error: train-entrypoint: the training was killed, $want" >&2
elif [[ -n $log ]] && ((rc == 1)); then
  # The failing rank's own line, or Python's last one (torch.AcceleratorError, but not torchrun's torch.distributed...);
  # a victim's line is no reason.
  own=$(grep -aE '^(\[rank[0-9]+\]: )?(error: |(torch\.)?[A-Za-z_]+(Error|Exception)\b)' "$log" |
    grep -av 'another rank is gone' || true)
  # Of the rank that failed first: those that torchrun then kills are in its table too.
  first=$(grep -aA 6 '^Root Cause' "$log" | sed -n 's/.*exitcode *: \(-\{0,1\}[0-9][0-9]*\).*/\1/p' | tail -n 1 || true)
  if [[ -e $run_dir/stopped.json || $first == 75 ]]; then
    rc=75
  elif [[ -n $own ]]; then
    rc=1
  elif [[ $first == -9 ]]; then
    rc=137
    echo "error: train-entrypoint: a rank of this node was killed, $want" >&2
  elif [[ $first =~ ^-(4|7|8|11)$ ]]; then
    rc=1
    echo "error: train-entrypoint: a rank of this node crashed with signal ${first#-} (7: most likely /dev/shm is full," \
      "then set training.num_workers=0; else see above)" >&2
  elif [[ -n $asked || $first == -15 ]]; then
    rc=75
  elif ((nodes == 1)); then # no other node that could have been lost: it would fail alike
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

for link in last best; do # OSMO uploads no links to directories
  [[ ! -L $run_dir/$link ]] || readlink "$run_dir/$link" >"$run_dir/$link.txt"
done
[[ -n $output ]] || exit 0
delivered=$output/$(basename "$run_dir")
rm -rf "$delivered"
if ! mkdir -p "$delivered" || ! cp -r "$run_dir"/[!.]* "$delivered"; then
  die "$output: could not copy the run there; it is still in $run_dir"
fi
say "complete: $(find "$delivered" -maxdepth 1 -name 'checkpoint_*' | wc -l) checkpoints handed over to $output"
