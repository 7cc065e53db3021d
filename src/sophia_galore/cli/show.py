"""The output of a run on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.status import Status
from rich.text import Text

from sophia_galore.cli.bars import print_wide
from sophia_galore.cli.route_tables import arranged, parameter_table, plan_table, remarks, trained_share, verdict_line
from sophia_galore.config.schema_data import DataConfig, sources_in_words
from sophia_galore.config.size import bytes_in_words
from sophia_galore.data.dataset import Dataset
from sophia_galore.data.gather import FileRead
from sophia_galore.plan.plan import RunPlan
from sophia_galore.records.files import BAD_RECORDS
from sophia_galore.report.warnings import REPEATED
from sophia_galore.train.callback import Callback

_LONGEST_EXAMPLE = 900
_MOST_FILES = 20
"""The number of files that are named one by one; further ones are summed up."""


def file_lines(files: Sequence[FileRead]) -> list[str]:
    """Return a line for each data file; none for a single file without a note.

    Args:
        files: The files that were read or left alone.
    """
    if len(files) == 1 and not files[0].note:
        return []
    lines = []
    for file in files[:_MOST_FILES]:
        note = f" ({file.note})" if file.note else ""
        read = f"{file.use}, {file.num_records} records, {file.format}" if file.use != "left alone" else file.use
        lines.append(f"{file.name}: {read}{note}")
    if more := files[_MOST_FILES:]:
        lines.append(f"and {len(more)} more files with {sum(file.num_records for file in more)} records")
    return lines


def time_in_words(seconds: float) -> str:
    """Format seconds as "1:02:03" or "2:03"."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Terminal(Callback):
    """Shows a run: a line for each step, and on a terminal a status line while a step is running.

    Args:
        logging_steps: Keep the line of every so many steps.
    """

    def __init__(self, logging_steps: int = 1) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self._logging_steps = logging_steps
        self._status: Status | None = None
        self._on_cpu = True

    def say(self, text: str) -> None:
        """Print a sentence."""
        self.console.print(text, markup=False)

    def data_read(self, asked: DataConfig, dataset: Dataset) -> None:
        """Show what was read and what can't be used."""
        for line in file_lines(dataset.files):
            self.say(line)
        if asked.eval is None and any(file.use == "eval" for file in dataset.files):
            self.say("What is evaluated on is the folder's own validation part; nothing is held out.")
        parts = (
            ("train", sources_in_words(asked.train), dataset.summary.train),
            ("eval", sources_in_words(asked.eval or asked.train), dataset.summary.eval),
        )
        for use, source, part in parts:
            if not part.num_records:
                continue
            self.say(
                f"{source}, {use}: {part.num_examples} of {part.num_records} records, "
                f"{part.num_tokens:,} tokens ({part.num_counted / part.num_tokens:.0%} counted by the loss), "
                f"longest {part.longest}; {part.num_cut} cut to max_length, "
                f"{part.num_dropped + part.num_cut_empty} dropped as too long."
            )
        self.say(f"Format of the training records: {dataset.format}.")
        if dataset.bad:
            self._warn(
                f"{len(dataset.bad)} records can't be used and are left out; {BAD_RECORDS} in the run's folder "
                f"lists them. The first: {dataset.bad[0].where}: {dataset.bad[0].reason}"
            )
        if dataset.summary.num_shared:
            self._warn(
                f"{dataset.summary.num_shared} training records are in the evaluation data too: "
                "its loss will look better than it is."
            )
        repeated = dataset.repetition
        if repeated is not None and repeated.share > REPEATED:
            self._warn(
                f"The evaluation data repeat the training data: {repeated.share:.0%} of what is counted can be told "
                f"from word sequences of the training data alone (loss {repeated.loss:.2f}), so a low eval loss will "
                "say little."
            )

    def planned(self, plan: RunPlan) -> None:
        """Show which rule trains which parameters, and what the run needs."""
        self._on_cpu = plan.device == "cpu"
        self.console.print(plan_table(plan))
        if said := remarks(plan):
            self.say(f"Also: {said}.")
        self.console.print(trained_share(plan))
        standing = ", ".join(f"{name} {bytes_in_words(size)}" for name, size in plan.standing_bytes.items() if size)
        self.say(
            f"{plan.num_steps} steps on {plan.num_train_examples} examples "
            f"({plan.steps_per_epoch} steps an epoch), {plan.num_eval_examples} held out; "
            f"{plan.device}, {plan.compute_dtype} arithmetic; weights and states: {standing}."
        )
        if said := arranged(plan):
            self.say(said)
        for verdict in plan.verdicts:
            self.console.print(verdict_line(verdict))
        shown = {verdict.sentence() for verdict in plan.verdicts}
        for note in plan.notes:
            if note not in shown:
                self._warn(note)

    def routed(self, plan: RunPlan) -> None:
        """Show every parameter."""
        print_wide(self.console, parameter_table(plan))

    def examples(self, rendered: list[list[tuple[str, bool]]]) -> None:
        """Show training examples; the counted tokens are marked."""
        for number, segments in enumerate(rendered, 1):
            text = Text()
            for part, counted in segments:
                # Brackets too, since colours are lost where the output goes to a file.
                text.append(f"⟦{part}⟧" if counted else part, style="green" if counted else "dim")
            text.truncate(_LONGEST_EXAMPLE, overflow="ellipsis")
            self.console.print(f"Training example {number} (the loss counts what is in ⟦green brackets⟧):")
            self.console.print(text)

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        """Show one step."""
        line = (
            f"step {record['step']:>{len(str(num_steps))}}/{num_steps}  loss {record['loss']:.4f}  "
            f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:.0f} tokens/s  "
            f"{bytes_in_words(record['process_bytes'] if self._on_cpu else record['reserved_bytes'])}  "
            f"{time_in_words(seconds_left)} left"
        )
        self.clear_status()
        stays = record["step"] % self._logging_steps == 0 or record["step"] == num_steps
        if stays:
            self.say(line)
        if self.console.is_terminal and record["step"] < num_steps:
            running = f"step {record['step'] + 1}/{num_steps} is running, {time_in_words(seconds_left)} left"
            self._status = self.console.status(running if stays else line)
            self._status.start()

    def evaluated(self, step: int, eval_loss: float) -> None:
        """Show one evaluation."""
        self.clear_status()
        self.console.print(f"eval loss {eval_loss:.4f} after step {step}", style="bold", markup=False)

    def answered(self, when: str, answers: list[tuple[str, str]]) -> None:
        """Show the answers before training; those after training are compared with them at the end."""
        self.clear_status()
        if when == "after":
            return
        for question, given in answers:
            self.console.print(question, style="bold cyan", markup=False)
            self.console.print(f"  before: {given}", markup=False)

    def _warn(self, text: str) -> None:
        self.console.print(text, style="bold yellow", markup=False)

    def clear_status(self) -> None:
        """Remove the line of the step that is running."""
        if self._status is not None:
            self._status.stop()
            self._status = None
