"""What a run did not write is neither moved nor replaced nor deleted by one, wherever the run is told to write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from made_runs import write_run
from sophia_galore.cli.write_back import refuse_other_than_png
from sophia_galore.config import RunConfig, load_config
from sophia_galore.data.stdlib_docs import prepare_sample_data
from sophia_galore.errors import ConfigError, DataError, EnvironmentProblem, UserError
from sophia_galore.records import files as names
from sophia_galore.report.comparison import compare_runs
from sophia_galore.report.run import read_run
from sophia_galore.report.write import write_report
from sophia_galore.train.callback import Callback
from sophia_galore.train.checkpoint import Checkpoint, checkpoints, save_checkpoint
from sophia_galore.train.earlier_run import foreign_files, open_run_folder, protected_paths, refuse_foreign
from sophia_galore.train.folder import locked
from sophia_galore.train.run import train
from sophia_galore.weights.tensor_stream import TensorStream
from unit.cli.tiny_run import World, command, make_world

SHORT = ["training.max_steps=1", "memory.track_steps=0", "memory.predict=false", "data.eval_fraction=0"]


def content(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def save(folder: Path, step: int, keep_last: int = 2) -> Path:
    def write_model(beside: Path) -> None:
        safetensors.torch.save_file({"w": torch.ones(1)}, beside / "model.safetensors")

    documents = {"plan.json": {}, "run_config.json": {}}
    return save_checkpoint(
        folder,
        step,
        optimizer_state=TensorStream.of({"s": torch.ones(1)}),
        write_model=write_model,
        documents=documents,
        keep_last=keep_last,
    )


def earlier_run(folder: Path) -> Path:
    """What a run leaves: records, a checkpoint, a model."""
    for name in (names.METRICS, names.CONFIG, "loss.png", "config.json", "tokenizer.json", "model.safetensors"):
        write(folder / name)
    write(folder / names.PLAN, '{"routes": []}')
    save(folder, 2)
    return folder


def checkpoint_in(run: Path) -> Checkpoint:
    return Checkpoint(run / "checkpoint-2", 2, {}, {})


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


# What lies in the folder beside an earlier run, and words of the refusal.
BESIDE_A_RUN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a file": (lambda run: write(run / "notes.txt"), "notes.txt"),
    "data": (lambda run: write(run / "train.jsonl"), "train.jsonl"),
    "a project": (lambda run: write(run / "src" / "main.py"), "src"),
    "a hidden folder": (lambda run: write(run / ".git" / "config"), ".git"),
    "many files": (lambda run: [write(run / f"{n}.txt") for n in range(5)], "0.txt, 1.txt, 2.txt and 2 more"),
    "a file in a checkpoint": (lambda run: write(run / "checkpoint-2" / "model.gguf"), "checkpoint-2/model.gguf"),
    "a folder called like a checkpoint": (lambda run: write(run / "checkpoint-9" / "x"), "checkpoint-9/x"),
    "other weights": (lambda run: write(run / "adapter.safetensors"), "adapter.safetensors"),
    "a link under a name of ours": (lambda run: link(run / "report.md", run.parent / "elsewhere.md"), "report.md"),
    "spaces and letters of others": (lambda run: write(run / "mes données" / "é.txt"), "mes données"),
    "an ignore file": (lambda run: write(run / ".gitignore"), ".gitignore"),
    "another run inside": (lambda run: earlier_run(run / "better"), "better"),
}


@pytest.mark.parametrize("case", BESIDE_A_RUN)
def test_a_run_is_not_moved_aside_with_what_no_run_wrote(case: str, tmp_path: Path) -> None:
    run = earlier_run(tmp_path / "run")
    put, words = BESIDE_A_RUN[case]
    put(run)
    before = content(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"no run wrote") as caught:
        open_run_folder(run, going_on=None)
    assert words in caught.value.cause and "output_dir" in caught.value.remedy
    assert content(tmp_path) == before
    assert open_run_folder(run, going_on=checkpoint_in(run)) is None  # going on moves nothing


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep"])
def test_what_systems_leave_is_in_nobodys_way(name: str, tmp_path: Path) -> None:
    run = earlier_run(tmp_path / "run")
    write(run / name)
    assert open_run_folder(run, going_on=None) == tmp_path / "run.previous-1"


# Names that a run writes, in a folder that holds no run.
REPLACED = [
    "config.json",
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
    "README.md",
    "plan.json",
    "report.md",
    "checkpoint-20",
    "answers.json",
]


@pytest.mark.parametrize("name", REPLACED)
def test_files_under_a_runs_names_are_not_replaced(name: str, tmp_path: Path) -> None:
    write(tmp_path / "run" / name)
    before = content(tmp_path)
    with pytest.raises(EnvironmentProblem, match="holds no run") as caught:
        open_run_folder(tmp_path / "run", going_on=None)
    assert name in caught.value.cause
    assert content(tmp_path) == before


def test_what_must_stay_is_not_moved(tmp_path: Path) -> None:
    """Under whatever name: these are files that a run writes, too, and links are followed."""
    run = earlier_run(tmp_path / "run")
    link(tmp_path / "link", run)
    for kept in (run / names.CONFIG, tmp_path / "link" / "config.json", run, run / "checkpoint-2"):
        with pytest.raises(EnvironmentProblem, match=r"moved aside, and .* with it"):
            refuse_foreign(run, going_on=None, keep=[tmp_path / "absent", kept])
    refuse_foreign(run, going_on=None, keep=[tmp_path, tmp_path / "run-2", tmp_path / "absent"])


def test_every_path_of_a_configuration_must_stay(tmp_path: Path) -> None:
    values = {
        "model": {"name": "m", "fallback": "f", "cache_dir": "c"},
        "data": {"train": "t", "eval": "e", "eval_fraction": 0.0},
    }
    kept = protected_paths(RunConfig.model_validate(values), Path("run.yaml"), None)
    assert {str(path) for path in kept} == {"m", "f", "c", "t", "e", "run.yaml", str(Path.cwd())}


def test_behind_a_link_the_folder_is_moved_and_the_link_stays(tmp_path: Path) -> None:
    earlier_run(tmp_path / "disk" / "run")
    link(tmp_path / "outputs" / "run", tmp_path / "disk" / "run")
    assert open_run_folder(tmp_path / "outputs" / "run", going_on=None) == tmp_path / "disk" / "run.previous-1"
    assert (tmp_path / "outputs" / "run").is_symlink() and (tmp_path / "disk" / "run").is_dir()
    assert (tmp_path / "disk" / "run.previous-1" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("above", [False, True])
def test_a_link_that_leads_nowhere_is_refused(above: bool, tmp_path: Path) -> None:
    link(tmp_path / "link", tmp_path / "not mounted" / "big")
    with pytest.raises(EnvironmentProblem, match=r"is a link to .*not mounted.*, which is not there"):
        open_run_folder(tmp_path / "link" / "run" if above else tmp_path / "link", going_on=None)
    assert not (tmp_path / "not mounted").exists()


def test_by_two_names_it_is_one_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    link(tmp_path / "link", tmp_path / "run")
    with (
        locked(tmp_path / "run"),
        pytest.raises(EnvironmentProblem, match="Another process"),
        locked(tmp_path / "link"),
    ):
        pass


def test_a_name_that_is_taken_by_a_link_is_not_free(tmp_path: Path) -> None:
    earlier_run(tmp_path / "run")
    link(tmp_path / "run.previous-1", tmp_path / "nowhere")
    assert open_run_folder(tmp_path / "run", going_on=None) == tmp_path / "run.previous-2"


@pytest.mark.parametrize("spelled", ["run/", "x/../run", "./run", "r\u00fcn mit Leerzeichen/"])
def test_spellings_of_a_folder(spelled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    folder = Path(spelled)
    earlier_run(folder)
    moved = open_run_folder(folder, going_on=None)
    assert moved is not None and moved.name.endswith(".previous-1") and moved.parent == tmp_path
    write(folder / names.METRICS)
    write(folder / "notes.txt")
    with pytest.raises(EnvironmentProblem, match=r"notes\.txt"):
        open_run_folder(folder, going_on=None)


def test_the_oldest_checkpoint_goes_without_what_was_put_into_it(tmp_path: Path) -> None:
    first = save(tmp_path, 2)
    write(first / "export" / "model.gguf")
    save(tmp_path, 4)
    save(tmp_path, 6)
    assert content(first) == {"export/model.gguf": b"mine"}
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert foreign_files(tmp_path) == ["checkpoint-2/export"]


def test_a_step_that_is_saved_again_keeps_what_was_put_into_it(tmp_path: Path) -> None:
    write(save(tmp_path, 2) / "notes.txt")
    assert (save(tmp_path, 2) / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_only_called_like_a_checkpoint_stays(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-2"
    if kind == "folder":
        write(place / "mine.txt")
    elif kind == "file":
        write(place)
    else:
        link(place, write(tmp_path / "elsewhere" / "mine.txt").parent)
    before = content(tmp_path)
    assert save(tmp_path, 2).is_dir()
    moved = {name.replace("checkpoint-2", "checkpoint-2.previous-1"): text for name, text in before.items()}
    assert moved.items() <= content(tmp_path).items()


def test_a_checkpoint_that_was_moved_elsewhere_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    save(tmp_path / "run", 2).rename(tmp_path / "disk" / "kept")
    link(tmp_path / "run" / "checkpoint-2", tmp_path / "disk" / "kept")
    for step in (4, 6):
        save(tmp_path / "run", step)
    assert (tmp_path / "disk" / "kept" / "model.safetensors").is_file()


def test_a_report_replaces_reports_only(tmp_path: Path) -> None:
    comparison = compare_runs([read_run(write_run(tmp_path / "run"))])
    write(tmp_path / "out" / "report.md")
    with pytest.raises(EnvironmentProblem, match=r"report\.md exists"):
        write_report(comparison, tmp_path / "out")
    write(tmp_path / "out" / "report.json", '{"mine": 1}')
    with pytest.raises(EnvironmentProblem, match="exists"):
        write_report(comparison, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "report.json"}
    for _ in range(2):
        write_report(comparison, tmp_path / "new")


@pytest.mark.parametrize(
    "text",
    ["[]x", "mine", '[{"instruction": "Mine?", "input": "", "output": "x"}]', '{"instruction": 1}', '[["a"]]'],
)
def test_sample_data_replace_sample_data_only(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "sample_data.json", text)
    with pytest.raises(DataError, match="holds other records"):
        prepare_sample_data(path)
    assert path.read_text() == text


def test_a_picture_replaces_pictures_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no PNG picture"):
        refuse_other_than_png(write(tmp_path / "notes.txt"))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    refuse_other_than_png(tmp_path / "a.png")
    refuse_other_than_png(tmp_path / "new.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_all_that_a_run_writes_is_known_as_a_runs(world: World) -> None:
    """Also what other parts of the program put into its folder, now or later."""
    words = [
        *SHORT,
        "checkpoint.save_every_steps=1",
        'training.sample_questions=["a"]',
        "training.report_to=tensorboard",
    ]
    ended = world.train("whole", *words, "training.sample_max_new_tokens=1")
    assert ended.code == 0, ended.err
    run = world.folder / "whole"
    assert command("report", str(run)).code == 0
    assert foreign_files(run) == []
    # Known by the list, whatever a tokenizer calls its files.
    listed = json.loads((run / names.WRITTEN).read_text())
    assert "model.safetensors" in listed and "tokenizer.json" in listed
    listed.append("tekken.bin")
    write(run / names.WRITTEN, json.dumps(listed))
    write(run / "tekken.bin")
    assert foreign_files(run) == []
    again = world.train("whole", *SHORT)
    assert again.code == 0 and "was moved to" in again.out


def test_a_project_folder_survives_two_runs(world: World) -> None:
    """The first run writes beside what is there; the second would move it."""
    project = world.folder / "project"
    write(project / "thesis.tex")
    data = write(project / "data" / "mine.json", world.data.read_text())
    first = world.train("project", *SHORT, f"data.train={data}")
    assert first.code == 0, first.err
    before = content(project)
    for words in ([f"data.train={data}"], []):
        second = world.train("project", *SHORT, *words)
        assert second.code == 2 and "Traceback" not in second.err
        assert "would be moved aside" in second.err and ("mine.json" in second.err or "thesis.tex" in second.err)
        assert content(project) == before
    assert command("check", "--config", str(world.config), f"training.output_dir={project}").code == 2


def test_the_configuration_in_a_runs_folder_is_not_moved(world: World) -> None:
    assert world.train("configured", *SHORT).code == 0
    run = world.folder / "configured"
    before = content(run)
    again = command("train", "--config", str(run / names.CONFIG))
    assert again.code == 2 and "run_config.yaml with it" in again.err
    assert content(run) == before
    # Going on is what that file is for.
    assert command("train", "--config", str(run / names.CONFIG), "--resume").code == 0


@pytest.mark.parametrize("place", ["here", "above", "home", "root"])
def test_places_that_are_no_folder_for_a_run(
    place: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "deep").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "deep")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    folder = {"here": ".", "above": "..", "home": "~/", "root": "/"}[place]
    with pytest.raises(ConfigError, match="or one above it"):
        train(load_config(world.config, [*SHORT, f"training.output_dir={folder}"]), Callback())


def test_a_file_in_place_of_the_folder(world: World, tmp_path: Path) -> None:
    write(tmp_path / "run")
    with pytest.raises(UserError, match="can't be written to"):
        train(load_config(world.config, [*SHORT, f"training.output_dir={tmp_path / 'run'}"]), Callback())
    assert (tmp_path / "run").read_text() == "mine"


def test_going_on_elsewhere_does_not_move_the_checkpoint_it_goes_on_from(world: World) -> None:
    ended = world.train("outer", *SHORT, "checkpoint.save_every_steps=1", "training.max_steps=2")
    assert ended.code == 0, ended.err
    run = world.folder / "outer"
    (run / "checkpoint-2").rename(run / "checkpoint-1" / "inner")
    before = content(run)
    ended = world.train("outer", *SHORT, "training.max_steps=3", f"--resume={run / 'checkpoint-1' / 'inner'}")
    assert ended.code == 2 and "with it" in ended.err
    assert content(run) == before
