# shellcheck shell=bash
# K2TRAIN_STARTED_BY: how this job was started, which a run that stops prints to be started again.
# The launch scripts source this file before launch/env.sh and call `started_by COMMAND ...`.

# Variables that the user gave stand before the command, as a shell would read them.
started_by() {
  local name settings text=""
  settings=$(sed -n 's/^export \([A-Z_]*\)=.*/\1/p' "$(dirname "${BASH_SOURCE[0]}")/env.sh")
  for name in RANKS HEAD_NODE HEAD_PORT NUM_NODES RUN_ID OMP_NUM_THREADS $settings; do
    if [[ -n "${!name:-}" ]]; then
      text+=$(printf '%s=%q ' "$name" "${!name}")
    fi
  done
  export K2TRAIN_STARTED_BY="$text$*"
}
