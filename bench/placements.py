"""The same run with its weights on the device, in host memory and on disk: same bits, and how fast.

    python bench/placements.py --bits outputs/placements-bits.json
    python bench/placements.py --speed outputs/placements-speed.json

`--bits` trains SmolLM2-135M with each store and optimizer for 12 steps in every placement, with and without prefetch
and with layer inputs elsewhere, and compares the SHA-256 of the final weights. `--speed` takes steps of 8 x 256 tokens
of three runs in one process in turns, and prints ratios of tokens a second to those of placement device: medians over
the steps, of which the first one is not counted. Run it when nothing else runs. Disk means a file that the system keeps
in its cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from measured import provenance, weights_sha256
from quiet import cpu_times, quietness, warn_if_busy
from sides import compare, open_side
from sophia_galore.config import load_config
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train

STORES: dict[str, list[str]] = {
    "fp32": ["model.store=fp32"],
    "bf16": ["model.store=bf16"],
    "int8": ["model.store=bf16", "quantization.enabled=true"],
}
OPTIMIZERS = ("galore", "adamw", "sophia")
PLACEMENTS: dict[str, list[str]] = {
    "device": ["memory.placement=device"],
    "host": ["memory.placement=host"],
    "disk": ["memory.placement=disk"],
    "disk, 10 layers stay": ["memory.placement=disk", "memory.resident_layers=10"],
    "host, no prefetch": ["memory.placement=host", "memory.prefetch=false"],
    "disk, inputs on disk": ["memory.placement=disk", "memory.activations=disk"],
    "device, inputs in host memory": ["memory.placement=device", "memory.activations=host"],
}


def run_words(folder: Path, model: str, data: Path, words: list[str]) -> list[str]:
    """Return the settings of a run."""
    return [
        f"model.name={model}",
        f"data.train={data}",
        f"training.output_dir={folder}",
        "data.eval_fraction=0",
        "training.probe_step=false",
        "memory.predict=false",
        "memory.track_steps=0",
        *words,
    ]


def compare_bits(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train in every placement; return the digests of the final weights."""
    found: dict[str, Any] = {}
    for store in asked.stores:
        for optimizer in asked.optimizers:
            digests: dict[str, str] = {}
            for name, placed in PLACEMENTS.items():
                words = [
                    "training.max_steps=12",
                    "training.batch_size=1",
                    "training.gradient_accumulation_steps=2",
                    "training.max_length=48",
                    f"optimizer.type={optimizer}",
                    "optimizer.galore.update_proj_gap=5",
                    "optimizer.sophia.curvature_every=6",
                ]
                run = folder / "run"
                train(
                    load_config(None, run_words(run, asked.model, asked.data, [*words, *STORES[store], *placed])),
                    Callback(),
                )
                digests[name] = weights_sha256(run)
                shutil.rmtree(run)
                print(store, optimizer, name, digests[name][:16], flush=True)
            same = len(set(digests.values())) == 1
            found[f"{store}, {optimizer}"] = {
                "same": same,
                "sha256": digests["device"],
                "differing": [name for name, digest in digests.items() if digest != digests["device"]],
            }
            asked.bits.write_text(json.dumps(provenance() | {"runs": found}, indent=2) + "\n", encoding="utf-8")
    return found


def compare_speed(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return tokens a second in each placement, and their ratios to those on the device."""
    words = [
        "training.max_steps=100",
        "training.batch_size=4",
        "training.gradient_accumulation_steps=2",
        "training.max_length=256",
        "data.packing=true",
        "optimizer.type=galore",
        *STORES[asked.store],
    ]
    with ExitStack() as stack:
        sides = {
            name: open_side(
                load_config(None, run_words(folder / name, asked.model, asked.data, [*words, *PLACEMENTS[name]])), stack
            )
            for name in ("device", "host", "disk")
        }
        return {"store": asked.store, **compare(sides, asked.steps, stack)}


def main() -> None:
    """Compare bits, or speed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=Path, help="compare bits, and write the figures to this file")
    parser.add_argument("--speed", type=Path, help="compare speed, and write the figures to this file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data/sample_data.json"))
    parser.add_argument("--store", default="int8", choices=STORES)
    parser.add_argument("--stores", nargs="+", default=list(STORES))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--steps", type=int, default=6, help="steps of each side, of which the first is not counted")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        began_s = time.monotonic()
        if asked.bits:
            compare_bits(asked, Path(temporary))
        if asked.speed:
            warn_if_busy()
            begun = cpu_times()
            figures = compare_speed(asked, Path(temporary)) | quietness(begun) | provenance()
            asked.speed.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
            print(figures["ratio"], figures["waited"])
        print(f"{time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
