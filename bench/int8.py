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
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sophia_galore.config import load_config
from sophia_galore.engine.determinism import repeatable
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.train.callback import Callback
from sophia_galore.train.load import load
from sophia_galore.train.prepare import prepare
from sophia_galore.train.prepared import Loaded
from sophia_galore.train.signals import StopRequest

FORMATS = {"fp32": "quantization.enabled=false", "int8": "quantization.enabled=true"}


@dataclass
class Side:
    """A loaded run, and what was measured of it.

    Args:
        loaded: The run.
        clock: Returns seconds.
        seconds: Of each step.
        losses: Of each step.
    """

    loaded: Loaded
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def take(self, step: int) -> int:
        """Take a step; return the number of its tokens."""
        batches = self.loaded.feed.step(step)
        begun = self.clock()
        result, _ = self.loaded.stepper.take(batches, step=step, factor=1.0)
        if self.loaded.prepared.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(self.clock() - begun)
        self.losses.append(result.loss)
        return result.num_tokens


def open_side(name: str, folder: str, arguments: argparse.Namespace, stack: ExitStack) -> Side:
    """Load a run; its monitor stays entered until the stack is closed."""
    config = load_config(
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
    prepared = prepare(config, Callback(), None)
    monitor = stack.enter_context(MemoryMonitor(prepared.device, config.memory))
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    return Side(load(prepared, monitor, Callback(), StopRequest()), clock)


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
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sides = {name: open_side(name, folder, arguments, stack) for name in FORMATS}
        stack.enter_context(repeatable(next(iter(sides.values())).loaded.prepared.device))
        tokens: list[int] = []
        for step in range(1, arguments.steps + 1):
            taken = {side.take(step) for side in sides.values()}
            assert len(taken) == 1, "both have the same examples"
            tokens.extend(taken)
    speeds = {name: [n / s for n, s in zip(tokens, side.seconds, strict=True)][1:] for name, side in sides.items()}
    ratios = [int8 / fp32 for fp32, int8 in zip(*speeds.values(), strict=True)]
    print(
        json.dumps(
            {
                "device": arguments.device,
                "threads": torch.get_num_threads(),
                "tokens a second": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
                "int8 / fp32": round(statistics.median(ratios), 3),
                "from, to": [round(min(ratios), 3), round(max(ratios), 3)],
                "losses": {name: side.losses for name, side in sides.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
