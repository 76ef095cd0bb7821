#!/bin/bash
# Without accelerate's command: torchrun, which comes with torch, on one machine with several GPUs.
#
#   bash examples/launch/torchrun.sh edit --config-name llama3-8b data=FILE.json output=DIR
#
# GPUS=4 takes four of them; on a machine without GPUs it is the number of processes.
set -eu

# torchrun hands Ctrl-C and SIGTERM on and kills after 30 s who has not ended: a step and its
# checkpoint may take longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

exec torchrun --standalone --nproc-per-node="${GPUS:-gpu}" -m locft_easyedit "$@"
