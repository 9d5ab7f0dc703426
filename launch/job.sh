# shellcheck shell=bash
# Sourced by slurm.sh in a job, with $told: what `scontrol show job` says of it. sbatch passes on the variables of the
# job or step in which it is called, and the new job's sruns and `train --sweep` would obey them. So what this job is
# comes from scontrol, and what it does not have is unset.

# `of_job FIELD`: a field of this job, or nothing. By an array's number scontrol shows all of its tasks.
of_job() {
  awk -v RS= -v job="JobId=$SLURM_JOB_ID" -v field="$1=" '
    $1 == job {for (i = 1; i <= NF; i++) if (index($i, field) == 1) {print substr($i, length(field) + 1); exit}}
  ' <<<"${told:?}"
}

unset "${!SLURM_ARRAY_@}"
SLURM_ARRAY_JOB_ID=$(of_job ArrayJobId)
if [ -n "$SLURM_ARRAY_JOB_ID" ]; then
  SLURM_ARRAY_TASK_ID=$(of_job ArrayTaskId)
  export SLURM_ARRAY_JOB_ID SLURM_ARRAY_TASK_ID
else
  unset SLURM_ARRAY_JOB_ID
fi

unset "${!SLURM_NTASKS_PER_@}"
SLURM_NTASKS_PER_NODE=$(of_job NtasksPerN:B:S:C) # tasks a node, board, socket and core; 0: not given
SLURM_NTASKS_PER_NODE=${SLURM_NTASKS_PER_NODE%%:*}
if [[ $SLURM_NTASKS_PER_NODE =~ ^[1-9] ]]; then export SLURM_NTASKS_PER_NODE; else unset SLURM_NTASKS_PER_NODE; fi

# a binding that sbatch was given cannot be told from one of the job or step in which it was called
unset "${!SLURM_CPU_BIND@}" "${!SLURM_MEM_BIND@}" SLURM_TRES_BIND
# a step that asks for no memory has all of the job's; of GPUs it is to have all that the job has, which may be other
# than sbatch was asked for: more with --exclusive, fewer where --gres=gpu:N stood beside the scripts' --gpus-per-node.
# But who asks for 0 wants none
[ "${SLURM_GPUS_PER_NODE:-}" != 0 ] || unset SLURM_GPUS_ON_NODE
gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-}}
unset "${!SLURM_MEM_PER_@}" SLURM_GPUS "${!SLURM_GPUS_PER_@}" SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK
[ -z "$gpus" ] || export SLURM_GPUS_PER_NODE=$gpus
