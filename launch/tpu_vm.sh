#!/usr/bin/env bash
# Runs a command of alice_jax on Cloud TPU VMs: one slice (v4, v5e, v5p, v6e), or several of them (multislice).
#
#   launch/tpu_vm.sh --name alice --project ID --zone ZONE --accelerator-type v5litepod-16 \
#     --runtime-version v2-alpha-tpuv5-lite --bucket BUCKET -- \
#     train --config=configs/pretrain.py:pod --config.data.store=/mnt/bucket/store --workdir=/mnt/bucket/runs/alice
#
# Creates a queued resource and its VMs, and deletes both when the command has ended, failed or was stopped. The same
# line again finds a run that is still there and goes on following it. prepare and embed are divided over the hosts.
#
# Needed:
#   --name NAME               of the queued resource, its nodes and the run
#   --project ID              of Google Cloud
#   --zone ZONE               that has these TPUs
#   --accelerator-type TYPE   such as v4-32, v5litepod-16, v5p-32, v6e-16
#   --runtime-version VERSION of the TPU software; see launch/README.md
#   --bucket BUCKET           of Cloud Storage; every host sees it as /mnt/bucket
# Choices:
#   --node-count N            slices (1)
#   --spot                    cheaper hosts that may be taken away; they are created again and the run resumes
#   --image IMAGE             made by launch/Dockerfile, with the code in it; without one, each host installs the code
#   --create-flags FLAGS      more flags of gcloud compute tpus queued-resources create, such as '--reserved'
set -euo pipefail
source "$(dirname "$0")/common.sh"
parse "$@"
: "${node_count:=1}"
needs_number --node-count
needs_workdir
where=(--project="$project" --zone="$zone")

queue=(gcloud compute tpus queued-resources)

# phase ANSWER: of the queued resource, such as ACTIVE; empty if there is none.
phase() {
  ask "$1" "${queue[@]}" list "${where[@]}" --filter="name~\"/$name\$\"" --format="value(state.state)"
}

# on all|0 TEXT: runs shell text on every host, or on the first one.
on() {
  run "${queue[@]}" ssh "$name" "${where[@]}" --node="$1" --worker="$1" --command="$2" --quiet
}

create() {
  local phase nodes=(--node-id="$name")
  [ "$node_count" = 1 ] || nodes=(--node-count="$node_count" --node-prefix="$name")
  phase=$(phase '') || return
  owned=1
  [ -z "$phase" ] || return 0
  # shellcheck disable=SC2086  # flags are words
  run "${queue[@]}" create "$name" "${where[@]}" "${nodes[@]}" --accelerator-type="$accelerator_type" \
    --runtime-version="$runtime_version" ${spot:+--spot} $create_flags --quiet
}

state() {
  local phase nodes hosts answers ended='{{.State.Running}} {{.State.ExitCode}}'
  phase=$(phase ACTIVE) || return
  case $phase in
    ACTIVE) ;;
    '' | SUSPEND* | DELETING) echo gone && return ;;
    FAILED) echo failed && return ;;
    *) echo waiting && return ;;
  esac
  nodes=$(run gcloud compute tpus tpu-vm list "${where[@]}" --filter="name~\"/$name(-[0-9]+)?\$\"" \
    --format="value(state,networkEndpoints.len())") || return
  case $nodes in
    *PREEMPTED* | *TERMINATED* | *STOPPED*) echo gone && return ;;
  esac
  hosts=$(awk '{ sum += $2 } END { print sum + 0 }' <<<"$nodes")
  answers=$(on all "sudo docker inspect --format='$ended' alice_jax 2>/dev/null || echo none") || return
  # gcloud is content with those hosts that it reaches.
  [ "$hosts" -gt 0 ] && [ "$(grep -cE '^(none|true 0|false [0-9]+)' <<<"$answers")" = "$hosts" ] || return
  case $answers in
    *none*) echo ready ;;
    *true*) echo running ;;
    *"false "[1-9]*) echo failed ;;
    *) echo succeeded ;;
  esac
}

# The container is the detached session: it outlives the connection, keeps its log and its exit code. The bucket is
# mounted so that the others see at once what one host writes.
start() {
  local install_gcsfuse='
  site=https://packages.cloud.google.com/apt
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS $site/doc/apt-key.gpg | sudo tee $key >/dev/null
  echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
  sudo apt-get -q update
  sudo apt-get -qy install gcsfuse'
  on all "set -euo pipefail
if sudo docker inspect alice_jax; then exit; fi >/dev/null 2>&1
if ! command -v gcsfuse >/dev/null; then$install_gcsfuse
fi
sudo mkdir -p /mnt/bucket
mountpoint -q /mnt/bucket || sudo gcsfuse -o allow_other --implicit-dirs \\
  --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 $(quoted "$bucket") /mnt/bucket
cat >/tmp/alice_jax.sh <<'END'
$(divided && in_container tpu '$index' '$count')
END
$([[ $image != *-docker.pkg.dev/* ]] || echo "sudo gcloud auth configure-docker --quiet ${image%%/*}")
sudo docker run --detach --name=alice_jax --stop-timeout=120 --privileged --network=host --ipc=host \\
  --volume=/mnt/bucket:/mnt/bucket --volume=/tmp/alice_jax.sh:/alice_jax.sh:ro $(quoted "$(container_image)") \\
  bash -euo pipefail /alice_jax.sh"
}

# divided: shell text that finds this host's share of the work, from what the TPU software says of the host.
divided() {
  [ "$command" != train ] || return 0
  cat <<END
about=http://metadata.google.internal/computeMetadata/v1/instance/attributes
metadata() { curl -fsS -H Metadata-Flavor:Google "\$about/\$1"; }
hosts=\$(metadata worker-network-endpoints | tr , '\n' | grep -c .)
slice=\$(metadata tpu-env | sed -n "s/^MEGASCALE_SLICE_ID: '\([0-9]*\)'.*/\1/p")
index=\$((\${slice:-0} * hosts + \$(metadata agent-worker-number)))
count=\$((hosts * $node_count))
END
}

logs() { on 0 "sudo docker logs --follow --tail=20 alice_jax"; }

delete() { run "${queue[@]}" delete "$name" "${where[@]}" --force --quiet; }

owned=''
clean_up() {
  [ -n "$owned" ] && [ -n "$(phase ACTIVE)" ] || return 0
  if [ "$1" = 130 ] || [ "$1" = 143 ]; then
    on all "sudo docker stop alice_jax" || true # which saves a checkpoint
  fi
  delete
}

begin
create || die "$name: cannot be created"
while :; do
  result=0
  follow || result=$?
  if [ "$result" = 1 ]; then
    # Where one host is taken away the others fail, and that may be known before the reason.
    sleep $((4 * poll))
    [ "$(state)" != gone ] || result=2
  fi
  if [ "$result" = 2 ]; then
    phase=$(phase ACTIVE) || phase=unknown
    [ -n "$phase" ] || die "$name: was deleted"
    [ -n "$spot" ] || die "$name: its hosts are gone"
    say "$name: its hosts were taken away; creating others, on which the run resumes"
    delete || true
    until create; do sleep "$poll"; done
    continue
  fi
  [ "$result" = 0 ] || on all "sudo docker logs --tail=20 alice_jax" || true
  [ -z "$keep" ] || on all "sudo docker rm alice_jax" || true # for the next command on these hosts
  [ "$result" = 0 ] || die "$name: failed"
  exit
done
