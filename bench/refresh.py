"""What making bases costs: its share of a step's time, and how long the longest step is.

    python bench/refresh.py
    python bench/refresh.py --shapes --batch-size 1 --accumulation 1 --max-length 512 --steps 6

Takes the first steps of a run, when all bases are new, and then steps of the second gap, when each is
refreshed once in `update_proj_gap` (200) steps: which bases are made at a step is a function of its
number alone, so the steps between need not be taken. The second line takes random weights at the
shapes of Qwen2-0.5B.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from optimizers import assemble
from shapes import write_data, write_model


def measure(subspace: str, model: str, data: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Times of the first steps and of those in the second gap, and the part of them that refreshes took."""
    from sophia_galore.config import load_config
    from sophia_galore.data.feed import Feed
    from sophia_galore.data.portion import whole
    from sophia_galore.optim import optimizer

    words = [
        f"model.name={model}",
        *([f"data.train={data}"] if data else []),
        f"training.batch_size={arguments.batch_size}",
        f"training.gradient_accumulation_steps={arguments.accumulation}",
        f"training.max_length={arguments.max_length}",
        "training.sample_questions=[]",
        "training.warmup_steps=0",
        "training.device=cpu",
        f"optimizer.galore.subspace={subspace}",
    ]
    prepared, _, stepper = assemble(load_config(Path("configs/quickstart.yaml"), words))
    refresh, spent = optimizer.refresh, []

    def timed(*given: Any) -> None:
        started = time.perf_counter()
        refresh(*given)
        spent[-1] += time.perf_counter() - started

    batches = Feed.of(prepared.config, prepared.dataset.train, prepared.tokenizer.pad_token_id).step(1)
    optimizer.refresh = timed  # type: ignore[assignment]
    seconds = {}
    try:
        # The first step of a process is slower for other reasons too: it is taken twice, and counted the second time.
        for step in (1, *range(1, arguments.steps + 1), *range(201, 201 + arguments.steps)):
            spent.append(0.0)
            started = time.perf_counter()
            stepper.take(whole(batches), step=step, factor=0.0)
            seconds[step] = (time.perf_counter() - started, spent[-1])
    finally:
        optimizer.refresh = refresh
    late = [taken for step, taken in seconds.items() if step > 200]
    median = statistics.median(total for total, _ in late)
    return {
        "median_step_s": median,
        "refresh_share": sum(part for _, part in late) / sum(total for total, _ in late),
        "longest_of_late": max(total for total, _ in late) / median,
        "first_step": seconds[1][0] / median,
        "longest_of_first": max(total for step, (total, _) in seconds.items() if step < 200) / median,
    }


def main() -> None:
    """Measure each kind of basis, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shapes", action="store_true", help="random weights at the shapes of Qwen2-0.5B")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8, help="steps at the beginning, and as many in the second gap")
    parser.add_argument("--subspaces", nargs="+", default=["tracked", "randomized", "svd"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model, data = arguments.model, ""
        if arguments.shapes:
            from sophia_galore.config.schema import ModelConfig
            from sophia_galore.model.source import resolve_model

            tokenizer = resolve_model(ModelConfig(name=model), print).folder
            model, data = f"{work}/model", f"{work}/data.json"
            write_model(Path(model), tokenizer)
            write_data(Path(data), Path("data/sample_data.json"), arguments.batch_size * arguments.accumulation + 1)
        print(
            "| basis | median step s | refreshes, share of a step at gap 200 | longest / median | first step / median |"
        )
        print("|---|---|---|---|---|")
        for subspace in arguments.subspaces:
            one = measure(subspace, model, data, arguments)
            longest = max(one["longest_of_late"], one["longest_of_first"])
            print(
                f"| {subspace} | {one['median_step_s']:.2f} | {one['refresh_share']:.2%} | {longest:.2f} "
                f"| {one['first_step']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
