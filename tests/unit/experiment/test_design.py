"""Which runs a comparison consists of, and what can't be compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sophia_galore.config import dump_config, load_config
from sophia_galore.errors import ArgumentError, ConfigError
from sophia_galore.experiment.design import Trial, design, differences, refuse_incomparable
from tiny import write_tiny_data
from unit.cli.tiny_run import World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def variant(world: World, name: str, line: str = "") -> Path:
    """The world's configuration with another line for the key that the line is for."""
    text = world.config.read_text()
    if line:
        text, count = re.subn(rf"(?m)^( *){line.partition(':')[0]}:.*$", rf"\g<1>{line}", text)
        assert count == 1
    path = world.folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def trials(paths: list[Path], *overrides: str, seeds: int = 1) -> list[Trial]:
    return design(paths, num_seeds=seeds, output=Path("out"), overrides=overrides)


def test_each_configuration_meets_each_seed_on_the_same_examples(world: World) -> None:
    other = variant(world, "adamw.yaml", "optimizer: {type: adamw}")
    found = trials([world.config, other], "training.max_steps=3", seeds=2)
    assert [(trial.name, trial.seed) for trial in found] == [
        ("config", 42),
        ("adamw", 42),
        ("config", 43),
        ("adamw", 43),
    ]
    for trial in found:
        assert trial.config.data.seed == 42
        assert trial.config.training.seed == trial.seed
        assert trial.config.training.max_steps == 3
        assert trial.config.run_folder == str(trial.folder) == f"out/runs/{trial.name}-seed{trial.seed}"
    date = found[0].config.data.date
    assert date and all(trial.config.data.date == date for trial in found)
    assert found[1].words == (
        *("train", "--config", str(other), "training.max_steps=3"),
        *("training.seed=42", "data.seed=42", f"data.date={date}", "training.output_dir=out/runs/adamw-seed42"),
    )
    assert list(differences(found)) == ["optimizer.type", "optimizer.galore.rank", "optimizer.galore.update_proj_gap"]
    assert differences(found)["optimizer.type"] == {"config": "galore", "adamw": "adamw"}


def test_seeds_can_be_said(world: World) -> None:
    found = trials([world.config], "training.seed=7", "data.seed=1", seeds=3)
    assert [(trial.seed, trial.config.data.seed) for trial in found] == [(7, 1), (8, 1), (9, 1)]
    assert found[2].words.count("training.seed=9") == 1


def test_a_comparison_that_goes_on_keeps_the_day_on_which_it_began(world: World, tmp_path: Path) -> None:
    words = [f"training.output_dir={tmp_path / 'runs' / 'config-seed42'}", "data.date=2020-02-03"]
    run = tmp_path / "runs" / "config-seed42"
    run.mkdir(parents=True)
    (run / "run_config.yaml").write_text(dump_config(load_config(world.config, words)))
    found = design([world.config], num_seeds=2, output=tmp_path, overrides=[])
    assert [trial.config.data.date for trial in found] == ["2020-02-03", "2020-02-03"]


def test_names_are_as_long_as_is_needed(world: World) -> None:
    paths = [variant(world, f"{folder}/run.yaml") for folder in ("a", "b")]
    assert [trial.name for trial in trials(paths)] == ["a-run", "b-run"]


OTHER_DATA = [
    ("data: {train: other.json}", "data.train"),
    ("max_length: 32", "training.max_length (64 in config, 32 in other)"),
    ("epochs: 3", "training.epochs (2.0 in config, 3.0 in other)"),
    ("batch_size: 4", "training.batch_size x training.gradient_accumulation_steps (4 in config, 8"),
]


@pytest.mark.parametrize(("line", "words"), OTHER_DATA)
def test_other_data_are_refused(line: str, words: str, world: World) -> None:
    with pytest.raises(ConfigError) as raised:
        trials([world.config, variant(world, "other.yaml", line)])
    assert words in raised.value.cause


def test_what_is_said_for_all_makes_them_equal(world: World) -> None:
    other = variant(world, "other.yaml", "max_length: 32")
    assert len(trials([world.config, other], "training.max_length=32")) == 2


def test_the_same_effective_batch_in_other_pieces_is_the_same(world: World) -> None:
    text = world.config.read_text().replace("batch_size: 2", "batch_size: 4")
    other = world.folder / "pieces.yaml"
    other.write_text(text.replace("gradient_accumulation_steps: 2", "gradient_accumulation_steps: 1"))
    found = trials([world.config, other])
    refuse_incomparable(found)
    assert set(differences(found)) == {"training.batch_size", "training.gradient_accumulation_steps"}


def test_arguments_that_make_no_comparison(world: World) -> None:
    with pytest.raises(ArgumentError, match="is named twice"):
        trials([world.config, world.config])
    with pytest.raises(ArgumentError, match=r"training\.output_dir"):
        trials([world.config], "training.output_dir=elsewhere")


def test_other_tokens_are_refused_before_any_run(world: World, tmp_path: Path) -> None:
    """The same keys, but another file under the same name: only the tokens tell."""
    first = trials([world.config])
    write_tiny_data(tmp_path / "data.json", num_records=30)
    changed = world.config.read_text().replace(str(world.data), str(tmp_path / "data.json"))
    (tmp_path / "other.yaml").write_text(changed)
    second = trials([tmp_path / "other.yaml"])
    with pytest.raises(ConfigError, match="same tokens"):
        refuse_incomparable([*first, *second])
    assert len(refuse_incomparable(first)) == 64
    assert not (Path("out") / "runs").exists()
