"""The memory that is predicted against the memory that is measured, over a grid of real runs.

    python bench/forecast.py --output forecast.jsonl
    python bench/forecast.py --output forecast.jsonl --table

Each run is the ordinary command with random weights and texts, two optimizer steps on the CPU, in a process of its
own. Both numbers come from its memory_report.json: the prediction was made before the weights were loaded, the
measurement is the storage tracker's, over loading, probe, evaluation and both steps. Runs in the file are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.source import resolve_model

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "0.5B": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
}
"""Shapes of a small model, of SmolLM2-135M and of Qwen2-0.5B."""

ARCHITECTURES = {"llama": "LlamaConfig", "qwen2": "Qwen2Config"}
STORES = {
    "fp32": ["model.store=fp32"],
    "bf16": ["model.store=bf16"],
    "int8": ["model.store=bf16", "quantization.enabled=true"],
}
OPTIMIZERS = ("galore", "adamw", "apollo")
LENGTHS = {"tiny": (64, 256), "135M": (32, 128), "0.5B": (32, 96)}
ACCUMULATIONS = {"tiny": (1, 4), "135M": (1, 3), "0.5B": (1, 2)}


@dataclass(frozen=True)
class Case:
    """One run of the grid."""

    size: str
    architecture: str
    store: str
    optimizer: str
    length: int
    accumulation: int


def grid(sizes: list[str]) -> Iterator[Case]:
    """All cases of some sizes, shuffled, so that a part of the grid says something about all of it."""
    for size in sizes:
        axes = (ARCHITECTURES, STORES, OPTIMIZERS, LENGTHS[size], ACCUMULATIONS[size])
        cases = [Case(size, *values) for values in itertools.product(*axes)]
        random.Random(0).shuffle(cases)
        yield from cases


def write_model(folder: Path, case: Case, tokenizer: Path) -> None:
    """A bf16 model folder with random weights, and somebody's tokenizer."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    kind = getattr(transformers, ARCHITECTURES[case.architecture])
    ids = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = kind(**SIZES[case.size], tie_word_embeddings=True, max_position_embeddings=2048, **ids)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


def write_data(path: Path) -> None:
    """Texts of words that are made up, each longer than any length in the grid."""
    draw = random.Random(0)
    syllables = ["ba", "den", "ki", "lo", "mur", "ne", "po", "ra", "su", "tik", "vo", "zel"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(2000)]
    texts = [{"text": " ".join(draw.choices(words, k=400))} for _ in range(24)]
    path.write_text(json.dumps(texts), encoding="utf-8")


def measure(case: Case, folder: Path, data: Path, run: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the command, and read what it reported."""
    settings = [
        f"model.name={folder}",
        f"data.train={data}",
        "data.max_eval_examples=2",
        f"training.output_dir={run}",
        "training.device=cpu",
        "training.max_steps=2",
        "training.batch_size=1",
        f"training.max_length={case.length}",
        f"training.gradient_accumulation_steps={case.accumulation}",
        f"optimizer.type={case.optimizer}",
        "optimizer.galore.rank=32",
        "optimizer.apollo.rank=32",
        *STORES[case.store],
        *arguments.overrides,
    ]
    config = run.with_suffix(".yaml")
    config.write_text("training:\n  seed: 42\n", encoding="utf-8")
    command = [sys.executable, "-m", "sophia_galore", "train", "--config", str(config), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"failed": done.stderr[-500:]}
    report = json.loads((run / "memory_report.json").read_text(encoding="utf-8"))
    keys = ("predicted_peak_bytes", "peak_allocated_bytes", "predicted_ratio", "phases", "categories")
    return {key: report[key] for key in keys}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: a row a size and store, with the ratios' extremes; then the worst case and the failures."""
    good = [line for line in lines if "failed" not in line]
    rows = ["| size | weights | runs | measured | lowest ratio | highest ratio |", "|---|---|---|---|---|---|"]
    for size, store in itertools.product(SIZES, STORES):
        group = [line for line in good if line["size"] == size and line["store"] == store]
        if not group:
            continue
        ratios = [line["predicted_peak_bytes"] / line["peak_allocated_bytes"] for line in group]
        peaks = [line["peak_allocated_bytes"] / 2**20 for line in group]
        span = f"{min(peaks):,.0f} to {max(peaks):,.0f} MiB"
        rows.append(f"| {size} | {store} | {len(group)} | {span} | {min(ratios):.4f} | {max(ratios):.4f} |")
    worst = max(good, key=lambda line: abs(line["predicted_peak_bytes"] / line["peak_allocated_bytes"] - 1))
    ratio = worst["predicted_peak_bytes"] / worst["peak_allocated_bytes"]
    case = ", ".join(f"{key} {worst[key]}" for key in Case.__dataclass_fields__)
    rows += ["", f"{len(good)} runs, {len(lines) - len(good)} failed. Worst: {ratio - 1:+.2%} ({case})."]
    return "\n".join(rows)


def main() -> None:
    """Go through the grid, or show what is in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, one a run; gone on with if it exists")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="show the file as a table and do nothing else")
    parser.add_argument("overrides", nargs="*", help="KEY.PATH=VALUE words for every run")
    arguments = parser.parse_args()
    known = arguments.output.read_text(encoding="utf-8").splitlines() if arguments.output.exists() else []
    lines = [json.loads(line) for line in known]
    if arguments.table:
        print(table(lines))
        return
    done = [{key: line[key] for key in Case.__dataclass_fields__} for line in lines]
    tokenizer = resolve_model(ModelConfig(name=arguments.tokenizer), print).folder
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data.json"
        write_data(data)
        for case in grid(arguments.sizes):
            if asdict(case) in done:
                continue
            folder = Path(work) / f"{case.size}-{case.architecture}"
            if not folder.exists():
                write_model(folder, case, tokenizer)
            line = asdict(case) | measure(case, folder, data, Path(work) / "run", arguments)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(case, line.get("predicted_ratio", "failed"), flush=True)


if __name__ == "__main__":
    main()
