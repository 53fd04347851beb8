# Options of every script:
#   --git-url URL       where the hosts take the code from (git remote get-url origin)
#   --commit COMMIT     which commit of it; push it first (HEAD)
#   --poll SECONDS      between two looks at the state (30)
#   --keep              do not stop or delete anything at the end
#   --dry-run           print every command, run none
# An option may also come from the environment: --node-count from ALICE_JAX_NODE_COUNT.
# Ctrl-C and SIGTERM end the run and delete what was created. Losing the terminal changes nothing: the script goes on,
# and writes all that it says to runs/launch/NAME.log too.

# Sourced by tpu_vm.sh, gke.sh, slurm.sh and batch.sh. The comment at the top of each is its help, and the options named
# there, with those above, are the ones that it takes. For bash 3.2 (macOS) and newer.
# shellcheck shell=bash

launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec 3>&1  # what a dry run prints
showing='' # the process that shows the log

say() { echo "$*" >&2; }

die() {
  say "error: $*"
  exit 1
}

# help_of FILE: the comment at its top.
help_of() { awk '/^#!/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$1"; }

# parse ARGUMENTS: sets node_count for --node-count, and so on; then `command` and the array `arguments` from after --.
parse() {
  local help option variable value
  help=$(help_of "$0" && echo && help_of "$launch/common.sh")
  while read -r option; do
    variable=$(tr a-z- A-Z_ <<<"ALICE_JAX_$option")
    printf -v "${option//-/_}" %s "${!variable:-}"
  done < <(sed -n 's/^  --\([a-z-]*\) .*/\1/p' <<<"$help")
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    option=${1%%=*}
    if [ "$option" = --help ]; then
      echo "$help"
      exit
    elif [[ $option =~ ^--[a-z-]+$ && $help =~ $'\n'"  $option "[A-Z] ]]; then
      if [ "$1" = "$option" ]; then
        [ $# -gt 1 ] || die "$option: give a value"
        shift
      fi
      value=${1#"$option"=}
    elif [[ $1 =~ ^--[a-z-]+$ && $help =~ $'\n'"  $option  " ]]; then
      value=1
    else
      die "$1: not an option; see --help (the command and its arguments come after --)"
    fi
    option=${option#--}
    printf -v "${option//-/_}" %s "$value"
    shift
  done
  command=${2:-}
  arguments=("${@:3}")
  while read -r option; do
    variable=${option//-/_}
    [ -n "${!variable}" ] || die "--$option: needed; see --help"
  done < <(sed -n '/^Needed/,/^[^ ]*$/s/^  --\([a-z-]*\) .*/\1/p' <<<"$help")
  case $command in
    prepare | embed | train) ;;
    *) die "${command:-no command}: give prepare, embed or train after --, with its arguments" ;;
  esac
  [[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || die "--name $name: give at most 40 small letters, digits and -"
  : "${poll:=30}" "${git_url:=$(git -C "$launch" remote get-url origin 2>/dev/null || true)}"
  [ -n "$git_url" ] || die "--git-url: needed, since this copy of the project has no remote called origin"
  [[ $poll =~ ^[0-9]+$ ]] || die "--poll $poll: give a whole number of seconds"
  value=${commit:-HEAD}
  [[ $value =~ ^[0-9a-f]{40}$ ]] || commit=$(git -C "$launch" rev-parse --verify --quiet "$value^{commit}") ||
    die "--commit $value: not known here; give all 40 digits of its hash"
}

# needs_number OPTION...: each is a whole number of 1 or more.
needs_number() {
  local option variable
  for option in "$@"; do
    variable=${option#--}
    variable=${variable//-/_}
    [[ ${!variable} =~ ^[1-9][0-9]*$ ]] || die "$option ${!variable}: give a whole number of 1 or more"
  done
}

# needs_tasks: the number of tasks where work is divided, and none for train, whose processes form one run.
needs_tasks() {
  if [ "$command" != train ]; then
    needs_number --tasks ${parallel:+--parallel}
  elif [ -n "$tasks" ]; then
    die "--tasks $tasks: train is one run of all hosts; leave it out"
  fi
}

# needs_workdir: hosts vanish, the bucket stays.
needs_workdir() {
  [ "$command" != train ] || [[ " ${arguments[*]-} " == *" --workdir"[=\ ]/mnt/bucket/* ]] ||
    die "train: give --workdir=/mnt/bucket/..., where checkpoints outlive the hosts"
}

# ---- What hosts run

# quoted WORD...: the words as one line that a shell reads as the same words.
quoted() {
  local word line='' quote="'" escaped="'\\''"
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] || word=$quote${word//$quote/$escaped}$quote
    line+=" $word"
  done
  echo "${line:1}"
}

# program INDEX COUNT: the command as shell text. INDEX is shell text too, for the host to expand.
program() {
  local words=(python -m "alice_jax.$command" ${arguments[@]+"${arguments[@]}"})
  case $command in
    train) quoted "${words[@]}" --distributed ;;
    *) echo "$(quoted "${words[@]}") --task-index=$1 --task-count=$2" ;;
  esac
}

# code_in DIR: shell text that takes the stated commit to DIR and goes there.
code_in() {
  echo "[ -d $1 ] || git clone --quiet $(quoted "$git_url") $1"
  echo "cd $1"
  echo "git checkout --quiet $commit"
}

container_image() { echo "${image:-python:3.12}"; }

# in_container EXTRA INDEX COUNT: shell text for bash -euo pipefail in a container of that image.
in_container() {
  if [ -z "$image" ]; then
    code_in /alice_jax
    echo "pip install --quiet --root-user-action=ignore --editable '.${1:+[$1]}'"
  fi
  echo "exec $(program "$2" "$3")"
}

# indented N: standard input, N spaces further to the right, for a block of YAML.
indented() { sed "s/^/$(printf "%$1s" '')/"; }

# entry KEY VALUE: a line of YAML, if there is a value.
entry() { [ -z "$2" ] || echo "$1: $2"; }

# ---- Commands, and what they only print in a dry run

# run COMMAND...
run() {
  if [ -n "$dry_run" ]; then quoted "$@" >&3; else "$@"; fi
}

# feed TEXT COMMAND...: with TEXT as its standard input.
feed() {
  if [ -n "$dry_run" ]; then
    printf '%s <<'\''END'\''\n%s\nEND\n' "$(quoted "${@:2}")" "$1" >&3
  else
    "${@:2}" <<<"$1"
  fi
}

# ask ANSWER COMMAND...: what it prints; ANSWER in a dry run.
ask() {
  run "${@:2}" || return
  if [ -n "$dry_run" ]; then echo "$1"; fi
}

# ---- A run, from its start to its end

# begin: from here on the terminal may go, and whatever ends the script calls `clean_up CODE`.
begin() {
  trap 'leave $?' EXIT
  [ -z "$dry_run" ] || return 0
  mkdir -p runs/launch
  trap '' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  exec </dev/null > >(trap '' INT TERM && exec tee -a "runs/launch/$name.log") 2>&1
}

leave() {
  trap - EXIT
  trap '' INT TERM
  if [ -n "$showing" ]; then kill -- "-$showing" 2>/dev/null || true; fi
  if [ -n "$keep" ]; then say "$name: kept"; else clean_up "$1" || say "$name: NOT ALL WAS DELETED; see above"; fi
  exit "$1"
}

# start: what brings the command to hosts that are ready; most engines do it themselves.
start() { :; }

# follow: starts the command and shows the log until it has ended. 0: it succeeded, 1: it failed, 2: its hosts are gone.
# `state` says waiting, ready, running, succeeded, failed or gone, and fails where it cannot know; `logs` shows the log
# for as long as it can.
follow() {
  local now before='' tries=0
  if [ -n "$dry_run" ]; then
    state >/dev/null || true
    start && logs
    return
  fi
  while :; do
    now=$(state) || now="out of reach"
    [ "$now" = "$before" ] || say "$name: $now"
    before=$now
    case $now in
      ready) start || tries=$((tries + 1)) ;;
      running)
        set -m # a process group of its own, which can be ended as a whole, while this one listens to signals
        logs &
        set +m
        showing=$!
        wait "$showing" || true
        ;;
      succeeded)
        [ -n "$showing" ] || logs || true # it was too quick to be seen running
        return 0
        ;;
      failed) return 1 ;;
      gone) return 2 ;;
    esac
    [ "$tries" -lt 5 ] || return 1
    sleep "$poll"
  done
}
