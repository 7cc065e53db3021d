"""The runs of a comparison, and checks that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
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

# Keys in which the runs of a comparison always differ.
_OWN = ("training.output_dir", "training.seed")


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        name: The name of its configuration: the file's name without its ending.
        seed: `training.seed`.
        config: Its configuration.
        words: The arguments of `sophia-galore` that start it.
        folder: The run's folder.
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
        """The file for the run's output, beside its folder. Names of configurations may have dots."""
        return self.folder.with_name(f"{self.folder.name}.log")


def design(paths: Sequence[Path], *, num_seeds: int, output: Path, overrides: Sequence[str]) -> list[Trial]:
    """Make the runs of a comparison from configurations.

    `data.seed` and `data.date` are set, so that all runs see the same examples. Runs of the same seed come together, so
    that a comparison that is stopped early has complete seeds.

    Args:
        paths: YAML files of configurations, two or more, or one with several seeds.
        num_seeds: Number of seeds, from `training.seed` on.
        output: The folder of the comparison.
        overrides: Words `key.path=value` for all runs.

    Returns:
        The runs in order.

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
    """Return the keys in which the configurations differ, with their values by configuration.

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
    """Prepare one run of each configuration without weights, to find errors before hours of training.

    Args:
        trials: The runs.

    Returns:
        The fingerprint of the data.

    Raises:
        UserError: A run can't be started, or would see other tokens than the first, for example because of another
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
    """Return the date of the first start of a resumed comparison; None if it is not known."""
    known = (find_config(folder) for folder in sorted((output / RUNS).glob("*-seed*")) if folder.is_dir())
    return next((config.data.date for config in known if config is not None and config.data.date), None)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return the files' names without ending, with folders as far as needed to make them unique."""
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
    there = _shared_settings(configs[first])
    for name in others:
        here = _shared_settings(configs[name])
        different = [
            f"{key} ({there[key]} in {first}, {here[key]} in {name})" for key in here if here[key] != there[key]
        ]
        if different:
            raise ConfigError(
                f"The runs would not see the same data: {'; '.join(different)}.",
                "Make these the same in the files, or say them for all at the end of the command: key.path=value.",
            )


def _shared_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings that decide which examples a run sees, in which order and how many."""
    training = config.training
    return {f"data.{key}": value for key, value in config.data.model_dump().items()} | {
        "training.seed": training.seed,
        "training.max_length": training.max_length,
        "training.epochs": None if training.max_steps else training.epochs,
        "training.max_steps": training.max_steps,
        "training.batch_size x training.gradient_accumulation_steps": (
            training.batch_size * training.gradient_accumulation_steps
        ),
    }
