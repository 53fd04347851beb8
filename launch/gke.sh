#!/usr/bin/env bash
# Runs a command of alice_jax on Google Kubernetes Engine: train on one or several TPU slices (v4 to TPU7x), prepare and
# embed as an array of independent tasks.
#
#   launch/gke.sh --name alice --context CONTEXT --bucket BUCKET --accelerator tpu7x --topology 2x2x2 -- \
#     train --config=configs/pretrain.py:pod --config.data.store=/mnt/bucket/store --workdir=/mnt/bucket/runs/alice
#   launch/gke.sh --name prepare --context CONTEXT --bucket BUCKET --tasks 100 -- \
#     prepare --input /mnt/bucket/scans --store /mnt/bucket/store
#
# Creates a JobSet (train) or an indexed Job, and deletes it when the command has ended, failed or was stopped. Nodes
# are the cluster's affair: Autopilot makes them for the pods and removes them; elsewhere node pools stay as they are.
# Pods that fail or are taken away are made again, and the run resumes. The same line again follows what is still there.
#
# Needed:
#   --name NAME           of the JobSet or Job
#   --context CONTEXT     of kubectl, as kubectl config get-contexts names it
#   --bucket BUCKET       of Cloud Storage; every pod sees it as /mnt/bucket
# Choices:
#   --accelerator TYPE    of GKE, such as tpu-v6e-slice, see launch/README.md; none: tasks on CPUs
#   --topology TOPOLOGY   of a slice, such as 4x4
#   --chips N             of each host (4)
#   --slices N            for train (1)
#   --tasks N             for prepare and embed: the scans are divided over so many
#   --parallel N          so many tasks at once (all)
#   --retries N           of the run, or of each task, after a failure or when nodes are taken away (5)
#   --spot                nodes that may be taken away
#   --cpu N               processors that a pod asks for
#   --memory SIZE         such as 16Gi, that a pod asks for
#   --disk SIZE           of its node that a pod may fill: what it installs, copies of a store in a bucket (4Gi)
#   --service-account KSA of Kubernetes, that may use the bucket (default)
#   --image IMAGE         made by launch/Dockerfile, with the code in it; without one, each pod installs the code
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse "$@"
: "${chips:=4}" "${slices:=1}" "${retries:=5}" "${disk:=4Gi}" "${service_account:=default}"
needs_number --chips --slices --retries
needs_tasks
needs_workdir
kubectl=(kubectl --context="$context")
extra='' hosts=1

if [ -n "$accelerator" ]; then
  [[ $topology =~ ^[0-9]+(x[0-9]+)+$ ]] || die "--topology ${topology:-''}: give that of the slice, such as 4x4"
  extra=tpu hosts=$((${topology//x/*} / chips))
  [ $((hosts * chips)) = $((${topology//x/*})) ] ||
    die "--chips $chips: does not divide the chips of --topology $topology"
fi
if [ "$command" = train ]; then
  [ -n "$accelerator" ] || die "--accelerator: needed for train"
  kind=jobset pods=jobset.sigs.k8s.io/jobset-name=$name first=,jobset.sigs.k8s.io/job-index=0
else
  [ "$hosts" = 1 ] || die "--topology $topology: has $hosts hosts; each task of $command has one"
  kind=job pods=batch.kubernetes.io/job-name=$name first=
fi

pod() {
  cat <<END
metadata:
  annotations:
    gke-gcsfuse/volumes: "true"
spec:
  restartPolicy: Never
  serviceAccountName: $service_account
  terminationGracePeriodSeconds: 120 # in which train saves
  nodeSelector:
$({
    entry cloud.google.com/gke-tpu-accelerator "$accelerator"
    entry cloud.google.com/gke-tpu-topology "$topology"
    entry cloud.google.com/gke-spot "${spot:+'"true"'}"
  } | indented 4)
  containers:
  - name: alice-jax
    image: $(container_image)
    command: [bash, -euo, pipefail, -c]
    args:
    - |
$(in_container "$extra" '"$JOB_COMPLETION_INDEX"' "$tasks" | indented 6)
    ports:
    - containerPort: 8471 # between the hosts of a slice
    - containerPort: 8482 # jax.distributed
    resources:
      requests: &resources
$({
    entry cpu "$cpu"
    entry memory "$memory"
    entry ephemeral-storage "$disk"
    entry google.com/tpu "${accelerator:+$chips}"
  } | indented 8)
      limits: *resources
    volumeMounts:
    - {name: bucket, mountPath: /mnt/bucket}
    - {name: shared-memory, mountPath: /dev/shm}
  volumes:
  - name: bucket
    csi:
      driver: gcsfuse.csi.storage.gke.io
      volumeAttributes:
        bucketName: $bucket
        # What one host writes the others see at once.
        mountOptions: implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
  - name: shared-memory
    emptyDir: {medium: Memory}
END
}

manifest() {
  if [ "$kind" = jobset ]; then
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $retries
  replicatedJobs:
  - name: slice
    replicas: $slices
    template:
      spec:
        completions: $hosts
        parallelism: $hosts
        backoffLimit: 0
        template:
$(pod | indented 10)
END
  else
    cat <<END
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
spec:
  completionMode: Indexed
  completions: $tasks
  parallelism: ${parallel:-$tasks}
  backoffLimitPerIndex: $retries
  template:
$(pod | indented 4)
END
  fi
}

# found: its name and the conditions that it meets; nothing if there is none.
found() {
  run "${kubectl[@]}" get "$kind" "$name" --ignore-not-found \
    --output=jsonpath='{.metadata.name} {.status.conditions[?(@.status=="True")].type}'
}

state() {
  local found
  found=$(found) || return
  case $found in
    '') echo gone ;;
    *Fail*) echo failed ;;
    *Complete*) echo succeeded ;;
    *) echo running ;;
  esac
}

logs() {
  run "${kubectl[@]}" logs --selector="$pods$first,batch.kubernetes.io/job-completion-index=0" --follow --tail=20
}

owned=''
clean_up() {
  [ -n "$owned" ] || return 0
  run "${kubectl[@]}" delete "$kind" "$name" --ignore-not-found
}

begin
known=$(found) || die "$name: cannot ask for its state"
owned=1
[ -n "$known" ] || feed "$(manifest)" "${kubectl[@]}" apply --filename=- || {
  owned=''
  die "$name: cannot be created"
}
follow || {
  [ $? = 1 ] || die "$name: was deleted"
  run "${kubectl[@]}" logs --selector="$pods" --prefix --tail=20 || true
  die "$name: failed"
}
