"""What formats of the weights cost: eval loss, memory and time of the same run with each of them.

    python bench/weights.py --output bench/results/weights.jsonl
    python bench/weights.py --output bench/results/weights.jsonl --table

Fine-tunes SmolLM2-135M on the sample data by the ordinary command, once for every variant and seed: the same
examples in the same order, the same held-out ones. Each result is a line of the output, written when it is there;
what the file holds already is not run again. Where weights are int8, the codes of the last checkpoint are compared
with those that training began with: a tensor that has not changed was not trained.
Times a step are medians within a run; where the machine does other things too, compare them with care.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

_INT8 = "quantization.load_in_8bit=true"
# What differs from the quickstart, by name.
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp32": ("model.store=fp32",),
    "int8": (_INT8,),
    "int8, rounded to nearest": (_INT8, "quantization.rounding=nearest"),
    "bitsandbytes, frozen": (_INT8, "quantization.backend=bitsandbytes"),
    "int8, state in 16 bits": (_INT8, "optimizer.state_bits=16"),
    "int8, state in 8 bits, folded at refreshes": (_INT8, "optimizer.state_bits=8", "quantization.fold=refresh"),
    "int8, state in 8 bits": (_INT8, "optimizer.state_bits=8"),
    "int8, a scale a row": (_INT8, "quantization.block_size=0"),
    "bf16": ("model.store=bf16",),
}


def settings(variant: str, seed: int, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The run's overrides of the quickstart."""
    return [
        f"model.name={arguments.model}",
        *VARIANTS[variant],
        f"training.seed={seed}",
        f"training.output_dir={folder}",
        f"training.max_steps={arguments.steps}",
        "training.warmup_steps=3",
        "training.batch_size=3",
        "training.gradient_accumulation_steps=2",
        f"training.max_length={arguments.max_length}",
        "training.eval_every_steps=0",
        "training.sample_questions=[]",
        "training.device=cpu",
        f"data.max_eval_examples={arguments.eval_examples}",
        # So that the steps include what happens once a gap: a tenth of the quickstart's.
        "optimizer.galore.update_proj_gap=20",
        f"checkpoint.save_every_steps={arguments.steps}",
    ]


def run(variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train once in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "run"
        command = [sys.executable, "-m", "sophia_galore", "train", "--config", "configs/quickstart.yaml"]
        done = subprocess.run(
            [*command, *settings(variant, seed, arguments, folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{variant}, seed {seed}: {done.stdout[-2000:]}{done.stderr}")
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        evals = [line["eval_loss"] for line in lines if "eval_loss" in line]
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        memory = json.loads((folder / "memory_report.json").read_text(encoding="utf-8"))
        return {
            "variant": variant,
            "seed": seed,
            "eval_loss_before": evals[0],
            "eval_loss": evals[-1],
            "trained_fraction": plan["num_trained_parameters"] / plan["num_parameters"],
            "bytes": plan["bytes"],
            "peak_allocated_bytes": memory["peak_allocated_bytes"],
            "peak_process_bytes": memory["peak_process_bytes"],
            "median_step_s": round(statistics.median(line["tokens"] / line["tokens_per_second"] for line in steps), 3),
            "tokens": sum(line["tokens"] for line in steps),
            "train_losses": [round(line["loss"], 4) for line in steps],
            **moved(folder / f"checkpoint-{arguments.steps}", Path(plan["model_folder"])),
        }


def moved(checkpoint: Path, model: Path) -> dict[str, Any]:
    """How many int8 tensors of a checkpoint differ from the model that training began with, and how many codes."""
    from sophia_galore.weights.int8 import Int8Weight, quantise
    from sophia_galore.weights.saved import read_weights

    begun = {name: weight for _, name, weight in read_weights(model)}
    tensors, changed, codes, changed_codes = 0, 0, 0, 0
    for _, name, held in read_weights(checkpoint):
        weight = held.settled
        if isinstance(weight, Int8Weight):
            different = weight.codes != quantise(begun[name].values(torch.float32), weight.form).codes
            tensors, codes = tensors + 1, codes + different.numel()
            changed, changed_codes = changed + bool(different.any()), changed_codes + int(different.sum())
    if not tensors:
        return {}
    return {"int8_tensors": tensors, "int8_tensors_changed": changed, "codes_changed": changed_codes / codes}


def table(results: list[dict[str, Any]]) -> str:
    """A row a variant: means over the seeds, and how far above fp32 at the same seeds."""
    runs: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        runs[result["variant"]][result["seed"]] = result
    lines = [
        "| weights | trained | eval loss, by seed | mean against fp32 | weights + state MB | peak allocated MB |",
        "|---|---|---|---|---|---|",
    ]
    for variant, by_seed in runs.items():
        one = next(iter(by_seed.values()))
        losses = [by_seed[seed]["eval_loss"] for seed in sorted(by_seed)]
        reference = [runs["fp32"][seed]["eval_loss"] for seed in sorted(by_seed) if seed in runs["fp32"]]
        above = f"{sum(losses) / sum(reference) - 1:+.2%}" if len(reference) == len(losses) else "-"
        cells = (
            variant,
            f"{one['trained_fraction']:.0%}",
            " / ".join(f"{loss:.4f}" for loss in losses),
            above,
            f"{sum(one['bytes'].values()) / 1e6:.0f}",
            f"{one['peak_allocated_bytes'] / 1e6:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--eval-examples", type=int, default=48)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    arguments = parser.parse_args()
    lines = arguments.output.read_text(encoding="utf-8").splitlines() if arguments.output.exists() else []
    results = [json.loads(line) for line in lines]
    if arguments.table:
        print(table(results))
        return
    done = {(result["variant"], result["seed"]) for result in results}
    about = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}
    about |= {"steps": arguments.steps, "max_length": arguments.max_length, "eval_examples": arguments.eval_examples}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if (variant, seed) in done:
                continue
            result = run(variant, seed, arguments)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**result, **about}) + "\n")
            print(f"{variant}, seed {seed}: {result['eval_loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
