"""What checkpoints cost: the share of a run's time that is spent on writing one every so many steps.

    python bench/checkpoints.py --output outputs/checkpoints.json

Trains SmolLM2-135M as `configs/quickstart.yaml` says and times each step and each checkpoint: how long the steps wait
for it, and the processor's time of the thread that completes it beside them. The share counts both, as if that thread
always took its time away from the steps. Run it when nothing else runs: a store beside which something did is marked
as disturbed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from measured import provenance
from quiet import cpu_times, quietness, warn_if_busy
from sophia_galore.config import load_config
from sophia_galore.train.background import Background
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.output import RunOutput
from sophia_galore.train.run import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
STORES: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["model.store=bf16"],
    "int8, 8-bit state": ["quantization.enabled=true", "optimizer.state_bits=8"],
    "fp32, AdamW": ["optimizer.type=adamw"],
}


class _Steps(Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        self.seconds.append(record["tokens"] / record["tokens_per_second"])


def measure(words: list[str], asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train once; return medians of the seconds of steps and checkpoints, and the share of the latter."""
    waited: list[float] = []
    beside: list[float] = []
    save, start = RunOutput.save, Background.start

    def timed_save(*given: Any) -> None:
        begun = time.perf_counter()
        save(*given)
        waited.append(time.perf_counter() - begun)

    def timed_start(self: Background, work: Callable[[], None]) -> None:
        def timed() -> None:
            begun = time.thread_time()
            work()
            beside.append(time.thread_time() - begun)

        start(self, timed)

    steps = _Steps()
    common = [
        f"training.output_dir={folder}",
        f"training.max_steps={asked.steps}",
        f"checkpoint.save_every_steps={asked.every}",
        "training.sample_questions=[]",
        "training.eval_every_steps=0",
        "data.eval_fraction=0",
        "memory.predict=false",
    ]
    with patch.object(RunOutput, "save", timed_save), patch.object(Background, "start", timed_start):
        train(load_config(CONFIG, [*common, *words, *asked.words]), steps)
    step_s, wait_s = statistics.median(steps.seconds[1:]), statistics.median(waited)
    beside_s = statistics.median(beside) if beside else 0.0
    return {
        "step_s": round(step_s, 3),
        "waits_s": round(wait_s, 3),
        "beside_cpu_s": round(beside_s, 3),
        "share": round((wait_s + beside_s) / (wait_s + asked.every * step_s), 4),
        "checkpoint_bytes": sum(f.stat().st_size for f in checkpoints(folder)[-1].rglob("*") if f.is_file()),
    }


def main() -> None:
    """Measure each store, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--stores", nargs="+", choices=STORES, default=list(STORES))
    parser.add_argument("words", nargs="*", help="further settings")
    asked = parser.parse_args()
    found = {}
    warn_if_busy()
    for name in asked.stores:
        begun = cpu_times()
        with tempfile.TemporaryDirectory() as folder:
            found[name] = measure(STORES[name], asked, Path(folder) / "run") | quietness(begun)
        print(name, found[name], flush=True)
        asked.output.write_text(json.dumps(provenance() | {"every": asked.every, "stores": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
