#!/bin/bash
# One run in two queues, of one cluster or of two that share a file system: the job that starts first trains, the other
# one cancels itself when its turn comes.
#
#     slurm/submit_twice.sh slurm/train_laq.sbatch --size base --output-dir outputs/laq
#
# QUEUE_A and QUEUE_B of slurm/site.env are the flags of sbatch by which the two differ.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=slurm/site.env.example
[[ ! -f slurm/site.env ]] || source slurm/site.env
[[ -n ${QUEUE_A-} && -n ${QUEUE_B-} ]] || { echo "QUEUE_A and QUEUE_B are not set; see slurm/site.env.example" >&2 && exit 1; }

HLRP_TICKET=$(date +%Y%m%d-%H%M%S)-$$ # the same for both jobs, which lock the run folder by it
export HLRP_TICKET
for queue in "$QUEUE_A" "$QUEUE_B"; do
  read -ra flags <<<"$queue"
  sbatch "${flags[@]}" "$@"
done
