"""The commented configuration that `init` writes: the keys that matter for a first run."""

from __future__ import annotations

import json
from dataclasses import dataclass

from sophia_galore.config.paths import escape_path
from sophia_galore.config.size import bytes_in_words

# Bytes per parameter of weights and GaLore's state of rank 128; and the least memory for everything else.
_FP32_BYTES, _BF16_BYTES, _ROOM_BYTES = 5.5, 3.0, 2**29


@dataclass(frozen=True)
class Formats:
    """The formats of weights and optimizer state.

    Args:
        store: `model.store`.
        int8: Whether weight matrices are in eight bits.
        state_bits: `optimizer.state_bits`.
        why: The reason, in words.
    """

    store: str
    int8: bool
    state_bits: int
    why: str


def formats_for(memory_bytes: int | None, num_parameters: int | None) -> Formats:
    """Choose formats for a model and an amount of memory.

    A quick rule of thumb; `plan --fit` computes what fits, to the byte.

    Args:
        memory_bytes: The available memory; None: unknown.
        num_parameters: The model's number of parameters; None: unknown.
    """
    if memory_bytes is None:
        return Formats("bf16", False, 32, "bf16: half the memory of fp32, which is more exact")
    memory = bytes_in_words(memory_bytes)
    if num_parameters is None:
        return Formats("bf16", True, 8, f"int8 and 8-bit state, the smallest, since {memory} may be little")
    free, size = memory_bytes - _ROOM_BYTES, f"{num_parameters / 1e6:,.0f} M parameters in {memory}"
    if _FP32_BYTES * num_parameters <= free:
        return Formats("fp32", False, 32, f"fp32, the most exact: there is room for {size}")
    if _BF16_BYTES * num_parameters <= free:
        return Formats("bf16", False, 32, f"bf16: fp32 would not leave room for {size}")
    return Formats("bf16", True, 8, f"int8 and 8-bit state, the smallest, for {size}")


def starter(*, model: str, data: str, memory_bytes: int | None, formats: Formats, command: str, name: str) -> str:
    """Return the text of a configuration.

    Args:
        model: `model.name`.
        data: `data.train`.
        memory_bytes: `memory.limit`; None: none.
        formats: How weights and state are kept.
        command: What was typed, for its first line.
        name: What the file is called, for the commands in it.
    """
    limit = "null" if memory_bytes is None else _size(memory_bytes)
    return f"""\
# Written by: {command}
# See what would be done:   sophia-galore check --config {name}
# What it needs of memory:  sophia-galore plan --config {name} (--fit finds settings that fit)
# Train, and go on:         sophia-galore train --config {name} [--resume]
# What is left out has its default; every key with its meaning is in docs/config.md of the project.

model:
  # A hub id, a folder, a GGUF file, or an alias of `sophia-galore download --list`.
  name: {_text(model)}
  # Weights are kept in {formats.why}.
  store: {formats.store}

data:
  # JSON, JSONL, CSV or Parquet: one file, a folder of them, or a hub dataset id.
  train: {_text(data)}
  # Held out to measure on; or name a file of its own: eval.
  eval_fraction: 0.05

training:
  # A folder of the run's own; an earlier run in it is moved aside.
  output_dir: outputs/{{model}}-{{optimizer}}
  epochs: 1.0
  # Longest example in tokens: what is longer is cut. Memory grows with it.
  max_length: 512
  # Examples in a step: batch_size x gradient_accumulation_steps. Memory grows with the first alone.
  batch_size: 1
  gradient_accumulation_steps: 8
  # null: the optimizer's own, a safe one.
  learning_rate: null
  lr_scheduler_type: cosine

optimizer:
  # galore, adamw, sophia, apollo, apollo_mini or scale; --optimizer changes it for one run.
  type: galore
  state_bits: {formats.state_bits}
  galore:
    # Larger: closer to the full gradient, and more memory.
    rank: 128
    update_proj_gap: 200

quantization:
  # All weight matrices in int8, all of them trained; false: as model.store says.
  enabled: {"true" if formats.int8 else "false"}

checkpoint:
  # A run that is stopped saves as well, and goes on with --resume.
  save_every_steps: 100
  keep_last: 2

memory:
  # What the run may take, such as 4GiB; null: no limit.
  limit: {limit}
"""


def _text(path: str) -> str:
    return json.dumps(escape_path(path), ensure_ascii=False)


def _size(num_bytes: int) -> str:
    """Format a size with its unit if it is a whole number of MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes % size == 0:
            return f"{num_bytes // size}{unit}"
    return str(num_bytes)
