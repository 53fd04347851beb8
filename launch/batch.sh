#!/usr/bin/env bash
# Runs prepare or embed as an array of tasks on Google Batch, each on a virtual machine of its own.
#
#   launch/batch.sh --name prepare --project ID --location REGION --machine-type n2-standard-8 --bucket BUCKET \
#     --tasks 100 --spot -- prepare --input /mnt/bucket/scans --store /mnt/bucket/store
#
# Creates a Batch job, which makes its machines and removes them when no task is left, and deletes the job when it has
# ended or was stopped. A task that fails or whose machine is taken away is tried again. The same line again follows a
# job that is still there.
#
# Needed:
#   --name NAME           of the job
#   --project ID          of Google Cloud
#   --location REGION     of the machines
#   --machine-type TYPE   such as n2-standard-8
#   --bucket BUCKET       of Cloud Storage; every task sees it as /mnt/bucket
#   --tasks N             the scans are divided over so many
# Choices:
#   --parallel N          so many tasks at once (all)
#   --retries N           of each task (3)
#   --cpu-milli N         thousandths of a processor that a task may count on (what Batch takes: 2000)
#   --memory-mib N        the same for memory (2000)
#   --spot                cheaper machines that may be taken away
#   --image IMAGE         made by launch/Dockerfile, with the code in it; without one, each task installs the code
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse "$@"
: "${retries:=3}"
[ "$command" != train ] || die "train: give prepare or embed; for train see tpu_vm.sh, gke.sh and slurm.sh"
needs_number --retries
needs_tasks
jobs=(gcloud batch jobs)
where=(--project="$project" --location="$location")

job() {
  cat <<END
taskGroups:
- taskCount: $tasks
  parallelism: ${parallel:-$tasks}
  taskCountPerNode: 1
  taskSpec:
    maxRetryCount: $retries
    computeResource:
$({
    entry cpuMilli "$cpu_milli"
    entry memoryMib "$memory_mib"
  } | indented 6)
    volumes:
    - gcs: {remotePath: $bucket}
      mountPath: /mnt/disks/bucket
      mountOptions: [--implicit-dirs]
    runnables:
    - container:
        imageUri: $(container_image)
        volumes: ["/mnt/disks/bucket:/mnt/bucket:rw"]
        entrypoint: bash
        commands:
        - -euo
        - pipefail
        - -c
        - |
$(in_container "" '"$BATCH_TASK_INDEX"' "$tasks" | indented 10)
allocationPolicy:
  instances:
  - policy:
      machineType: $machine_type
      provisioningModel: $([ -n "$spot" ] && echo SPOT || echo STANDARD)
logsPolicy:
  destination: CLOUD_LOGGING
END
}

# phase ANSWER: of the job, such as RUNNING; empty if there is none.
phase() { ask "$1" "${jobs[@]}" list "${where[@]}" --filter="name~\"/$name\$\"" --format="value(status.state)"; }

state() {
  local phase
  phase=$(phase RUNNING) || return
  case $phase in
    SUCCEEDED) echo succeeded ;;
    FAILED) echo failed ;;
    RUNNING) echo running ;;
    '' | *DELETION* | *CANCEL*) echo gone ;;
    *) echo waiting ;;
  esac
}

# a_minute_ago: by GNU's date or that of macOS.
a_minute_ago() { date -u -d '1 minute ago' +%FT%TZ 2>/dev/null || date -u -v-1M +%FT%TZ; }

# logs: what the tasks say, for as long as any runs. A line may appear seconds late: each question goes back to a minute
# before the last one, and the last of all waits. An insertId in front tells what is new from what was shown.
logs() {
  local uid phase next since=1970-01-01T00:00:00Z shown='' lines
  uid=$(ask UID "${jobs[@]}" describe "$name" "${where[@]}" --format="value(uid)")
  while :; do
    phase=$(phase '')
    [ "$phase" = RUNNING ] || run sleep "$poll"
    next=$(a_minute_ago)
    lines=$(run gcloud logging read "labels.job_uid=\"$uid\" AND timestamp>=\"$since\"" --project="$project" \
      --order=asc --format="value(insertId,labels.task_id,textPayload)")
    grep -vxF -f <(echo && echo "$shown") <<<"$lines" | cut -f2- || true
    [ "$phase" = RUNNING ] || return 0
    since=$next shown=$lines
    sleep "$poll"
  done
}

owned=''
clean_up() {
  [ -n "$owned" ] && [ -n "$(phase RUNNING)" ] || return 0
  run "${jobs[@]}" delete "$name" "${where[@]}" --quiet
}

begin
known=$(phase '') || die "$name: cannot ask for its state"
owned=1
[ -n "$known" ] || feed "$(job)" "${jobs[@]}" submit "$name" "${where[@]}" --config=-
follow || {
  logs || true
  die "$name: failed"
}
