"""How much a rounding error in the gradient changes the step that an optimizer takes first.

    python bench/sensitivity.py --output outputs/sensitivity.json

Gradients of SmolLM2-135M over four examples are disturbed by a relative error of 1e-7, as another order of summation
disturbs them, and each optimizer takes its first step with either. Printed is the norm of the difference of the two
updates, relative to the norm of one of them. So far apart may two runs be after a step, that add up the same
micro-batches in another order: with another number of processes or threads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from measured import provenance
from sophia_galore import GaLore
from sophia_galore.config.schema import ModelConfig
from sophia_galore.model.source import resolve_model

ERROR = 1e-7
LAYERS = ("layers.0.mlp.up_proj", "layers.15.self_attn.q_proj", "layers.29.mlp.down_proj")
Make = Callable[[Any], torch.optim.Optimizer]


def galore(subspace: Any, projection_bits: Any) -> Make:
    """Return what makes a GaLore of rank 128."""
    return lambda named: GaLore(named, lr=1.6e-3, rank=128, subspace=subspace, projection_bits=projection_bits)


OPTIMIZERS: dict[str, Make] = {
    "AdamW": lambda named: torch.optim.AdamW([parameter for _, parameter in named], lr=2e-4),
    "GaLore, tracked, 32-bit bases": galore("tracked", 32),
    "GaLore, tracked, 16-bit bases": galore("tracked", 16),
    "GaLore, singular vectors, 32-bit bases": galore("svd", 32),
    "GaLore, singular vectors, 16-bit bases": galore("svd", 16),
    "GaLore, random basis": galore("random", 32),
}


def gradients(folder: Path, data: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return weights and their gradients over four examples, by name."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for record in json.loads(data.read_text(encoding="utf-8"))[:4]:
        chat = [{"role": "user", "content": record["instruction"]}, {"role": "assistant", "content": record["output"]}]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)["input_ids"][:, :96]
        (model(input_ids=ids, labels=ids).loss / 4).backward()
    parameters = dict(model.named_parameters())
    chosen = {name: parameters[f"model.{name}.weight"] for name in LAYERS}
    return {name: (parameter.detach(), parameter.grad) for name, parameter in chosen.items()}


def difference(make: Make, weight: Tensor, grad: Tensor) -> float:
    """Return how far the first updates are apart, relative to one of them."""
    noise = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
    updates = []
    for error in (0.0, ERROR):
        parameter = nn.Parameter(weight.clone())
        parameter.grad = grad * (1 + error * noise)
        make([("weight", parameter)]).step()
        updates.append(parameter.detach() - weight)
    return float((updates[1] - updates[0]).norm() / updates[0].norm())


def main() -> None:
    """Measure every optimizer on every matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data/sample_data.json"))
    asked = parser.parse_args()
    found = gradients(resolve_model(ModelConfig(name=asked.model), print).folder, asked.data)
    table = {
        name: {layer: difference(make, *pair) for layer, pair in found.items()} for name, make in OPTIMIZERS.items()
    }
    for name, differences in table.items():
        print(f"{name:40} " + "  ".join(f"{value:.1e}" for value in differences.values()), flush=True)
    asked.output.write_text(json.dumps(provenance() | {"error": ERROR, "differences": table}, indent=2) + "\n")


if __name__ == "__main__":
    main()
