"""Whether a change of the source changes numbers: fingerprints of small runs, before and after.

    python bench/same_bits.py --output before.json
    python bench/same_bits.py --output after.json --against before.json

Each case is a run of six steps on a model of three layers with random weights, through the ordinary command: all
kinds of optimizers over all formats of weights, and what leads the engine another way (an untied head, clipping, kept
graphs, packing, dropout). Its fingerprints are SHA-256 of the losses, of the final model, and of weights and state in
the last checkpoint; beside them stands what memory the run was expected to need, and needed. With `--against`, what
differs is named and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from sophia_galore.cli.main import main as sophia_galore
from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.source import resolve_model

NUM_STEPS = 6
OPTIMIZERS: dict[str, list[str]] = {
    "galore": ["optimizer.type=galore"],
    "galore-svd-full": ["optimizer.type=galore", "optimizer.galore.subspace=svd", "optimizer.galore.fast_path=never"],
    "galore-fira": ["optimizer.type=galore", "optimizer.galore.residual=fira"],
    "galore-sophia": ["optimizer.type=galore", "optimizer.galore.rule=sophia", "optimizer.sophia.curvature_every=2"],
    "galore-random-8bit": ["optimizer.type=galore", "optimizer.galore.subspace=random", "optimizer.state_bits=8"],
    "adamw": ["optimizer.type=adamw"],
    "adamw-8bit": ["optimizer.type=adamw", "optimizer.state_bits=8"],
    "sophia": ["optimizer.type=sophia", "optimizer.sophia.curvature_every=2"],
    "apollo": ["optimizer.type=apollo"],
    "apollo-mini": ["optimizer.type=apollo_mini"],
    "scale": ["optimizer.type=scale"],
}
FORMATS: dict[str, list[str]] = {
    "fp32": ["model.store=fp32", "quantization.enabled=false"],
    "bf16": ["model.store=bf16", "quantization.enabled=false"],
    "int8": ["model.store=bf16", "quantization.enabled=true"],
}
VARIANTS: dict[str, list[str]] = {
    "fold": [*FORMATS["int8"], "quantization.fold=refresh"],
    "untied": ["{untied}", *FORMATS["fp32"]],
    "untied-int8": ["{untied}", *FORMATS["int8"]],
    "clip-model": [*FORMATS["fp32"], "training.max_grad_norm=0.5", "training.clip_by=model"],
    "clip-layer": [*FORMATS["bf16"], "training.max_grad_norm=0.5", "training.clip_by=layer"],
    "keep-layers": [*FORMATS["bf16"], "engine.keep_layers=2"],
    "bf16-compute": [*FORMATS["bf16"], "training.compute_dtype=bf16"],
    "fp16-compute": [*FORMATS["fp32"], "training.compute_dtype=fp16"],
    "packing": [*FORMATS["fp32"], "data.packing=true"],
    "dropout": ["{dropout}", *FORMATS["fp32"]],
    "neftune": [*FORMATS["fp32"], "training.neftune_alpha=5"],
    "frozen": [*FORMATS["fp32"], "training.trainable=[model.layers.2.*]"],
}
SHAPES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def cases() -> dict[str, list[str]]:
    """By name, the words of each run."""
    crossed = {
        f"{optimizer}/{form}": [*asked, *stored]
        for optimizer, asked in OPTIMIZERS.items()
        for form, stored in FORMATS.items()
    }
    return crossed | {f"galore/{name}": ["optimizer.type=galore", *words] for name, words in VARIANTS.items()}


def write_models(folder: Path, tokenizer: Path) -> dict[str, Path]:
    """Random models, and somebody's tokenizer: one tied, one untied, one with dropout."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    words = AutoTokenizer.from_pretrained(tokenizer)
    made: dict[str, Path] = {}
    for name, more in {
        "tied": {"tie_word_embeddings": True},
        "untied": {"tie_word_embeddings": False},
        "dropout": {"tie_word_embeddings": True, "attention_dropout": 0.1},
    }.items():
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES, **more, vocab_size=len(words), eos_token_id=words.eos_token_id)
        config.pad_token_id = words.pad_token_id
        made[name] = folder / name
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        words.save_pretrained(made[name])
    return made


def write_data(path: Path) -> None:
    """Conversations of words drawn at random, from 3 to 20 of them."""
    draw = random.Random(0)
    words = ["a", "model", "layer", "learns", "small", "card", "weight", "step", "loss", "gradient", "of", "reads"]
    texts = [[" ".join(draw.choices(words, k=length)) for length in (6, draw.randint(3, 20))] for _ in range(64)]
    records = [{"instruction": question, "output": answer} for question, answer in texts]
    path.write_text(json.dumps(records), encoding="utf-8")


def fingerprints(run: Path) -> dict[str, Any]:
    """What is compared of one run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [[record.get(key) for key in ("step", "loss", "eval_loss", "grad_norm")] for record in records]
    memory = json.loads((run / "memory_report.json").read_text(encoding="utf-8"))
    saved = run / f"checkpoint-{NUM_STEPS}"
    files = {str(path.relative_to(run)): path for path in (*run.glob("*.safetensors"), *saved.glob("*.safetensors"))}
    return {
        "losses": hashlib.sha256(json.dumps(numbers).encode()).hexdigest(),
        "eval_loss": [record["eval_loss"] for record in records if "eval_loss" in record][-1],
        "files": {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())},
        "memory": {key: memory.get(key) for key in ("predicted_peak_bytes", "peak_allocated_bytes")},
    }


def run_case(work: Path, words: list[str]) -> dict[str, Any]:
    """One run, and its fingerprints."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    settings = [
        f"data.train={work / 'data.json'}",
        "data.max_eval_examples=4",
        f"training.output_dir={run}",
        f"training.max_steps={NUM_STEPS}",
        "training.batch_size=2",
        "training.gradient_accumulation_steps=2",
        "training.max_length=128",
        "training.device=cpu",
        "optimizer.state_bits=32",
        "optimizer.galore.rank=16",
        "optimizer.galore.update_proj_gap=3",
        "optimizer.apollo.update_proj_gap=3",
        f"checkpoint.save_every_steps={NUM_STEPS}",
        f"memory.track_steps={NUM_STEPS}",
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        code = sophia_galore(["train", *settings, *words])
    return fingerprints(run) if code == 0 else {"exit code": code}


def main() -> int:
    """Run the cases, write what was found, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="where the fingerprints go")
    parser.add_argument("--against", type=Path, help="fingerprints from before")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--tokenizer", default="smollm2-135m")
    arguments = parser.parse_args()
    tokenizer = resolve_model(ModelConfig(name=arguments.tokenizer), print).folder
    before = json.loads(arguments.against.read_text(encoding="utf-8")) if arguments.against else None
    found: dict[str, Any] = {}
    different = 0
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        models = write_models(folder, tokenizer)
        write_data(folder / "data.json")
        for name, words in cases().items():
            if arguments.only not in name:
                continue
            kind = next((word[1:-1] for word in words if word.startswith("{")), "tied")
            settings = [word for word in words if not word.startswith("{")]
            found[name] = run_case(folder, [f"model.name={models[kind]}", *settings])
            arguments.output.write_text(json.dumps(found, indent=1), encoding="utf-8")
            if before is not None:
                changed = [key for key in found[name] if found[name][key] != before.get(name, {}).get(key)]
                different += bool(changed)
                print(f"{name}: {'differs in ' + ', '.join(changed) if changed else 'the same'}", flush=True)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
