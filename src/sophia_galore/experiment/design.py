"""Which runs a comparison consists of, and whether they can be compared at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.dump import changed, flatten
from sophia_galore.data.template_date import today
from sophia_galore.errors import ArgumentError, ConfigError
from sophia_galore.records.files import RUNS
from sophia_galore.train.callback import Callback
from sophia_galore.train.prepare import prepare
from sophia_galore.train.result import find_config

# What decides on which examples, in which order and on how many of them a run is trained and measured.
_SAME: dict[str, Callable[[RunConfig], Any]] = {
    "training.seed": lambda config: config.training.seed,
    "training.max_length": lambda config: config.training.max_length,
    "training.epochs": lambda config: config.training.epochs if not config.training.max_steps else None,
    "training.max_steps": lambda config: config.training.max_steps,
    "training.batch_size x training.gradient_accumulation_steps": lambda config: (
        config.training.batch_size * config.training.gradient_accumulation_steps
    ),
}
# Where runs always differ.
_OWN = ("training.output_dir", "training.seed")


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        name: What its configuration is called: the file's name without its ending.
        seed: `training.seed`.
        config: What is asked of it.
        words: The arguments of `sophia-galore` that carry it out.
        folder: Where it will lie.
    """

    name: str
    seed: int
    config: RunConfig
    words: tuple[str, ...]
    folder: Path

    @property
    def label(self) -> str:
        """`galore, seed 42`."""
        return f"{self.name}, seed {self.seed}"

    @property
    def log(self) -> Path:
        """The file for what it prints, beside its folder. Names of configurations may have dots."""
        return self.folder.with_name(f"{self.folder.name}.log")


def design(paths: Sequence[Path], *, num_seeds: int, output: Path, overrides: Sequence[str]) -> list[Trial]:
    """Make the runs of a comparison out of configurations.

    All see the same examples, whatever their seed and the day: `data.seed` and `data.date` are set. The runs of one
    seed stand together, so that a comparison that is cut short has whole seeds.

    Args:
        paths: YAML files of configurations, two or more, or one with several seeds.
        num_seeds: So many seeds, from `training.seed` on.
        output: Folder of the comparison.
        overrides: Words `key.path=value` for all of them.

    Returns:
        The runs in the order in which they are to be carried out.

    Raises:
        ArgumentError: A file is named twice, or an override says what the comparison decides.
        ConfigError: Something is wrong in a configuration, or they would not be trained and measured on the same data.
    """
    names = _names(paths)
    for word in overrides:
        if word.partition("=")[0] == "training.output_dir":
            raise ArgumentError(f"{word}: the runs of a comparison lie in its own folder.", "Use --output instead.")
    configs = {name: load_config(path, overrides) for name, path in zip(names, paths, strict=True)}
    _refuse_other_data(configs)
    first = next(iter(configs.values()))
    base = first.training.seed
    data_seed = base if first.data.seed is None else first.data.seed
    date = first.data.date or _begun_on(output) or today()
    trials = []
    for seed in range(base, base + num_seeds):
        for name, path in zip(names, paths, strict=True):
            folder = output / RUNS / f"{name}-seed{seed}"
            decided = {"training.seed": seed, "data.seed": data_seed, "data.date": date}
            own = [*(f"{key}={value}" for key, value in decided.items()), f"training.output_dir={folder}"]
            words = [*(word for word in overrides if word.partition("=")[0] not in decided), *own]
            trials.append(Trial(name, seed, load_config(path, words), ("train", "--config", str(path), *words), folder))
    return trials


def differences(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """The keys in which the configurations differ, each with its values by name.

    Args:
        trials: The runs.
    """
    by_name = {trial.name: flatten(trial.config) for trial in reversed(trials)}
    by_name = {trial.name: by_name[trial.name] for trial in trials}
    keys = next(iter(by_name.values()))
    found = {key: {name: values[key] for name, values in by_name.items()} for key in keys if key not in _OWN}
    first = trials[0].name
    return {key: values for key, values in found.items() if any(value != values[first] for value in values.values())}


def refuse_incomparable(trials: Sequence[Trial]) -> str:
    """Prepare one run of each name, without loading a weight: what would fail is found before hours of training.

    Args:
        trials: The runs.

    Returns:
        The fingerprint of the data.

    Raises:
        UserError: A run can't be carried out, or would see other tokens than the first, such as those of another
            tokenizer.
    """
    firsts: dict[str, Trial] = {}
    for trial in trials:
        firsts.setdefault(trial.name, trial)
    first, found = "", ("", 0)
    for name, trial in firsts.items():
        plan = prepare(changed(trial.config, {"memory.predict": False}), Callback()).plan
        here = (plan.data_fingerprint, plan.num_steps)
        if not first:
            first, found = name, here
        elif here != found:
            raise ConfigError(
                f"{name} would not be trained and measured on the same tokens as {first}: their data fingerprints are "
                f"{here[0][:12]} and {found[0][:12]}, their steps {here[1]} and {found[1]}.",
                "Compare models that share a tokenizer and a chat template, on the same data.",
            )
    return found[0]


def _begun_on(output: Path) -> str | None:
    """The day on which a comparison that goes on was begun; None: there is none, or it is an older version's."""
    known = (find_config(folder) for folder in sorted((output / RUNS).glob("*-seed*")) if folder.is_dir())
    return next((config.data.date for config in known if config is not None and config.data.date), None)


def _names(paths: Sequence[Path]) -> list[str]:
    """The files' names without ending; with their folders, as far as that is needed to tell them apart."""
    whole = [path.resolve().with_suffix("") for path in paths]
    if len(set(whole)) < len(whole):
        twice = next(path for place, path in enumerate(paths) if whole[place] in whole[:place])
        raise ArgumentError(f"{twice} is named twice.", "Name each configuration once; --seeds repeats them.")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["-".join(path.parts[-depth:]) for path in whole]


def _refuse_other_data(configs: dict[str, RunConfig]) -> None:
    first, *others = configs
    there = _decisive(configs[first])
    for name in others:
        here = _decisive(configs[name])
        different = [
            f"{key} ({there[key]} in {first}, {here[key]} in {name})" for key in here if here[key] != there[key]
        ]
        if different:
            raise ConfigError(
                f"The runs would not see the same data: {'; '.join(different)}.",
                "Make these the same in the files, or say them for all at the end of the command: key.path=value.",
            )


def _decisive(config: RunConfig) -> dict[str, Any]:
    data = {f"data.{key}": value for key, value in config.data.model_dump().items()}
    return data | {key: value_of(config) for key, value_of in _SAME.items()}
