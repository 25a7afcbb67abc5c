#!/usr/bin/env bash
# Installs k2train step by step. Each step is a layer of docker/Dockerfile;
# tests/architecture/test_docker.py runs those that need neither root nor a GPU in a fresh
# environment, so that a step that cannot work is found without docker.
#
#   docker/install.sh system        packages of Debian or Ubuntu, as root
#   docker/install.sh torch         the pinned torch
#   docker/install.sh project       k2train and what it needs
#   docker/install.sh extras gpu    optional packages, built against the torch that is there
#
# The steps with pip use the pip of the environment that is active. PIP_ARGS adds words where
# k2train is installed.
set -euo pipefail
SOURCES=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -ra PIP_ARGS <<<"${PIP_ARGS:-}"

# NCCL opens libibverbs and the vendor's provider at run time; without them it falls back to TCP.
# DeepEP and UCX also want librdmacm, whose library package has another name in every release: the
# -dev package brings the right one. ibverbs-utils shows the devices (ibv_devinfo), numactl the NUMA
# nodes; the rest builds the optional packages.
system() {
  apt-get update
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
    python3 python3-dev python3-venv git build-essential \
    libibverbs1 ibverbs-providers librdmacm-dev ibverbs-utils numactl
  rm -rf /var/lib/apt/lists/*
}

install() {
  pip install --constraint "$SOURCES/constraints.txt" "$@"
}

project() {
  install "${PIP_ARGS[@]}" "$SOURCES"
}

# transformer-engine builds against the torch that is there; in an isolated build pip would fetch
# one of its own. Without isolation pip builds k2train anew, too, and fetches no build tools: all of
# them must be there before.
extras() {
  install hatchling setuptools wheel pybind11 ninja
  install "${PIP_ARGS[@]}" --no-build-isolation "${SOURCES}[$1]"
}

case "${1:-}" in
  system) system ;;
  torch) install torch ;;
  project) project ;;
  extras) extras "${2:?the names of the extras, for example gpu}" ;;
  *)
    echo "usage: docker/install.sh system | torch | project | extras NAMES" >&2
    exit 2
    ;;
esac
