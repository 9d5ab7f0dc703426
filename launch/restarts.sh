# shellcheck shell=bash
# Sourced by slurm.sh: what a job needs to start again, without the nodes that have failed.
# Uses $logs (the job's folder), $nodes (how many the job has) and $max_restarts.

# A task of an array by this name: the last one's SLURM_JOB_ID is the array's number too, which names all of its tasks.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# Where a run would go on, or each run of a sweep, from a dry run's text: one line.
goes_on() { sed -n 's/^run  *//p' "$@" 2>/dev/null | awk '!seen[$0]++' | paste -sd ';'; }

# Counts this start in $again: how often the job was started again from the same checkpoint, $from. Every start counts,
# whatever ended the one before, so that nodes that go down under the job count too, and signals before a first step.
count_start() {
  from=$(goes_on "${logs:?}"/check-*.log)
  # where the check could not be launched, none has said it, and nothing was saved since the last start
  [ -n "$from" ] || from=$(tail -n 1 "$logs/starts" 2>/dev/null || true)
  echo "$from" >>"$logs/starts"
  again=$(($(grep -cxF -e "$from" "$logs/starts") - 1))
}

# Whether the job may start once more; says why not.
may_restart() {
  [ "$again" -ge "${max_restarts:?}" ] || return 0
  echo "--- the job has been started $((again + 1)) times from the same checkpoint (MAX_RESTARTS=$max_restarts)" >&2
  return 1
}

# Whether this start itself is one too many: nodes went down, or signals came, before it could save. Says so.
within_restarts() { [ "$again" -le "$max_restarts" ] || may_restart; }

# Whether another start may go better after this exit code: a process or a machine was lost (71), or a signal ended a
# process, but for Ctrl-C's (130); or srun could not start all. A fault of the program (1) or of its input (2) would
# only happen again.
was_lost() { [ "$1" = 71 ] || { [ "$1" -gt 128 ] && [ "$1" != 130 ]; } || not_launched; }

# Whether srun could not start all tasks, and not for what the job asks for.
not_launched() {
  grep -s 'srun: error: .*\(ailed on node\|Node failure\|Unable to c\(reate step\|onfirm\|ontact\)\)' "$logs/srun" |
    grep -qv 'Unable to .*\(node configuration\|More processors\|Memory required\|Invalid\)'
}

# The nodes that have failed, one a line: as most of the processes say that watched the others, or else as srun does.
failed_nodes() {
  local told
  told=$(cat "$logs"/fault-* 2>/dev/null | sort | uniq -c | sort -rn | sed -n '1s/^ *[0-9]* *//p')
  [ -n "$told" ] || told=$(sed -n "$srun_names" "$logs/srun" | paste -sd ,)
  [ -z "$told" ] || scontrol show hostnames "$told" | sort -u
}
# up to where srun itself ends the others: from there on it reports those, too, as killed
srun_names='/^srun: \(First task exited\|Terminating\|Job step aborted\)/q
s/^srun: error: .*ailed on node \([^ :]*\):.*/\1/p
s/^srun: error: \([^ :]*\): tasks\{0,1\} [^:]*: \(Killed\|Aborted\|Segmentation\|Bus error\|Illegal\|Out Of\).*/\1/p'

# `leave_out NODES` (one a line): sets $out to these and to those that the job leaves out already. 1, with the reason,
# where not enough others are up: a job that cannot start would wait for ever.
leave_out() {
  local already up
  already=$(patiently scontrol show job "$job" | sed -n 's/^.*ExcNodeList=\([^ (]*\).*/\1/p')
  out=$({ [ -z "$already" ] || scontrol show hostnames "$already"; echo "$1"; } | sort -u)
  up=$(patiently sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T' |
    awk '$2 !~ /\*/ && $2 ~ /^(idle|alloc|mix|comp|resv|reserved|plan)/ {print $1}' | sort -u)
  [ "$(comm -23 <(echo "$up") <(echo "$out") | wc -l)" -lt "${nodes:?}" ] || return 0
  echo "--- there are not enough nodes to do without $(paste -sd ' ' <<<"$1")" >&2
  out=
  return 1
}

# `start_again REASON`: back into the queue, if that is still allowed, without the nodes that have failed.
start_again() {
  local failed
  failed=$(failed_nodes)
  [ "$nodes" = 1 ] || [ "$(wc -w <<<"$failed")" != "$nodes" ] || failed= # whose fault was it?
  may_restart || return 0
  [ -z "$failed" ] || leave_out "$failed" || true
  requeue "$1" "$out"
}

# `patiently COMMAND…`: again and again, for ten minutes or more, while it fails because Slurm's controller does not
# answer; 1 where it refuses.
patiently() {
  local tries=0 said
  until { said=$("$@" 2>&1 >&3); } 3>&1; do
    echo "$said" >&2
    [[ ! $said =~ Invalid|disabled|denied ]] && [ $((tries += 1)) -lt 120 ] || return 1
    sleep 5
  done
}

# Asks for it once. A request may have been heard though its answer is lost: the job is not running any more then.
put_back() {
  local state
  scontrol requeue "$job" || { state=$(squeue --noheader --format=%T --jobs="$job") && [ "$state" != RUNNING ]; }
}

# `requeue REASON [NODES]`: back into the queue; the next start is without NODES (one a line).
requeue() {
  local without=${2:-}
  trap '' TERM # which Slurm sends at once
  # a job that was canceled, or that Slurm itself puts back into the queue, is not running any more
  [ "$(patiently squeue --noheader --format=%T --jobs="$job")" = RUNNING ] || return 0
  echo "--- $(date -Is): $1; back into the queue${without:+, without $(paste -sd ' ' <<<"$without")}"
  patiently put_back || return 0
  # Slurm takes this only once the job waits; the script has the cluster's KillWait left for it
  [ -z "$without" ] || until scontrol update "JobId=$job" "ExcNodeList=$(paste -sd , <<<"$without")"; do
    sleep 1
  done
}
