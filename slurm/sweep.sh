#!/bin/bash
# A grid of settings as one array job, each cell with a run folder of its own.
#
#     slurm/sweep.sh slurm/train_laq.sbatch --lr 1e-4,3e-4 --seed 0,1,2 -- --steps 5000 --output-dir outputs/sweep
#     slurm/sweep.sh --dry-run --partition=gpu slurm/train_laq.sbatch --lr 1e-4,3e-4 -- --output-dir outputs/sweep
#
# Before the file: flags of sbatch, and --dry-run, which shows everything and submits nothing. Behind it: the grid, values
# by commas. Behind --: what is the same in all cells. The same command again resumes the cells that are not done;
# `python -m hlrp.runs outputs/sweep` tabulates them.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/site.env.example
[[ ! -f slurm/site.env ]] || source slurm/site.env

fail() { echo "$*" >&2 && exit 1; }
dry_run=0 template='' flags=() fixed=() folder=''
while [[ -z $template ]]; do
  case ${1-} in
    --dry-run) dry_run=1 ;;
    *.sbatch) template=$1 ;;
    -*) flags+=("$1") ;;
    *) fail "'${1-}' stands where flags of sbatch, as --name=value, or a file such as slurm/train_laq.sbatch fit" ;;
  esac
  shift
done

cells=('') names=('')
while (($#)) && [[ $1 != -- ]]; do
  [[ $1 == --* ]] || fail "'$1' stands where a flag such as --lr fits; what is no grid goes behind --"
  [[ $1 != *=* ]] || set -- "${1%%=*}" "${1#*=}" "${@:2}"
  [[ -n ${2-} && $2 != --* ]] || fail "$1 has no value; expected some, by commas"
  IFS=, read -ra values <<<"$2"
  more_cells=() more_names=()
  for i in "${!cells[@]}"; do
    for value in "${values[@]}"; do
      more_cells+=("${cells[i]}$(printf ' %q' "$1" "$value")")
      more_names+=("${names[i]:+${names[i]}_}${1#--}${value//\//-}")
    done
  done
  cells=("${more_cells[@]}") names=("${more_names[@]}")
  shift 2
done
while (($#)); do
  case $1 in
    --) ;;
    --output[-_]dir) folder=${2-} && shift ;;
    --output[-_]dir=*) folder=${1#*=} ;;
    *) fixed+=("$1") ;;
  esac
  shift
done
[[ -n $folder ]] || fail "the sweep has no folder; add -- --output-dir FOLDER"

lines=$(for i in "${!cells[@]}"; do
  echo "$(printf '%q ' "${fixed[@]}" --output-dir "$folder/${names[i]:-all}")${cells[i]# }"
done)
submit=(sbatch --array="0-$((${#cells[@]} - 1))" --output=slurm/logs/%x-%A_%a.log "${flags[@]}" "$template")
if ((dry_run)); then
  printf '%s\n' "$lines" | nl -v 0
  printf '\n%s\n\n' "${submit[*]}"
  cat "$template"
  exit
fi
[[ -z ${RUNS-} || -e outputs ]] || { mkdir -p "$RUNS" && ln -s "$RUNS" outputs; }
mkdir -p "$folder"
export HLRP_CELLS=$folder/cells.txt # a cell finds its arguments in the line of its number
[[ ! -f $HLRP_CELLS || $(<"$HLRP_CELLS") == "$lines" ]] || fail "$folder holds another sweep (cells.txt); give another folder"
printf '%s\n' "$lines" >"$HLRP_CELLS"
"${submit[@]}"
