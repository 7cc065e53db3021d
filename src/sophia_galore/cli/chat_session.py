"""A chat on the terminal: questions and commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sophia_galore.cli.answering import notice, notices, say_cut, show_text
from sophia_galore.cli.side_by_side import SideBySide
from sophia_galore.engine.dialogue import Asked, Dialogue
from sophia_galore.engine.generate import Answer, Settings, Stream
from sophia_galore.errors import ArgumentError, EnvironmentProblem, UserError

_LINES = ".jsonl"


class ChatSession:
    """Answers questions and runs commands, line by line.

    Args:
        dialogues: The model's dialogue; with --compare-base, the base model's comes first.
        settings: Sampling of answers; each question has its own seed.
    """

    def __init__(self, dialogues: Sequence[Dialogue], settings: Settings) -> None:
        self._dialogues, self._settings = dialogues, settings
        self._num_asked = 0
        # Name: argument, help text, and a function that returns whether the chat goes on.
        self._commands: dict[str, tuple[str, str, Callable[[str], bool]]] = {
            "/reset": ("", "forget the conversation", self._reset),
            "/system": ("TEXT", "what the model is told before everything; without TEXT: nothing", self._system),
            "/save": ("FILE", "add the conversation to a JSONL file that data.train can read", self._save),
            "/help": ("", "show this", self._help),
            "/exit": ("", "end; Ctrl-D does too", self._exit),
        }

    def greet(self) -> None:
        """Print the models and the commands."""
        titles = " and ".join(dialogue.loaded.title for dialogue in self._dialogues)
        notice(f"{titles}: /help shows the commands, Ctrl-C ends an answer, Ctrl-D the chat.")
        for loaded in (dialogue.loaded for dialogue in self._dialogues):
            if not loaded.has_chat_template:
                notice(
                    f"{loaded.title} has no chat template, so it is not made for questions and answers: "
                    "it continues your text, turn by turn."
                )

    def take(self, line: str) -> bool:
        """Run a command or answer a question; an error of the user is shown, and the chat goes on.

        Args:
            line: What was typed. A question that begins with a slash has a space before it.

        Returns:
            Whether the chat goes on.
        """
        try:
            if line.startswith("/"):
                return self._carry_out(line)
            self._ask(line)
        except UserError as error:
            notices().print(f"{error.cause} {error.remedy}", style="yellow", markup=False)
        return True

    def _carry_out(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            raise ArgumentError(f"{name} is no command.", "/help shows those that there are.")
        return self._commands[name][2](rest.strip())

    def _ask(self, question: str) -> None:
        longest = self._settings.max_new_tokens
        asked = [dialogue.ask(question, max_new_tokens=longest) for dialogue in self._dialogues]
        for dialogue, each in zip(self._dialogues, asked, strict=True):
            if each.num_forgotten:
                turns = "oldest turn" if each.num_forgotten == 1 else f"{each.num_forgotten} oldest turns"
                model = dialogue.loaded
                notice(f"({model.title} no longer sees the {turns}: it reads {model.num_positions} tokens.)")
        settings = replace(self._settings, seed=self._settings.seed + self._num_asked)
        self._num_asked += 1
        given = self._answers(asked, settings)
        say_cut(given, longest)
        for dialogue, each, answer in zip(self._dialogues, asked, given, strict=True):
            if not dialogue.keep(each, answer):
                notice(f"({dialogue.loaded.title} said nothing; the question is not kept.)")

    def _answers(self, asked: Sequence[Asked], settings: Settings) -> list[Answer]:
        if len(self._dialogues) == 1:
            given = _answer(self._dialogues[0], asked[0], settings, show_text)
            print(flush=True)
            return [given]
        titles = [dialogue.loaded.title for dialogue in self._dialogues]
        answers = []
        with SideBySide(Console(highlight=False, soft_wrap=True), titles) as shown:
            for dialogue, each in zip(self._dialogues, asked, strict=True):
                shown.begin()
                answers.append(_answer(dialogue, each, settings, shown.add))
        return answers

    def _reset(self, rest: str) -> bool:
        for dialogue in self._dialogues:
            dialogue.reset()
        notice("(The conversation is forgotten.)")
        return True

    def _system(self, rest: str) -> bool:
        for dialogue in self._dialogues:
            dialogue.tell(rest)
        notice(f"(From now on the model is told: {rest})" if rest else "(There is no system message any more.)")
        return True

    def _save(self, rest: str) -> bool:
        dialogue = self._dialogues[-1]
        path = Path(rest).expanduser()
        if path.suffix != _LINES:
            raise ArgumentError(f"/save {rest}: not a file that ends in {_LINES}.", f"Write /save FILE{_LINES}.")
        if not dialogue.turns:
            raise ArgumentError("There is nothing to save yet.", "Ask something first.")
        try:
            with path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                before = file.read()
                file.write(("\n" if before and not before.endswith("\n") else "") + dialogue.record() + "\n")
        except (OSError, ValueError) as error:
            raise EnvironmentProblem(f"{path} can't be written: {error}.", "Name another file.") from error
        num_turns, num_cut = len(dialogue.turns), sum(not turn.is_whole for turn in dialogue.turns)
        cut = f"; {num_cut} of the answers did not come to their end" if num_cut else ""
        turns = "1 turn" if num_turns == 1 else f"{num_turns} turns"
        notice(f"({turns} added to {path}, as one conversation{cut}. To train on it: data.train={path})")
        return True

    def _help(self, rest: str) -> bool:
        for name, (takes, does, _) in self._commands.items():
            notice(f"{f'{name} {takes}':<13} {does}")
        notice('Text of several lines stands between """ and """. Ctrl-C ends an answer.')
        return True

    def _exit(self, rest: str) -> bool:
        return False


def _answer(dialogue: Dialogue, asked: Asked, settings: Settings, show: Callable[[str], None]) -> Answer:
    """Return the answer of one model; Ctrl-C ends it, and the text so far is kept."""
    stream = Stream(dialogue.loaded.tokenizer, show)
    try:
        return dialogue.answer(asked, settings, stream)
    except KeyboardInterrupt:
        return stream.given("interrupted")
