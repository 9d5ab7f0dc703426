# shellcheck shell=bash
# Sourced by the sbatch scripts beside it, with $here (this folder), $told (what scontrol says of the job), the name of
# a config, and the job's arguments, which go to `megatron-lcl train`. Checks every node, starts one process a GPU, and
# puts the job back into the queue when the run asks for that. docs/launching.md says what can be set from outside.
[ -z "${SLURM_JOB_ID:-}" ] || source "${here:?}/job.sh"
if [ -n "${SETUP:-}" ]; then # the site's modules and variables; first, so that it can set all that is read below
  # shellcheck source=/dev/null
  source "$SETUP" || { echo "SETUP=$SETUP failed" >&2 && exit 2; }
fi
set -eu
source "${here:?}/common.sh"
config=$root/configs/$1.yaml
shift
# further options of every srun, and words before Python in every task; quoted as in a shell
srun_args=() prefix=()
eval "srun_args=(${SRUN_ARGS:-})"
eval "prefix=(${TASK_PREFIX:-})"
find_python ${TASK_PREFIX:+elsewhere} ${SLURM_JOB_ID:+${SRUN_ARGS:+elsewhere}}
train=("${prefix[@]}" "$python" -m megatron_lcl train --config "$config")

# a dry run's own arguments are not the job's; its sizes are by default those that sbatch finds in the script
sbatch_has() { sed -n "s/^#SBATCH.* --$1=\([0-9]*\).*/\1/p" "$0"; }
dry=no nodes=$(sbatch_has nodes) per_node=$(sbatch_has gpus-per-node) arguments=() given=("$@")
while [ "$#" -gt 0 ]; do
  case $1 in
    --dry-run) dry=yes ;;
    --nodes=*) nodes=${1#*=} ;;
    --processes=*) per_node=${1#*=} ;;
    --nodes) shift && nodes=${1:-} ;;
    --processes) shift && per_node=${1:-} ;;
    *) arguments+=("$1") ;;
  esac
  shift || break
done
[ "$dry" = yes ] || arguments=("${given[@]}")
train+=("${arguments[@]}")

