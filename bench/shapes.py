"""Memory and time of a configuration at the shapes of Qwen2-0.5B, with random weights.

    python bench/shapes.py
    python bench/shapes.py --write outputs/shapes

Writes a model folder with Qwen2-0.5B's shapes and random weights, and examples that are exactly
`max_length` tokens long, then trains for two steps through the ordinary command, with whatever
`--config` says. The numbers come from the run's own memory_report.json. With `--write` it only writes model
and data, and prints the words with which `sophia-galore compare` compares configurations at these shapes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.source import resolve_model

QWEN2_05B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}


def write_model(folder: Path, tokenizer: Path, num_layers: int) -> None:
    """A bf16 model folder with random weights, and somebody's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    words = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    shapes = QWEN2_05B | {"num_hidden_layers": num_layers}
    config = Qwen2Config(**shapes, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)


def write_data(path: Path, sample: Path, num_examples: int) -> None:
    """Text examples, each longer than any `max_length` in use, made of the sample data."""
    answers = [record["output"] for record in json.loads(sample.read_text(encoding="utf-8"))]
    texts = ["\n".join(answers[start : start + 20]) for start in range(0, 20 * num_examples, 20)]
    path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")


def main() -> None:
    """Write model and data, train for two steps, print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/galore_config.yaml")
    parser.add_argument("--tokenizer", default="smollm2-135m")
    parser.add_argument("--sample", type=Path, default=Path("data/sample_data.json"))
    parser.add_argument("--layers", type=int, default=QWEN2_05B["num_hidden_layers"])
    parser.add_argument("--write", type=Path, help="only write model and data, into this folder")
    parser.add_argument("overrides", nargs="*", help="KEY.PATH=VALUE words for the configuration")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = arguments.write or Path(work)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = resolve_model(ModelConfig(name=arguments.tokenizer), print).folder
        write_model(folder / "model", tokenizer, arguments.layers)
        write_data(folder / "data.json", arguments.sample, num_examples=24)
        if arguments.write:
            print(shlex.join([f"model.name={folder / 'model'}", f"data.train={folder / 'data.json'}"]))
            return
        # In a process of its own: making the weights must not count into the run's resident size.
        command = [sys.executable, "-m", "sophia_galore", "train", "--config", arguments.config]
        settings = [
            f"model.name={folder / 'model'}",
            f"data.train={folder / 'data.json'}",
            "data.max_eval_examples=1",
            "training.max_steps=2",
            "training.warmup_steps=0",
            f"training.output_dir={folder / 'run'}",
            "checkpoint.save_every_steps=0",
        ]
        done = subprocess.run([*command, *settings, *arguments.overrides], check=False)
        if done.returncode:
            sys.exit(done.returncode)
        report = json.loads((folder / "run" / "memory_report.json").read_text(encoding="utf-8"))
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        print(json.dumps({"memory": report, "metrics": [json.loads(line) for line in lines]}, indent=2))


if __name__ == "__main__":
    main()
