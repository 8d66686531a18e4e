# shellcheck shell=bash
# What the templates share. They source it where sbatch was called: in the root of the repository.
set -euo pipefail

# shellcheck source=slurm/site.env.example
[[ ! -f slurm/site.env ]] || source slurm/site.env
: "${RUNS:=}" "${CACHE:=$HOME/.cache}" "${LOCAL:=/tmp}" "${MOUNTS:=}" "${VENV:=.venv}" "${CONTAINER:=off}" "${IMAGE:=}"
[[ $CONTAINER != off || ! -d $VENV ]] || PATH=$(realpath "$VENV")/bin:$PATH

# Tokens go from where `hf auth login` and `wandb login` leave them into the environment of the job, and nowhere else.
secret() { [[ -n ${!1-} || -z $2 ]] || export "$1=$2"; }
secret HF_TOKEN "$(cat "${HF_HOME:-$HOME/.cache/huggingface}/token" 2>/dev/null)"
secret WANDB_API_KEY "$({ tr -s '[:space:]' '\n' <~/.netrc; } 2>/dev/null |
  awk '$0 == "machine" {getline host} $0 == "password" {getline key; if (host ~ /wandb/) print key}')"

# Caches are shared.
export HF_HOME=${HF_HOME:-$CACHE/huggingface} TORCH_HOME=${TORCH_HOME:-$CACHE/torch} HLRP_CACHE=${HLRP_CACHE:-$CACHE/hlrp}

say() { echo "$(date +%T) job $SLURM_JOB_ID: $*" >&2; }

# ---- in the batch script: begin, on_every_node, finish ----

# begin DEFAULT ARGUMENTS...: finds the run folder in the arguments, or adds DEFAULT to them; takes it for this job.
begin() {
  run='' arguments=("${@:2}") warned=0 status=0
  for ((i = 0; i < ${#arguments[@]}; i++)); do
    case ${arguments[i]} in
      --output[-_]dir) run=${arguments[i + 1]} ;;
      --output[-_]dir=*) run=${arguments[i]#*=} ;;
    esac
  done
  [[ -n $run ]] || { run=$1 && arguments+=(--output-dir "$run"); }
  [[ -z $RUNS || -e outputs ]] || { mkdir -p "$RUNS" && ln -s "$RUNS" outputs; }
  mkdir -p "$run/attempts"
  claim
  attempts=$run/attempts/$SLURM_JOB_ID
  touch "$attempts"
  export run attempts
  refuse_if_stuck
  progress >>"$attempts"
  say "$run on $SLURM_JOB_NODELIST, attempt $(wc -l <"$attempts")"
}

# claim: of the two jobs of submit_twice.sh, the first to come here takes the folder, and the other one goes.
claim() {
  [[ -n ${HLRP_TICKET-} ]] || return 0
  local file=$run/attempts/ticket-$HLRP_TICKET me="job $SLURM_JOB_ID of cluster $SLURM_CLUSTER_NAME"
  (set -o noclobber && echo "$me" >"$file") 2>/dev/null || true # makes the file, or fails: no two succeed
  [[ $(<"$file") != "$me" ]] || return 0
  say "$(<"$file") has $run; this one cancels itself"
  scancel "$SLURM_JOB_ID" && sleep 60
  exit 1
}

# progress: one line that changes with every checkpoint, rollout and shard below the run folder.
progress() {
  find "$run" \( -path '*/checkpoints/[0-9]*' -prune -o -name rollout.json -o -name '*.index' \) ! -name '*.partial' |
    sort | cksum
}

refuse_if_stuck() {
  (($(tail -n 2 "$attempts" | grep -cFx "$(progress)") < 2)) && return
  say "the last two attempts left nothing new in $run: not tried again. Submit it anew once you know why"
  exit 1
}

# on_every_node COMMAND...: one task a node; one that fails ends the others.
on_every_node() {
  local flags=() inside=() folders=$PWD:$PWD,$CACHE:$CACHE,$LOCAL:$LOCAL folder
  for folder in ${RUNS:+"$RUNS"} ${MOUNTS//,/ }; do folders+=,$folder:$folder; done
  case $CONTAINER in
    off) ;;
    pyxis) flags=(--container-image="$IMAGE" --container-mounts="$folders" --container-workdir="$PWD") ;;
    apptainer) inside=(apptainer exec --nv --bind "$folders" --pwd "$PWD" "$IMAGE") ;;
    *) say "CONTAINER=$CONTAINER; expected off, pyxis or apptainer" && exit 1 ;;
  esac
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 "${flags[@]}" "${inside[@]}" \
    bash -c 'source slurm/common.sh && node "$@"' node "$@" &
  local step=$!
  trap 'warned=1; say "warned, so it saves and asks for another turn"; kill -USR1 "$step"' USR1 # --signal=B:USR1
  wait "$step" && status=0 || status=$?
  while kill -0 "$step" 2>/dev/null; do # `wait` was interrupted by the trap
    wait "$step" && status=0 || status=$?
  done
}

