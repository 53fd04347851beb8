#!/usr/bin/env bash
# Runs a command of alice_jax on a Slurm cluster: train as one job with a process for each GPU, prepare and embed as a
# job array. To be started on a login node.
#
#   launch/slurm.sh --name alice --folder /shared/alice --nodes 4 --gpus-per-node 8 \
#     --sbatch-flags '--time=24:00:00' -- \
#     train --config=configs/pretrain.py:pod --config.data.store=/shared/store --workdir=/shared/runs/alice
#   launch/slurm.sh --name prepare --folder /shared/alice --tasks 100 -- \
#     prepare --input /shared/scans --store /shared/store
#
# Submits one job, shows its log and cancels it if this script is stopped. What it installs in the folder stays. Two
# minutes before its time ends, train saves and stops; the same line again resumes, once no other job of yours has this
# name.
#
# Needed:
#   --name NAME            of the job
#   --folder DIR           that all nodes see: code and environment of each commit, and logs, go there
# Choices:
#   --nodes N              for train (1)
#   --gpus-per-node N      for train, or for each task (none)
#   --tasks N              for prepare and embed: the scans are divided over so many
#   --parallel N           so many tasks at once (all)
#   --sbatch-flags FLAGS   more flags, such as '--partition=gpu --account=me --cpus-per-task=8'
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse "$@"
: "${nodes:=1}"
needs_number --nodes ${gpus_per_node:+--gpus-per-node}
needs_tasks
[[ $folder == /* ]] || die "--folder $folder: give it from the root, as all nodes see it"

code=$folder/$commit
flags=(--wait --parsable --job-name="$name" --requeue --open-mode=append
  ${gpus_per_node:+--gpus-per-node="$gpus_per_node"})
if [ "$command" = train ]; then
  # JAX takes from Slurm which process it is, and then one GPU for each.
  # Two jobs of one name would write the same checkpoints, where an earlier one outlived its script.
  flags+=(--nodes="$nodes" --ntasks-per-node="${gpus_per_node:-1}" --signal=TERM@120 --dependency=singleton
    --output="$folder/logs/$name-%j.log")
  # Slurm 22.05 and newer hand --cpus-per-task to the job, but no longer from there to srun.
  step="[ -z \"\${SLURM_CPUS_PER_TASK:-}\" ] || export SRUN_CPUS_PER_TASK=\$SLURM_CPUS_PER_TASK
srun --kill-on-bad-exit=1 $(program)"
  first=
else
  flags+=(--array="0-$((tasks - 1))${parallel:+%$parallel}" --output="$folder/logs/$name-%A_%a.log")
  step="exec $(program '"$SLURM_ARRAY_TASK_ID"' "$tasks")"
  first=_0
fi

job='' scratch=$(mktemp -d)
clean_up() {
  rm -rf "$scratch"
  [ -z "$job" ] || run scancel "$job"
}

state() {
  if [ ! -s "$scratch/code" ]; then
    echo running
  elif [ "$(cat "$scratch/code")" = 0 ]; then
    echo succeeded
  else
    echo failed
  fi
}

logs() { run tail --pid="$waiting" -n +1 -F "$folder/logs/$name-$job$first.log"; }

begin
run bash -euo pipefail -c "mkdir -p $(quoted "$folder/logs")
$(code_in "$(quoted "$code")")
source launch/environment.sh
make_environment '${gpus_per_node:+cuda}'"

{
  result=0
  # Prints the job's number at once, and ends with the job and its exit code.
  # shellcheck disable=SC2086  # flags are words
  feed "#!/usr/bin/env bash
set -euo pipefail
cd $(quoted "$code")
export PATH=\$PWD/.venv/bin:\$PATH
$step" sbatch "${flags[@]}" $sbatch_flags >"$scratch/job" || result=$?
  echo "$result" >"$scratch/code"
} &
waiting=$!
until [ -s "$scratch/job" ] || [ -s "$scratch/code" ]; do sleep 1; done
job=$(cut -d';' -f1 "$scratch/job")
if [ -n "$dry_run" ]; then job=JOB waiting=PID; fi
[ -n "$job" ] || die "$name: was not submitted"
result=0
follow || result=$?
if [ "$result" != 0 ]; then
  tail -n 20 "$folder/logs/$name-$job"*.log || true
  die "$name: failed; the logs are in $folder/logs"
fi
[ -n "$dry_run" ] || job=''
