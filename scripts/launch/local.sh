#!/usr/bin/env bash
# A verb in several processes on this machine, which work as one, as they would on several machines:
#   scripts/launch/local.sh 2 train configs/seeds/pcam_model4.toml --workdir runs/two
# One process drives all GPUs of a machine by itself; this is for a rehearsal, and for machines of many cores.
set -euo pipefail
count=${1:?how many processes}
verb=${2:?which verb, for example train}
shift 2
python=${PYTHON:-python}
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
set -m # each in a group of its own, so that Ctrl-C reaches them once and through us
processes=()
for ((number = 0; number < count; number++)); do
  JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count JAX_PROCESS_ID=$number \
    "$python" -m "pcam_jax.$verb" "$@" &
  processes+=($!)
done
for signal in INT TERM; do trap "kill -$signal ${processes[*]} 2>/dev/null" "$signal"; done
code=0
for process in "${processes[@]}"; do
  while :; do # a signal ends `wait`, not the process waited for
    ended=0
    wait "$process" || ended=$?
    kill -0 "$process" 2>/dev/null || break
  done
  [ "$code" != 0 ] || code=$ended
done
exit "$code"
