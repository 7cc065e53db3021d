"""Options, loading and notices that `generate` and `chat` share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Annotated

import torch
import typer
from rich.console import Console

from sophia_galore.cli.arguments import expanded_text
from sophia_galore.engine.generate import Answer
from sophia_galore.engine.loaded import Held, Loaded, loaded
from sophia_galore.errors import OutOfMemory, lacks_memory, short
from sophia_galore.train.trained import Weights, find_base, find_weights

ModelArgument = Annotated[
    str,
    typer.Argument(callback=expanded_text, help="A run's folder, a checkpoint, a model folder, a hub id or an alias."),
]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
TopPOption = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Above temperature 0, draw from the likeliest tokens of this probability."),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For temperatures above 0.")]
SystemOption = Annotated[str, typer.Option(metavar="TEXT", help="What the model is told before everything.")]
DeviceOption = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda", help="Where it answers; cuda:N for one of several.")
]
FormatOption = Annotated[
    Held,
    typer.Option(
        "--format",
        help="How weights are held; auto: as they lie in the folder; int8: half of bf16; file: in the folder, from "
        "which each layer is read when it computes, for models larger than memory.",
    ),
]
CompareOption = Annotated[
    bool, typer.Option("--compare-base", help="The model from before training answers too, side by side.")
]


def notices() -> Console:
    """Return the console for everything but answers: standard error, so that answers alone can be piped."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def notice(text: str) -> None:
    """Print a line that is not an answer."""
    notices().print(text, style="dim", markup=False)


def weights_of(model: str, *, compare_base: bool) -> list[Weights]:
    """Find the weights of a name; with `compare_base`, the base model's come first."""
    found = find_weights(model, notice)
    return [find_base(found, notice), found] if compare_base else [found]


@contextmanager
def opened(weights: Weights, held: Held, device: torch.device, *, is_said: bool = True) -> Iterator[Loaded]:
    """Load weights inside a context; if memory runs out, say what helps.

    Args:
        weights: The weights.
        held: Their format in memory.
        device: The device.
        is_said: Whether a status line is shown while they are loaded.
    """
    with ExitStack() as stack:
        try:
            with notices().status(f"Loading {weights.title} ...") if is_said else nullcontext():
                model = stack.enter_context(loaded(weights.folder, held, device, title=weights.title))
            yield model
        except (MemoryError, RuntimeError) as error:
            if not lacks_memory(error):
                raise
            remedy = "Take --format int8 or file, a smaller --max-new-tokens, or --device cpu."
            raise OutOfMemory(f"Out of memory: {short(error)}.", remedy) from error


def show_text(text: str) -> None:
    """Print a part of an answer at once, unchanged."""
    print(text, end="", flush=True)


def say_cut(given: Sequence[Answer], max_new_tokens: int) -> None:
    """Print a notice if an answer was cut off."""
    lengths = [len(answer.tokens) for answer in given if answer.end == "cut"]
    if lengths:
        why = "--max-new-tokens allows more" if max(lengths) >= max_new_tokens else "the model has no more positions"
        notice(f"(Cut after {max(lengths)} tokens: {why}.)")
