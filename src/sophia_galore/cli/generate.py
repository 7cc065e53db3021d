"""`sophia-galore generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console

from sophia_galore.cli.answering import (
    CompareOption,
    DeviceOption,
    FormatOption,
    ModelArgument,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    opened,
    say_cut,
    show_text,
    weights_of,
)
from sophia_galore.cli.display import need_reader
from sophia_galore.cli.side_by_side import SideBySide
from sophia_galore.engine.dialogue import Dialogue
from sophia_galore.engine.generate import Answer, Settings, Stream
from sophia_galore.errors import ArgumentError
from sophia_galore.plan.device import choose_device
from sophia_galore.train.trained import Weights


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to ask; -: what standard input says.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 128,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 42,
    system: SystemOption = "",
    device: DeviceOption = "auto",
    held: FormatOption = "auto",
    compare_base: CompareOption = False,
) -> None:
    """Answer a question with a model, token by token; only the answer goes to standard output."""
    need_reader()
    question = _read_question(prompt)
    place = choose_device(device, "--device ")
    weights = weights_of(model, compare_base=compare_base)
    settings = Settings(max_new_tokens, temperature, top_p, seed)

    def answer(found: Weights, show: Callable[[str], None]) -> Answer:
        with opened(found, held, place, is_said=not compare_base) as loaded:
            dialogue = Dialogue(loaded, system)
            asked = dialogue.ask(question, max_new_tokens=max_new_tokens)
            return dialogue.answer(asked, settings, Stream(loaded.tokenizer, show))

    if compare_base:
        given = []
        with SideBySide(Console(highlight=False, soft_wrap=True), [found.title for found in weights]) as shown:
            # One after the other: both need not fit into memory at once.
            for found in weights:
                shown.begin()
                given.append(answer(found, shown.add))
    else:
        try:
            given = [answer(weights[0], show_text)]
        except KeyboardInterrupt:
            print()
            raise
        print(flush=True)
    say_cut(given, max_new_tokens)


def _read_question(prompt: str) -> str:
    question = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not question.strip():
        where = "standard input is" if prompt == "-" else "PROMPT is"
        raise ArgumentError(f"There is no question: {where} empty.", "Say what to ask.")
    return question
