#!/bin/sh
# Two processes on this machine train one model; the curve is that of one process; with
# distributed.sum_blocks=2 for both, to the bit.
#
#     sh examples/torchrun_two_processes.sh --config configs/quickstart.yaml training.max_steps=4
set -e
PYTHON=${PYTHON:-python}
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" -m sophia_galore train "$@"
