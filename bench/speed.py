"""Tokens per second and peak resident memory, side by side with the Hugging Face Trainer.

    python bench/speed.py
    python bench/speed.py --shapes --batch-size 1 --accumulation 2 --max-length 512 --steps 3

The second line takes random weights at the shapes of Qwen2-0.5B, and examples of exactly 512 tokens.

Both sides train all weights of the same model on the same micro-batches (sample data), float32, the
same threads. The Trainer uses AdamW and gradient checkpointing. Each side runs in a process of its own,
so that its peak resident size is its own; the sides take turns, and the medians over the turns are
compared. The first step of every process is left out of the time: for GaLore it makes every basis. A
tracked basis is made again in each octave of steps (2-3, 4-7, ...) until the first gap is over, so that
a short run has many more refreshes than a long one; "between refreshes" has as many as a long one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.source import resolve_model

sys.path.insert(0, str(Path(__file__).parent))
from shapes import QWEN2_05B, write_data, write_model

SIDES: dict[str, tuple[str, ...]] = {
    "trainer-adamw": (),
    "ours-adamw": ("optimizer.type=adamw",),
    "ours-galore": ("optimizer.type=galore",),
    "ours-galore, between refreshes": ("optimizer.type=galore", "optimizer.galore.subspace=randomized"),
    "ours-galore, full gradients": ("optimizer.type=galore", "optimizer.galore.fast_path=never"),
    "ours-galore, 8-bit state, bf16 weights": ("optimizer.type=galore", "optimizer.state_bits=8", "model.store=bf16"),
}


def load_config_for(arguments: argparse.Namespace, side: str, output: str) -> Any:
    """The run's configuration, the same but for the optimizer and its formats."""
    from sophia_galore.config import load_config

    return load_config(
        Path("configs/quickstart.yaml"),
        [
            f"model.name={arguments.model}",
            *SIDES[side],
            *([f"data.train={arguments.data}"] if arguments.data else []),
            f"training.batch_size={arguments.batch_size}",
            f"training.gradient_accumulation_steps={arguments.accumulation}",
            f"training.max_length={arguments.max_length}",
            f"training.max_steps={arguments.steps}",
            f"training.output_dir={output}",
            "training.warmup_steps=0",
            "training.sample_questions=[]",
            "training.device=cpu",
            "memory.track_steps=0",
            "checkpoint.save_every_steps=0",
            "data.eval_fraction=0",
            "training.eval_every_steps=0",
        ],
    )


def measure(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side here and now."""
    with tempfile.TemporaryDirectory() as folder:
        if side == "trainer-adamw":
            from hf_trainer import TrainerOptions, run_trainer

            measured = run_trainer(load_config_for(arguments, "ours-adamw", folder), TrainerOptions("adamw_torch"))
        else:
            from ours import run_ours

            measured = run_ours(load_config_for(arguments, side, folder))
    tokens, seconds = (sum(values) for values in zip(*measured.steps[1:], strict=True))
    return {"tokens_per_second": tokens / seconds, "peak_process_bytes": float(measured.peak_process_bytes)}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in turns, each in a fresh process."""
    # The Trainer always: it is what the others are compared with.
    sides = [side for side in SIDES if side in (arguments.sides or list(SIDES)[:3]) or side == "trainer-adamw"]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for turn in range(arguments.turns):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            words = [*sys.argv[1:], "--side", side, "--model", arguments.model, "--data", arguments.data]
            done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{side} failed:\n{done.stderr}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}, {side}: {found[side][-1]}", file=sys.stderr, flush=True)
    medians = {
        side: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for side, runs in found.items()
    }
    return {"runs": found, "medians": medians}


def main() -> None:
    """Measure, print a table, and write the numbers if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps a process; the first is not timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--output", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="which sides; by default the first three")
    parser.add_argument("--shapes", action="store_true", help="random weights at the shapes of Qwen2-0.5B")
    parser.add_argument("--data", default="", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    # Here once, so that every process finds the same folder.
    arguments.model = str(resolve_model(ModelConfig(name=arguments.model), print).folder)
    with tempfile.TemporaryDirectory() as work:
        if arguments.shapes:
            folder = Path(work)
            write_model(folder / "model", Path(arguments.model), QWEN2_05B["num_hidden_layers"])
            num_examples = arguments.steps * arguments.accumulation * arguments.batch_size
            write_data(folder / "data.json", Path("data/sample_data.json"), num_examples)
            arguments.model, arguments.data = str(folder / "model"), str(folder / "data.json")
        result = compare(arguments)
    base = result["medians"]["trainer-adamw"]
    print("| side | tokens/s | ratio | peak resident GiB | ratio |\n|---|---|---|---|---|")
    for side, one in result["medians"].items():
        speed, peak = one["tokens_per_second"], one["peak_process_bytes"]
        print(
            f"| {side} | {speed:.1f} | {speed / base['tokens_per_second']:.2f} "
            f"| {peak / 2**30:.2f} | {peak / base['peak_process_bytes']:.2f} |"
        )
    if arguments.output:
        import torch
        import transformers

        about = {
            "date": date.today().isoformat(),
            "command": "python " + " ".join(sys.argv),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {platform.system()}",
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        arguments.output.write_text(json.dumps({**about, **result}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
