#!/usr/bin/env bash
# Evaluate the arms of a sweep on the same recordings and compare them: a folder per arm, comparison.txt and .png.
#
#   compare-entrypoint.sh (--bags=DIR | --dataset=DIR) --output=DIR --arm=NAME... [OPTION OF offline_eval]...
#   compare-entrypoint.sh --check=options ...          (no more than the options; for python -m osmo.submit)
#
# DIR of the recordings is the task's first input; the checkpoints of the arms, in their order, are the next ones beside
# it. Each arm is evaluated by eval-entrypoint.sh. --max-mae and --max-p99-ms are limits for the best arm, not for each.
#
# Exit codes: 0 done, 1 something is missing or torn, 3 a gate was exceeded by the best arm; the results are complete.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
die() {
  echo "error: compare-entrypoint: $*" >&2
  exit 1
}

check='' data='' output='' arms=() gates=() options=()
while (($#)); do
  case $1 in
    --check=options) check=$1 ;;
    --bags=* | --dataset=*) data=$1 ;;
    --output=*) output=${1#--output=} ;;
    --arm=*) arms+=("${1#--arm=}") ;;
    --max-mae=* | --max-p99-ms=*) gates+=("$1") ;;
    --max-mae | --max-p99-ms)
      gates+=("$1=${2:-}")
      (($# == 1)) || shift
      ;;
    *) options+=("$1") ;;
  esac
  shift
done
[[ -n $data && -n $output && -n ${arms[*]} ]] || die "expected --bags=DIR or --dataset=DIR, --output=DIR, --arm=NAME..."
bash "$here/eval-entrypoint.sh" --check=options "$data" --checkpoint=later --output=later "${options[@]}" "${gates[@]}"
[[ -z $check ]] || exit 0

inputs=$(dirname "${data#*=}")
EVAL_CACHE_DIR=$(mktemp -d) # all arms see the same decoded frames
export EVAL_CACHE_DIR
trap 'rm -rf "$EVAL_CACHE_DIR"' EXIT
number=0 folders=()
for arm in "${arms[@]}"; do
  number=$((number + 1))
  bash "$here/eval-entrypoint.sh" --checkpoint="$inputs/$number" "$data" --output="$output/$arm" "${options[@]}" ||
    die "$arm could not be evaluated; its own line is above"
  folders+=("$output/$arm")
done

export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python -m ur10e_deploy.compare "${folders[@]}" --output "$output/comparison.png" "${gates[@]}" |
  tee "$output/comparison.txt"
