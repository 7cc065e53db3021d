"""What is checked before a weight is loaded: room, permission, special tokens, template; `check` does it too."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sophia_galore.config import load_config
from sophia_galore.data.example import Example
from sophia_galore.data.feed import Feed
from sophia_galore.errors import EnvironmentProblem, ModelError
from sophia_galore.train import space as space_module
from sophia_galore.train.callback import Callback
from sophia_galore.train.folder import nearest_folder, refuse_unwritable
from sophia_galore.train.prepare import Prepared, prepare
from sophia_galore.train.space import Space, refuse_full_disk, space_needed
from sophia_galore.train.special_tokens import refuse_special_tokens, stop_warning
from tiny import VOCAB
from unit.cli.tiny_run import Ended, World, command, make_world

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def prepared(world: World) -> Prepared:
    return prepare(load_config(world.config, []), Callback())


def check(world: World, *words: str) -> Ended:
    return command("check", "--config", str(world.config), *words)


def give_free(monkeypatch: pytest.MonkeyPatch, free: int) -> list[Path]:
    """Let every disk have so much room; returns the places that are asked about."""
    asked: list[Path] = []

    def usage(place: Path) -> Usage:
        asked.append(place)
        return Usage(2 * free, free, free)

    monkeypatch.setattr(space_module.shutil, "disk_usage", usage)
    return asked


# ---- room


def test_there_must_be_room_to_the_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Space(num_checkpoints=3, checkpoint_bytes=2**30, model_bytes=2**29)
    asked = give_free(monkeypatch, 3 * 2**30 + 2**29)
    refuse_full_disk(tmp_path / "a" / "run", space)
    assert asked == [tmp_path], "the nearest folder that is there"
    give_free(monkeypatch, 3 * 2**30 + 2**29 - 1)
    with pytest.raises(EnvironmentProblem) as caught:
        refuse_full_disk(tmp_path / "a" / "run", space)
    for words in ("will write 3.50 GiB", str(tmp_path), "3.50 GiB free", "3 checkpoints at once of 1.00 GiB"):
        assert words in caught.value.cause
    for words in ("checkpoint.keep_last", "training.output_dir", "model.store=bf16"):
        assert words in caught.value.remedy


@pytest.mark.parametrize(
    ("words", "done", "kept", "expected"),
    [
        ([], 0, 0, 1),  # none is asked for, but stopping makes one
        (["checkpoint.save_every_steps=3"], 0, 0, 3),
        (["checkpoint.save_every_steps=3", "checkpoint.keep_last=9"], 0, 0, 4),  # after 3, 6, 9 of 10
        (["checkpoint.save_every_steps=3", "checkpoint.keep_last=9"], 4, 1, 3),
        (["checkpoint.save_every_steps=3", "checkpoint.keep_last=2"], 4, 1, 2),
        (["checkpoint.save_every_steps=3", "checkpoint.keep_last=2"], 7, 2, 1),
        (["checkpoint.save_every_steps=3", "checkpoint.keep_last=1"], 7, 5, 1),
        (["checkpoint.save_every_steps=11"], 0, 0, 1),
        (["checkpoint.save_every_minutes=1", "checkpoint.keep_last=4"], 0, 0, 5),
        (["checkpoint.save_every_minutes=1", "checkpoint.keep_last=400"], 0, 0, 11),
        # Of 5 steps an epoch, so evaluated twice; the best one stays beside those that are kept.
        (["load_best_model_at_end=true"], 0, 0, 3),
        (["load_best_model_at_end=true", "checkpoint.save_every_steps=3"], 0, 0, 4),
        (["load_best_model_at_end=true", "checkpoint.keep_last=1", "eval_steps=1"], 0, 0, 3),
        (["load_best_model_at_end=true", "checkpoint.keep_last=1", "eval_steps=1"], 4, 2, 1),
    ],
)
def test_how_many_checkpoints_there_will_be(
    words: list[str], done: int, kept: int, expected: int, world: World, prepared: Prepared
) -> None:
    config = load_config(world.config, words)
    assert prepared.plan.num_steps == 10
    assert space_needed(config, prepared.plan, done=done, kept=kept).num_checkpoints == expected


@pytest.mark.parametrize(
    ("words", "bytes_each"),
    [
        ([], 4),
        (["model.store=bf16"], 2),
        (["export.dtype=fp16"], 2),
        (["quantization.load_in_8bit=true"], 2),
        (["quantization.load_in_8bit=true", "export.dtype=fp32"], 4),
    ],
)
def test_what_is_announced_is_what_is_written(
    words: list[str], bytes_each: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space_module, "_DOCUMENTS_BYTES", 0)
    config = load_config(world.config, words)
    plan = prepare(config, Callback()).plan
    space = space_needed(config, plan)
    assert space.model_bytes == bytes_each * plan.num_parameters
    ended = world.train(
        str(tmp_path / "run"), *words, "training.max_steps=1", "checkpoint.save_every_steps=1", "memory.track_steps=0"
    )
    assert ended.code == 0, ended.err
    header = 60_000  # names, shapes and alignment
    saved = tmp_path / "run" / "checkpoint-1"
    tensors = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    assert space.checkpoint_bytes < tensors < space.checkpoint_bytes + header
    written = (tmp_path / "run" / "model.safetensors").stat().st_size
    assert space.model_bytes < written < space.model_bytes + header


def test_files_of_layers_take_room_beside_the_checkpoints(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["memory.placement=disk", "memory.predict=false", f"training.output_dir={tmp_path / 'run'}"]
    seen: list[Space] = []
    with monkeypatch.context() as patch:
        patch.setattr("sophia_galore.train.preflight.refuse_full_disk", lambda folder, space: seen.append(space))
        prepared = prepare(load_config(world.config, words), Callback())
    (space,) = seen
    assert space.streamed_bytes == prepared.streamed.bytes_in("disk") > 0
    give_free(monkeypatch, space.total_bytes - 1)
    with pytest.raises(EnvironmentProblem, match="layers that live on disk of "):
        refuse_full_disk(tmp_path / "run", space)


@pytest.mark.parametrize("kind", ["train", "check"])
def test_a_disk_without_room_ends_the_command(
    kind: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_free(monkeypatch, 10**6)
    ended = command(kind, "--config", str(world.config), f"training.output_dir={tmp_path / 'run'}")
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "will write" in ended.err and "977 KiB free" in ended.err and "checkpoint.keep_last" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_counts_the_checkpoints_that_are_there(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(tmp_path / "run"), "checkpoint.save_every_steps=1", "memory.track_steps=0"]
    assert world.train(*words, "training.max_steps=3", "training.lr_scheduler_type=constant").code == 0
    seen: list[Space] = []
    monkeypatch.setattr("sophia_galore.train.preflight.refuse_full_disk", lambda folder, space: seen.append(space))
    more = ["training.max_steps=5", "training.lr_scheduler_type=constant", "--resume"]
    assert world.train(*words, *more).code == 0
    assert [space.num_checkpoints for space in seen] == [1], "two are there and go as two more come"


# ---- permission


def test_a_place_that_can_be_written_to_stays_as_it_is(tmp_path: Path) -> None:
    for folder in (tmp_path / "run", tmp_path / "a" / "b" / "run", tmp_path):
        refuse_unwritable(folder)
    assert list(tmp_path.iterdir()) == []
    assert nearest_folder(tmp_path / "a" / "b") == tmp_path and nearest_folder(tmp_path) == tmp_path


@pytest.mark.parametrize("where", ["file", "file/run", "file/deeper/run"])
@pytest.mark.parametrize("kind", ["train", "check"])
def test_a_file_in_the_way(where: str, kind: str, world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = command(kind, "--config", str(world.config), f"training.output_dir={tmp_path / where}")
    assert ended.code == 2
    assert "can't be written to: Not a directory" in ended.err and "training.output_dir" in ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write anywhere")
@pytest.mark.parametrize("locked_folder", ["parent", "parent/run"])
def test_a_folder_without_permission(locked_folder: str, tmp_path: Path) -> None:
    (tmp_path / "parent" / "run").mkdir(parents=True)
    (tmp_path / locked_folder).chmod(0o500)
    try:
        with pytest.raises(EnvironmentProblem, match="can't be written to: Permission denied"):
            refuse_unwritable(tmp_path / "parent" / "run")
    finally:
        (tmp_path / locked_folder).chmod(0o700)


def test_a_disk_that_is_read_only_is_found_whoever_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(dir: Path) -> None:
        raise OSError(30, "Read-only file system", str(dir))

    monkeypatch.setattr("sophia_galore.train.folder.tempfile.TemporaryFile", read_only)
    with pytest.raises(EnvironmentProblem, match="can't be written to: Read-only file system"):
        refuse_unwritable(tmp_path / "run")


# ---- special tokens


def tokens(**ids: Any) -> Any:
    return SimpleNamespace(**{f"{kind}_token_id": token for kind, token in ids.items()})


@pytest.mark.parametrize("who", ["tokenizer", "generation_config", "model_config"])
@pytest.mark.parametrize("kind", ["bos", "eos", "pad"])
def test_a_special_token_needs_a_row(who: str, kind: str) -> None:
    held = {"tokenizer": tokens(eos=1), "generation_config": tokens(), "model_config": tokens()}
    for token, fits in ((None, True), (-1, True), (9, True), ([1, 9], True), (10, False), ([1, 10], False)):
        setattr(held[who], f"{kind}_token_id", token)
        held["model_config"].vocab_size = 10
        if fits:
            refuse_special_tokens(**held)
        else:
            with pytest.raises(ModelError, match=r"number 10, but .* only 10 rows") as caught:
                refuse_special_tokens(**held)
            assert ("padding" in caught.value.remedy) == (kind == "pad")


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def add_padding_token(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more {number}>" for number in range(VOCAB - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == VOCAB
    tokenizer.save_pretrained(folder)


def set_template(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)


MODELS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "padding of the tokenizer": (add_padding_token, ["The tokenizer", "padding token", "number 320", "only 320 rows"]),
    "padding of the model": (
        lambda folder: edit_json(folder / "config.json", pad_token_id=VOCAB),
        ["config.json", "padding token"],
    ),
    "end of generation": (
        lambda folder: edit_json(folder / "generation_config.json", eos_token_id=[2, 999]),
        ["generation_config.json", "end-of-text token is number 999"],
    ),
    "broken generation_config": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        ["generation_config.json", "can't be read"],
    ),
    "broken template": (
        lambda folder: set_template(folder, "{% for message in messages %}"),
        ["chat template fails even on one question", "chat_template"],
    ),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), ["no chat template", "`text`"]),
}


@pytest.mark.parametrize("kind", ["train", "check"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_tokens_or_template_dont_fit(name: str, kind: str, world: World, tmp_path: Path) -> None:
    damage, expected = MODELS[name]
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    damage(folder)
    words = [f"model.name={folder}", f"training.output_dir={tmp_path / 'run'}"]
    ended = command(kind, "--config", str(world.config), *words)
    assert ended.code == 2 and "Traceback" not in ended.err
    for said in expected:
        assert said in ended.err, ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- where to stop


def stop_of(prepared: Prepared, **changed: Any) -> str | None:
    given = {
        "model_config": prepared.model_config,
        "tokenizer": prepared.tokenizer,
        "generation_config": prepared.generation_config,
    }
    return stop_warning(prepared.dataset.train, **{**given, **changed})


def test_nothing_is_said_of_a_model_that_learns_to_stop(prepared: Prepared) -> None:
    assert stop_of(prepared) is None
    assert stop_of(prepared, generation_config=None) is None
    assert stop_of(prepared, generation_config=tokens(eos=[5, 2])) is None
    assert prepared.plan.notes == ()


def test_a_model_without_an_end_of_text_token(prepared: Prepared) -> None:
    said = stop_of(prepared, tokenizer=tokens(eos=None), model_config=tokens(), generation_config=tokens(eos=None))
    assert said is not None and "names an end-of-text token" in said
    # The template may write one that only the model's settings name.
    assert stop_of(prepared, tokenizer=tokens(eos=None)) is None


def test_a_tokenizer_that_ends_elsewhere_than_generation(prepared: Prepared) -> None:
    said = stop_of(prepared, generation_config=tokens(eos=5))
    assert said is not None and "<|im_end|> (number 2)" in said and "number 5" in said


@pytest.mark.parametrize(
    ("change", "words", "warns"),
    [
        ("{{ message['content'] }}<|im_end|>\n", [], False),
        ("{{ message['content'] }}\n", [], True),
        ("{{ message['content'] }}<|im_end|>\n", ["training.max_length=22"], True),
    ],
    ids=["as it is", "a template without an end", "the end is cut off"],
)
def test_examples_that_never_end_are_warned_of(
    change: str, words: list[str], warns: bool, world: World, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(world.model, tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text()
    set_template(folder, template.replace("{{ message['content'] }}<|im_end|>\n", change))
    ended = check(world, f"model.name={folder}", *words)
    assert ended.code == 0, ended.err
    assert ("will not learn to stop" in ended.out) == warns
    assert ("<|im_end|>): the model" in ended.out) == warns


# ---- the probe's batches


def examples_of(lengths: list[int]) -> list[Example]:
    return [Example.of([5] * length, [True] * length, f"x:{number}") for number, length in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (1, 8), (2, 3), (4, 2), (3, 100)])
def test_no_step_is_larger_than_the_probe(seed: int, batch_size: int, accumulation: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 40, (1 + 4 * seed,), generator=draw).tolist()
    words = [f"training.batch_size={batch_size}", f"training.gradient_accumulation_steps={accumulation}"]
    feed = Feed.of(load_config(None, [*words, f"training.seed={seed}"]), examples_of(lengths))
    probe = feed.largest_window()
    probe_sizes = [batch.input_ids.numel() for batch in probe]
    assert probe_sizes[0] == max(probe_sizes) and probe[0].input_ids.shape[1] == max(lengths)
    for epoch in range(10):
        step = feed.step(1 + epoch * feed.steps_per_epoch)
        assert [len(batch.input_ids) for batch in step] == [len(batch.input_ids) for batch in probe]
        assert sum(batch.input_ids.numel() for batch in step) <= sum(probe_sizes)
        assert sum(batch.num_tokens for batch in step) <= sum(batch.num_tokens for batch in probe)
