"""What weights in eight bits cost in time: whole training steps with them and with fp32 weights, side by side.

    python bench/int8.py
    python bench/int8.py --optimizer adamw --batch-size 4 --max-length 256

Both runs stand in one process, have the same configuration but for the format, and take their steps in turns, so that
whatever else the machine does meets both alike. Shown are the medians over the steps, and of the ratios of steps with
the same number, which have the same tokens. The first step is left out: for GaLore it makes every basis. On a machine
that others use as well, `--cpu-time` disturbs less.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from sides import compare, open_side
from sophia_galore.config import RunConfig, load_config

FORMATS = {"fp32": "quantization.enabled=false", "int8": "quantization.enabled=true"}


def config_of(name: str, folder: str, arguments: argparse.Namespace) -> RunConfig:
    """Return the settings of one side."""
    return load_config(
        Path("configs/quickstart.yaml"),
        [
            f"model.name={arguments.model}",
            f"optimizer.type={arguments.optimizer}",
            f"training.batch_size={arguments.batch_size}",
            f"training.gradient_accumulation_steps={arguments.accumulation}",
            f"training.max_length={arguments.max_length}",
            f"training.max_steps={arguments.steps}",
            f"training.device={arguments.device}",
            f"training.output_dir={folder}/{name}",
            "training.warmup_steps=0",
            "training.probe_step=false",
            "training.sample_questions=[]",
            "training.eval_every_steps=0",
            "data.eval_fraction=0",
            "data.max_eval_examples=null",
            "memory.predict=false",
            "memory.track_steps=0",
            FORMATS[name],
        ],
    )


def main() -> None:
    """Measure, and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--optimizer", default="galore")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu-time", action="store_true", help="count the processor's time, with one thread")
    arguments = parser.parse_args()
    if arguments.threads or arguments.cpu_time:
        torch.set_num_threads(arguments.threads or 1)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = {name: open_side(config_of(name, folder, arguments), stack, clock) for name in FORMATS}
        print(json.dumps({"device": arguments.device, **compare(sides, arguments.steps, stack)}))


if __name__ == "__main__":
    main()
