"""Tokens a second on short examples: padded micro-batches, grouped ones and packed rows, side by side.

    python bench/packing.py
    python bench/packing.py --threads 2 --turns 5 --output FILE
    python bench/packing.py --tenth

The last line takes a tenth of the model (3 layers at its shapes, a tenth of its words, random weights) and 24 examples,
and counts the processor's seconds of one thread in forward and backward alone: that says something on a machine that is
busy with other work.

Each side is the ordinary run (AdamW, float32, CPU) over the same examples of 20 to 200 tokens, about as many of them in
each optimizer step. Tokens are those of the examples: padding does not count. Each side runs in a process of its own;
the sides take turns, and the medians over the turns are compared. The first step of every process is left out. Beside
the time that went by stands the processor's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sophia_galore.config import load_config
from sophia_galore.config.schema import ModelConfig
from sophia_galore.memory.report import peak_process_bytes
from sophia_galore.model.source import resolve_model
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train

SHORTEST, LONGEST = 20, 200
NUM_EXAMPLES = 400
# By name: micro-batches and what is different. A step has 32 examples, or rows that hold as many.
SIDES: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "padded, 8 x 4 examples": (4, 8, ()),
    "one by one, 32 x 1 example": (1, 32, ()),
    "grouped by length, 8 x 4 examples": (4, 8, ("data.group_by_length=true",)),
    "packed, 7 x 1 row of 512": (1, 7, ("data.packing=true",)),
    "packed, 2 x 4 rows of 512": (4, 2, ("data.packing=true",)),
}


def write_data(path: Path, tokenizer: Path) -> None:
    """Texts of random words, of lengths that are drawn evenly."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    draw = random.Random(0)
    known = [word.replace("Ġ", " ") for word in words.get_vocab() if word.startswith("Ġ") and word[1:].isalpha()]
    known.sort()
    texts = ["".join(draw.choices(known, k=draw.randint(SHORTEST, LONGEST) - 1)) for _ in range(NUM_EXAMPLES)]
    path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")


class _Times(Callback):
    """Tokens, seconds and seconds of the processor so far, when each step is done."""

    def __init__(self) -> None:
        self.done: list[tuple[int, float, float]] = []
        self.peak_process_bytes = 0

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        tokens = record["tokens"] + (self.done[-1][0] if self.done else 0)
        self.done.append((tokens, time.perf_counter(), time.process_time()))
        self.peak_process_bytes = peak_process_bytes()


def measure(side: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Run one side here and now."""
    import torch

    torch.set_num_threads(arguments.threads)
    batch_size, accumulation, words = SIDES[side]
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            None,
            [
                f"model.name={arguments.model}",
                f"data.train={arguments.data}",
                f"training.output_dir={folder}/run",
                f"training.batch_size={batch_size}",
                f"training.gradient_accumulation_steps={accumulation}",
                f"training.max_steps={arguments.steps}",
                "training.max_length=512",
                "training.device=cpu",
                "training.probe_step=false",
                "optimizer.type=adamw",
                "data.eval_fraction=0",
                "memory.track_steps=0",
                "memory.predict=false",
                *words,
            ],
        )
        times = _Times()
        train(config, times)
        plan = json.loads((Path(folder) / "run" / "plan.json").read_text(encoding="utf-8"))
    tokens, seconds, cpu_s = (last - first for first, last in zip(times.done[0], times.done[-1], strict=True))
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_cpu_second": tokens / cpu_s,
        "fill": plan["fill"],
        "tokens_per_step": tokens / (len(times.done) - 1),
        "peak_process_bytes": float(times.peak_process_bytes),
    }


def measure_tenth(turns: int) -> None:
    """Print tokens a second of the processor for each side, turn by turn."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sophia_galore.data.example import Example
    from sophia_galore.data.feed import Feed
    from sophia_galore.engine.layerwise import LayerwiseEngine
    from sophia_galore.model.skeleton import build_skeleton
    from sophia_galore.weights.store import WeightStore

    torch.set_num_threads(1)
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shapes, num_hidden_layers=3, vocab_size=4915, tie_word_embeddings=True)
    torch.manual_seed(0)
    weights = dict(LlamaForCausalLM(config).named_parameters())
    store = WeightStore({name: weight.detach() for name, weight in weights.items()})
    cpu = torch.device("cpu")
    engine = LayerwiseEngine(build_skeleton(config, cpu), store, compute_dtype=torch.float32, device=cpu, seed=0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (24,)).tolist()
    examples = [Example.of(torch.randint(4915, (length,)).tolist(), [True] * length, "") for length in lengths]
    for turn in range(turns):
        for side, (batch_size, _, words) in SIDES.items():
            sizes = [f"training.batch_size={batch_size}", "training.gradient_accumulation_steps=24"]
            feed = Feed.of(load_config(None, [*sizes, *words]), examples)
            batches, started = feed.step(1), time.process_time()
            found = engine.step(batches, lambda grads: None, step=1)
            speed = found.num_tokens / (time.process_time() - started)
            print(f"turn {turn + 1}, {side}: {feed.fill:.0%} full, loss {found.loss:.6f}, {speed:.0f} tokens/CPU s")


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides in turns, each in a fresh process."""
    # The first one always: it is what the others are compared with.
    sides = [
        side for number, side in enumerate(SIDES) if number in (arguments.sides or range(len(SIDES))) or not number
    ]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    threads = {"OMP_NUM_THREADS": str(arguments.threads)}
    for turn in range(arguments.turns):
        for side in sides[turn % len(sides) :] + sides[: turn % len(sides)]:
            words = [*sys.argv[1:], "--side", side, "--model", arguments.model, "--data", arguments.data]
            command = [sys.executable, __file__, *words]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | threads)
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
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps a process; the first is not timed")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--sides", nargs="+", type=int, help="which of the sides beside the first one, by number from 0"
    )
    parser.add_argument("--output", type=Path, help="write the numbers here, as JSON")
    parser.add_argument("--tenth", action="store_true", help="a tenth of the model, by the processor's seconds")
    parser.add_argument("--data", default="", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments)))
        return
    if arguments.tenth:
        measure_tenth(arguments.turns)
        return
    # Here once, so that every process finds the same folder.
    arguments.model = str(resolve_model(ModelConfig(name=arguments.model), print).folder)
    with tempfile.TemporaryDirectory() as work:
        arguments.data = str(Path(work) / "data.json")
        write_data(Path(arguments.data), Path(arguments.model))
        result = compare(arguments)
    base = next(iter(result["medians"].values()))
    print("| arrangement | full | tokens a step | tokens/s | least to most | ratio | tokens/CPU s | ratio | peak GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for side, one in result["medians"].items():
        speeds = [run["tokens_per_second"] for run in result["runs"][side]]
        speed, cpu = one["tokens_per_second"], one["tokens_per_cpu_second"]
        print(
            f"| {side} | {one['fill']:.1%} | {one['tokens_per_step']:.0f} | {speed:.1f} "
            f"| {min(speeds):.1f} to {max(speeds):.1f} | {speed / base['tokens_per_second']:.2f} "
            f"| {cpu:.1f} | {cpu / base['tokens_per_cpu_second']:.2f} | {one['peak_process_bytes'] / 2**30:.2f} |"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