# finish: ends the job, or has it queued again where its time was over; it then goes on from its checkpoint.
finish() {
  if { ((warned)) || preempted; } && { ((status)) || interrupted; }; then
    refuse_if_stuck
    say "interrupted, and queued again"
    scontrol requeue "$SLURM_JOB_ID"
  elif interrupted; then
    status=75
  fi
  exit "$status"
}

# preempted: whether Slurm wants the nodes for another job: it sends SIGTERM to the tasks, which save, and waits for a while.
preempted() { [[ $(scontrol show job "$SLURM_JOB_ID") == *PreemptTime=[0-9]* ]]; }

# interrupted: whether a training script has saved and stopped in this attempt.
interrupted() { [[ $run/run.json -nt $attempts ]] && grep -q '"state": "interrupted"' "$run/run.json"; }

# ---- in a task ----

# node COMMAND...: passes a warning on to all below, of which only training processes do not ignore it, and these not
# before they train; so it is repeated.
node() {
  TMPDIR=$(mktemp -d "$LOCAL/job-$SLURM_JOB_ID-XXXX")
  export TMPDIR TRITON_CACHE_DIR=$TMPDIR/triton
  trap 'rm -rf "$TMPDIR"' EXIT
  (
    trap '' USR1 TERM
    "$@"
  ) &
  local process=$! heard=''
  trap 'heard=USR1' USR1
  trap 'heard=TERM' TERM
  wait "$process" && status=0 || status=$?
  while [[ -n $heard ]] && kill -0 "$process" 2>/dev/null; do
    warn "$heard" "$process"
    sleep 2
  done
  [[ -z $heard ]] || { wait "$process" && status=0 || status=$?; }
  exit "$status"
}

# warn SIGNAL PROCESS: it and those below it, these first.
warn() {
  local child
  for child in $(pgrep -P "$2"); do warn "$1" "$child"; done
  kill -s "$1" "$2" 2>/dev/null || true
}

# launch ARGUMENTS...: the one line for one GPU and for many nodes; Slurm says who is who and where they meet.
launch() {
  local here=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}} # processes on this node
  export PET_SIGNALS_TO_HANDLE=SIGINT               # after SIGTERM, torch's launcher would kill its ranks in 30 s
  export HLRP_INTERRUPTED=0                         # a rank that has saved and stopped has not failed
  accelerate launch --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --num_processes $((SLURM_NNODES * here)) \
    --main_process_ip "$SLURM_LAUNCH_NODE_IPADDR" --main_process_port $((15000 + SLURM_JOB_ID % 15000)) "$@"
}

# ---- what the templates of the three stages do ----

# train SCRIPT DEFAULT_OUTPUT_DIR ARGUMENTS...: a leading --config_file is accelerate's, the rest goes to the script.
train() {
  local script=$1 default=$2 config=slurm/ddp.yaml
  shift 2
  if [[ -n ${HLRP_CELLS-} ]]; then # a cell of slurm/sweep.sh
    eval "set -- $(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$HLRP_CELLS")"
  fi
  [[ ${1-} != --config_file ]] || { config=$2 && shift 2; }
  begin "$default" "$@"
  on_every_node launch --config_file "$config" "$script" "${arguments[@]}"
  finish
}
