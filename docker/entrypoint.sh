#!/usr/bin/env bash
# k2train with the settings of launch/env.sh, as a container's command.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/env.sh"
exec k2train "$@"
