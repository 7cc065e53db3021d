"""`sophia-galore chat`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Annotated

import typer

from sophia_galore.cli.answering import (
    CompareOption,
    DeviceOption,
    FormatOption,
    ModelArgument,
    SeedOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    notice,
    opened,
    weights_of,
)
from sophia_galore.cli.chat_session import ChatSession
from sophia_galore.cli.display import need_reader
from sophia_galore.engine.dialogue import Dialogue
from sophia_galore.engine.generate import Settings
from sophia_galore.plan.device import choose_device

_PROMPT, _GOES_ON, _BLOCK = "> ", ". ", '"""'


def chat(
    model: ModelArgument,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    seed: SeedOption = 42,
    system: SystemOption = "",
    device: DeviceOption = "auto",
    held: FormatOption = "auto",
    compare_base: CompareOption = False,
) -> None:
    """Talk with a model, turn by turn; /help shows the commands, Ctrl-D ends."""
    need_reader()
    place = choose_device(device, "--device ")
    with ExitStack() as stack:
        found = weights_of(model, compare_base=compare_base)
        models = [stack.enter_context(opened(weights, held, place)) for weights in found]
        dialogues = [Dialogue(loaded, system) for loaded in models]
        # At least as much of what the model reads is for the conversation.
        longest = min(max_new_tokens, *(loaded.num_positions // 2 for loaded in models))
        if longest < max_new_tokens:
            notice(f"Answers have {longest} tokens at most, half of what the model reads.")
        settings = Settings(longest, temperature, top_p, seed)
        session = ChatSession(dialogues, settings)
        session.greet()
        for line in _lines():
            if not session.take(line):
                break


def _lines() -> Iterator[str]:
    """Yield the lines that the user types; text between triple quotes is one line."""
    is_terminal = sys.stdin.isatty()
    if is_terminal and sys.stdout.isatty():
        with suppress(ImportError):  # which Windows lacks; with it, `input` has a history and lines can be edited
            importlib.import_module("readline")
    while True:
        try:
            line = _read(_PROMPT, is_terminal=is_terminal)
            while line.startswith(_BLOCK) and not line.endswith(_BLOCK, len(_BLOCK)):
                line += "\n" + _read(_GOES_ON, is_terminal=is_terminal)
        except EOFError:
            if is_terminal:
                notice("")
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            notice("\nCtrl-D or /exit ends the chat.")
            continue
        if line.startswith(_BLOCK):
            line = line.removeprefix(_BLOCK).removesuffix(_BLOCK).strip("\n")
        if line.strip():
            yield line


def _read(prompt: str, *, is_terminal: bool) -> str:
    """Read a line without its end; the prompt is no part of standard output."""
    try:
        if is_terminal and sys.stdout.isatty():
            return input(prompt)
        if is_terminal:
            print(prompt, end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
    except OSError as error:  # the terminal is gone
        raise EOFError from error
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")