if [ -n "${SLURM_JOB_ID:-}" ]; then
  nodes=$SLURM_JOB_NUM_NODES
  per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  # shellcheck disable=SC2153 # no misspelling of SLURM_GPUS_ON_NODE
  cpus=$((SLURM_CPUS_ON_NODE / per_node))
  cpus=$((cpus > 1 ? cpus : 1))
  logs=${SLURM_JOB_NAME//\//_}-$SLURM_JOB_ID
else
  [[ "$nodes $per_node" =~ ^[0-9]+\ [0-9]+$ ]] || { echo "--nodes and --processes take a number each" >&2 && exit 2; }
  cpus=CPUS logs=$(basename "$0" .sh)-JOB # only the job knows
fi
# without a binding every process sees all GPUs of its node, which NCCL needs to use NVLink
step=(srun --nodes="$nodes" --export=ALL --gpu-bind=none --kill-on-bad-exit=0 "${srun_args[@]}")
# one process a GPU, ranks counted along each node
all=("${step[@]}" --ntasks=$((nodes * per_node)) --ntasks-per-node="$per_node" --distribution=block)
all+=(--cpus-per-task="$cpus")
pattern=${logs//%/%%} # of a job's name srun would replace %s and the like
# before SRUN_ARGS, which may have another: how long tasks go on after the first has ended; and a log for each
run=(srun --wait=600 "${all[@]:1}" --open-mode=append --output="$pattern/rank-%4t.log" "${train[@]}")
MEGATRON_LCL_LAUNCH=$(printf '%q ' "${run[@]}") # what a dry run prints
export MEGATRON_LCL_LAUNCH

if [ -z "${SLURM_JOB_ID:-}" ]; then
  [ "$dry" = no ] || exec "${train[@]}" --dry-run --nodes "$nodes" --processes "$per_node"
  echo "this is a job: sbatch --nodes=N $0 …; \`bash $0 --dry-run --nodes N --processes GPUS\` checks it here" >&2
  exit 2
fi
mkdir -p "$logs"
source "$here/restarts.sh"
export MEGATRON_LCL_FAULTS=$PWD/$logs # where processes say which node has failed
max_restarts=${MAX_RESTARTS:-3} out=
echo "--- $(date -Is): start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST; logs in $PWD/$logs"

# --- the check: once on every node, before anything takes a GPU
rm -f "$logs"/check-* "$logs"/fault-* "$logs/all-reduce.log"
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
check=("${step[@]}" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE")
check+=(--distribution=block --output="$pattern/check-%t.log" --error="$pattern/check-%t.err")
code=0 bad=()
"${check[@]}" "${train[@]}" --dry-run --nodes "$nodes" --processes "$per_node" 2>"$logs/srun" || code=$?
count_start
if [ "$code" != 0 ] && not_launched; then
  cat "$logs/srun" >&2
  [ "$dry" = yes ] || start_again "the check could not be launched"
  exit 71
elif [ "$code" = 75 ]; then # a signal came, as in a run
  cat "$logs/srun" "$logs"/check-*.err 2>/dev/null | tail -n 1 >&2
  if [ "$dry" = no ]; then
    within_restarts || exit 71
    requeue "ended by a signal"
  fi
  exit 75
elif [ "$code" != 0 ]; then
  for task in "${!names[@]}"; do
    grep -qs '^checks  *passed' "$logs/check-$task.log" || bad+=("$task")
  done
  # one line for each fault, with the nodes that have it
  for task in "${bad[@]}"; do
    printf '%s\t%s\n' "${names[task]}" "$(cat "$logs/srun" "$logs/check-$task.err" 2>/dev/null | tail -n 1)"
  done | awk -F'\t' '{nodes[$2] = nodes[$2] " " $1} END {for (fault in nodes) print fault " (on" nodes[fault] ")"}' >&2
  # what some nodes only cannot do is no bad input
  if [ "$dry" = no ] && [ "${#bad[@]}" -lt "$nodes" ] && may_restart &&
    leave_out "$(for task in "${bad[@]}"; do echo "${names[task]}"; done)"; then
    requeue "the check has failed" "$out"
  fi
  exit 2
fi
for task in "${!names[@]}"; do
  if ! difference=$(diff "$logs/check-0.log" "$logs/check-$task.log"); then
    echo "nodes ${names[0]} and ${names[task]} differ: $(grep '^[<>]' <<<"$difference" | paste -sd ' ')" >&2
    exit 2
  fi
done
cat "$logs/check-0.log"
within_restarts || exit 71

# --- one sum over all processes: do they reach each other, and how fast?
sum=("${prefix[@]}" "$python" -m megatron_lcl selftest --all-reduce --timeout "${CHECK_TIMEOUT:-300}")
if [ $((nodes * per_node)) -gt 1 ]; then
  code=0
  "${all[@]}" --wait=30 --output="$pattern/all-reduce.log" "${sum[@]}" 2>"$logs/srun" || code=$?
  if [ "$code" != 0 ]; then
    {
      grep -s -m 1 '^megatron-lcl' "$logs/all-reduce.log" || # which is absent where srun started nothing
        cat "$logs/srun" "$logs/all-reduce.log" 2>/dev/null | tail -n 1
    } >&2
    [ "$dry" = yes ] || ! was_lost "$code" || start_again "the all-reduce has failed"
    exit "$code"
  fi
  cat "$logs/all-reduce.log"
fi
[ "$dry" = no ] || exit 0

# --- the run
trap : TERM # Slurm's TERM reaches the processes too; this script waits until they have saved
code=0
"${run[@]}" 2>"$logs/srun" || code=$?
cat "$logs/srun" >&2
if [ "$code" = 75 ]; then # EX_TEMPFAIL: ended by a signal, saved if it could be; where nothing was, starts add up
  requeue "ended by a signal"
elif [ "$code" != 0 ]; then
  echo "--- $(date -Is): exit code $code; last lines of the processes that say why:" >&2
  for log in "$logs"/rank-*.log; do
    [ -e "$log" ] || continue # where srun started nothing
    last=$(tail -n 1 "$log")
    case $last in megatron-lcl* | *Error*) echo "${log##*/}: $last" ;; esac
  done | head -n 8 >&2
  if was_lost "$code"; then
    # in a step, for only there is a container
    now=$(timeout 600 "${step[@]}" --nodes=1 --nodelist="$SLURMD_NODENAME" --ntasks=1 \
      "${train[@]}" --dry-run --nodes "$nodes" --processes "$per_node" 2>/dev/null | goes_on || true)
    [ -z "$now" ] || [ "$now" = "$from" ] || again=0 # it has saved since
    start_again "exit code $code"
  fi
fi
exit "$code"
