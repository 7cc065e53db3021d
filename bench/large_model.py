"""A model with the shapes of a large one and random weights, trained in little memory.

    python bench/large_model.py --model qwen2.5-7b --limit 3.0GiB --tokens 64 --batch 2 --steps 2
    python bench/large_model.py --model qwen2.5-3b --limit 3.0GiB --tokens 256 --batch 8 --steps 1

Weights in eight bits are drawn and written layer by layer, then `sophia-galore train` is run on them in a process of
its own, with `memory.placement: disk` unless other words are given. Printed and written with `--output`: the largest
resident size of the process, the storage tracker's peak beside the plan's, the bytes that live on disk, and the share
of time that the steps waited for weights. About four times the bytes of the weights must be free on the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

from shapes import write_data
from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.skeleton import build_skeleton, make_model_config
from sophia_galore.model.source import resolve_model
from sophia_galore.model.specifications import find_specification
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.records.files import INT8_FILE
from sophia_galore.weights.files import file_metadata
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.safetensors_layout import TensorKind
from sophia_galore.weights.tensor_stream import Block, TensorStream, write_stream

_FORM = Int8Format()
# Of the usual initialisation: weights in (-127, 127) times this have a deviation of about 0.02.
_SCALE = 0.02 / 73


def config_of(model: str, num_layers: int | None = None) -> Any:
    """Return the Hugging Face configuration of a built-in specification.

    Args:
        model: Its name.
        num_layers: So many layers only; None: all.
    """
    known = find_specification(model)
    if known is None:
        raise SystemExit(f"{model} is no built-in model")
    return make_model_config(known.config | ({"num_hidden_layers": num_layers} if num_layers else {}), model)


def write_random_model(folder: Path, config: Any, tokenizer: Path) -> int:
    """Write a model folder with random weights in eight bits, layer by layer.

    Args:
        folder: The folder, which is made.
        config: The model's Hugging Face configuration; it gets the tokenizer's special tokens.
        tokenizer: The folder of a tokenizer.

    Returns:
        The number of parameters.
    """
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    config.eos_token_id, config.pad_token_id, config.bos_token_id = words.eos_token_id, words.pad_token_id, None
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    words.save_pretrained(folder)
    shapes = build_skeleton(config, torch.device("cpu")).parameter_shapes()
    groups: list[dict[str, TensorKind]] = []
    for name, shape in shapes.items():
        if len(shape) == 2:
            scales = (shape[0], _FORM.num_scales(shape[1]))
            groups.append({name: (torch.int8, tuple(shape)), f"{name}.scales": (torch.bfloat16, scales)})
        else:
            groups.append({name: (torch.bfloat16, tuple(shape))})
    draw = torch.Generator().manual_seed(0)

    def blocks() -> Iterator[Block]:
        for name, shape in shapes.items():
            if len(shape) < 2:
                yield Block(name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0).bfloat16(), 0)
                continue
            for rows in row_blocks(shape):
                count = rows.stop - rows.start
                codes = torch.randint(-127, 128, (count, shape[1]), dtype=torch.int8, generator=draw)
                yield Block(name, codes, rows.start)
                scales = torch.full((count, _FORM.num_scales(shape[1])), _SCALE, dtype=torch.bfloat16)
                yield Block(f"{name}.scales", scales, rows.start)

    write_stream(
        folder,
        INT8_FILE.removesuffix(".safetensors"),
        TensorStream(groups, blocks),
        metadata=file_metadata(_FORM.block),
    )
    return sum(shape.numel() for shape in shapes.values())


def main() -> None:
    """Write the model, train it, and say what that took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, help="so many layers only")
    parser.add_argument("--limit", default="3GiB")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--sample", type=Path, default=Path("data/sample_data.json"))
    parser.add_argument("--folder", type=Path, help="where model and run are written; else a temporary folder")
    parser.add_argument("--output", type=Path, help="a JSON file for the figures")
    parser.add_argument("words", nargs="*", help="settings of the run")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(_measure(asked, asked.folder or Path(temporary)), indent=2))


def _measure(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    tokenizer = resolve_model(ModelConfig(name=asked.tokenizer), print).folder
    model, data, run = folder / "model", folder / "data.json", folder / "run"
    if not model.exists():
        config = config_of(asked.model, asked.layers)
        print(f"{write_random_model(model, config, tokenizer) / 1e9:.3f} G parameters")
    write_data(data, asked.sample, asked.batch * asked.steps + 2)
    words = [
        f"model.name={model}",
        "model.store=bf16",
        f"data.train={data}",
        "data.eval_fraction=0",
        f"training.output_dir={run}",
        f"training.batch_size={1 if asked.batch % 2 else 2}",
        f"training.gradient_accumulation_steps={asked.batch if asked.batch % 2 else asked.batch // 2}",
        f"training.max_length={asked.tokens}",
        f"training.max_steps={asked.steps}",
        "optimizer.type=galore",
        "optimizer.state_bits=8",
        "quantization.enabled=true",
        "memory.placement=disk",
        f"memory.limit={asked.limit}",
        *asked.words,
    ]
    nothing = folder / "empty.yaml"
    nothing.write_text("{}\n")
    began_s = time.monotonic()
    subprocess.run([sys.executable, "-m", "sophia_galore", "train", "--config", str(nothing), *words], check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    report = json.loads((run / "memory_report.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "words": words,
        "seconds": round(time.monotonic() - began_s, 1),
        "limit_bytes": report["limit_bytes"],
        "predicted_peak_bytes": report["predicted_peak_bytes"],
        "peak_allocated_bytes": report["peak_allocated_bytes"],
        "predicted_ratio": report["predicted_ratio"],
        "process_bytes_after_steps": max(step["process_bytes"] for step in steps if "process_bytes" in step),
        "peak_process_bytes": peak,
        "steps": steps,
    }
    if asked.output:
        asked.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
