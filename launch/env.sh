# shellcheck shell=bash
# The environment of every rank. launch/torchrun.sh, launch/slurm.sbatch and the container source
# this file, so that a value stands here only. A variable that has a value keeps it. The comment
# above a line is its reason; docs/launch.md names the sources, and the settings that are left alone
# on purpose.

# Experts get another number of rows in every microbatch: a segment that can grow serves them where
# fixed ones fragment.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"

# Loading a kernel on first use may wait for all running kernels, and a posted receive runs until
# its peer has sent.
export CUDA_MODULE_LOADING="${CUDA_MODULE_LOADING:-EAGER}"

# Streams beyond the default 8 queues share one, where a send can end up behind the receive that it
# would answer.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-32}"

# A message's kernel must not queue behind the blocks of a matrix product: another rank waits for
# it.
export TORCH_NCCL_HIGH_PRIORITY="${TORCH_NCCL_HIGH_PRIORITY:-1}"

# torchrun asks for 1, an abort of the communicators, which may itself hang; 3 is torch's own
# default and leaves it out.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}"

# torchrun kills its ranks 30 seconds after a SIGTERM unless told to wait for their step and
# checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-270}"
