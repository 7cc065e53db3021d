"""Answers over a loaded folder: the tokens of plain transformers, in each format, ended where the model ends them."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sophia_galore.engine.dialogue import Dialogue
from sophia_galore.engine.generate import Answer, Settings, Stream, prompt_tokens, stop_tokens
from sophia_galore.engine.loaded import Held, Loaded, loaded
from sophia_galore.errors import ModelError
from sophia_galore.model.export import convert_model
from sophia_galore.model.skeleton import load_tokenizer
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.plain import DTYPES
from sophia_galore.weights.saved import read_weights
from tiny import tiny_tokenizer, write_tiny_model

CPU = torch.device("cpu")
QUESTION = "what is the sum of one and two"
SETTINGS = Settings(max_new_tokens=12)


def ask(model: Loaded, question: str = QUESTION, settings: Settings = SETTINGS) -> Answer:
    return model.answer(model.prompt([("user", question)]), settings, Stream(model.tokenizer))


def answered(folder: Path, held: Held = "auto", **more: Any) -> Answer:
    with loaded(folder, held, CPU) as model:
        return ask(model, **more)


def plain_tokens(folder: Path, weights: dict[str, torch.Tensor] | None = None, dtype: Any = None) -> tuple[int, ...]:
    """What transformers itself generates, greedily, of a folder or of other weights in its place."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    prompt = prompt_tokens(load_tokenizer(folder), [("user", QUESTION)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    return tuple(out[0, prompt.shape[1] :].tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), tied=False, seed=1)  # which says twelve different tokens


@pytest.mark.parametrize("held", ["auto", "fp32", "bf16", "file"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", False), ("gemma3", False), ("llama", True)])
def test_the_tokens_are_those_of_transformers(family: str, tied: bool, held: Held, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, family, tied=tied, seed=1)
    expected = plain_tokens(folder, dtype=torch.bfloat16 if held == "bf16" else torch.float32)
    assert tied or len(set(expected)) > 3, "something is said"
    assert answered(folder, held).tokens == expected


@pytest.mark.parametrize(("family", "seed"), [("llama", 1), ("phi3", 4)])  # whose answers the rounding changes
def test_eight_bits_answer_like_the_weights_that_they_stand_for(family: str, seed: int, tmp_path: Path) -> None:
    """Of a plain folder, converted as it is read; and of a folder in eight bits, in every way it can be held."""
    folder = write_tiny_model(tmp_path / "model", family, tied=False, seed=seed)
    plain = {name: weight.values(torch.float32) for _, name, weight in read_weights(folder)}
    decoded = {
        name: quantise(weight, Int8Format()).values(torch.float32) if weight.ndim == 2 else weight
        for name, weight in plain.items()
    }
    expected = plain_tokens(folder, decoded)
    assert expected != plain_tokens(folder), "or the comparison shows nothing"
    assert answered(folder, "int8").tokens == expected
    (tmp_path / "int8").mkdir()
    convert_model(folder, tmp_path / "int8", Int8Format())
    for held in ("auto", "int8", "fp32", "file"):
        assert answered(tmp_path / "int8", held).tokens == expected


@pytest.mark.parametrize("held", ["auto", "int8", "file", *DTYPES])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_weights_are_held_as_asked(stored: str, held: Held, model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path, DTYPES[stored])
    with loaded(tmp_path, held, CPU) as it:
        own = stored if held in ("auto", "int8", "file") else held
        assert {parameter.dtype for parameter in it.model.parameters()} == {DTYPES[own]}
        taken = sum(parameter.untyped_storage().nbytes() for parameter in it.model.parameters() if parameter.ndim == 2)
        assert (taken < 100) is (held in ("int8", "file")), "such matrices are there while they work only"
        ask(it, settings=Settings(2))
        after = sum(parameter.untyped_storage().nbytes() for parameter in it.model.parameters() if parameter.ndim == 2)
        assert after == taken


def test_what_is_in_eight_bits_already_is_not_rounded_again(model: Path, tmp_path: Path) -> None:
    """A folder in blocks of 16, asked for in eight bits: its own codes."""
    convert_model(model, tmp_path, Int8Format(16))
    codes = {name: weight for _, name, weight in read_weights(tmp_path) if isinstance(weight, Int8Weight)}
    with loaded(tmp_path, "int8", CPU) as it, torch.no_grad():
        embed = it.model.model.embed_tokens
        rows = torch.arange(5)
        own = codes["model.embed_tokens.weight"][rows].values(torch.float32)
        assert torch.equal(embed(rows), own)


@pytest.mark.parametrize("held", ["int8", "file"])
def test_an_interrupted_answer_leaves_nothing_decoded(held: Held, model: Path) -> None:
    """Ctrl-C may come between a matrix's decoding and its removal."""
    with loaded(model, held, CPU) as it:
        expected = ask(it).tokens

        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        # Called after the weight was decoded, before the hook that takes it away.
        handle = it.model.model.layers[1].mlp.down_proj.register_forward_hook(interrupt, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            ask(it)
        handle.remove()
        for _ in range(2):
            assert ask(it).tokens == expected
        sizes = {parameter.untyped_storage().nbytes() for parameter in it.model.parameters() if parameter.ndim == 2}
        assert sizes == {4}, "placeholders of one number"


def test_a_mixed_folder_is_held_in_the_precision_of_most_numbers(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model, tmp_path / "mixed"))
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: tensor.bfloat16() if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    with loaded(folder, "auto", CPU) as it:
        assert {parameter.dtype for parameter in it.model.parameters()} == {torch.bfloat16}
        assert ask(it).tokens


@pytest.mark.parametrize("who", ["generation_config.json", "a list of several", "tokenizer", "config.json"])
def test_an_answer_ends_where_the_model_or_its_tokenizer_says(who: str, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    said = answered(folder).tokens
    stop, place = next((token, place) for place, token in enumerate(said) if place > 2 and token not in said[:place])
    assert stop not in tiny_tokenizer().all_special_ids
    if who == "config.json":
        (folder / "generation_config.json").unlink(missing_ok=True)
        config = json.loads((folder / who).read_text())
        (folder / who).write_text(json.dumps(config | {"eos_token_id": stop}))
    elif who != "tokenizer":
        stops = [2, stop] if who == "a list of several" else stop
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with loaded(folder, "auto", CPU) as it:
        prompt = it.prompt([("user", QUESTION)])
        if who == "tokenizer":
            it.tokenizer.eos_token = it.tokenizer.convert_ids_to_tokens(stop)
        given = it.answer(prompt, SETTINGS, Stream(it.tokenizer))
    assert given.end == "done" and given.tokens == said[: place + 1]
    assert answered(model).end == "cut"


def test_stop_tokens_are_those_of_all_who_name_them() -> None:
    class Names:
        def __init__(self, eos_token_id: object) -> None:
            self.eos_token_id = eos_token_id

    assert stop_tokens(Names(7), None, Names([3, 7]), Names(None), Names(-1), object()) == [3, 7]


def test_the_models_own_settings_are_kept_but_for_what_is_asked(model: Path, tmp_path: Path) -> None:
    """A penalty for repetition is the model's; beams, lengths and temperatures are what the command says."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    path = folder / "generation_config.json"
    expected = answered(folder).tokens
    path.write_text(json.dumps({"num_beams": 4, "max_length": 5, "temperature": 0.2, "do_sample": True, "top_k": 3}))
    assert answered(folder).tokens == expected
    path.write_text(json.dumps({"repetition_penalty": 50.0}))
    assert answered(folder).tokens != expected


@contextmanager
def nothing_said() -> Iterator[None]:
    """No warning, neither Python's nor transformers' own."""
    records: list[logging.LogRecord] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    handler = Kept(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert [record.getMessage() for record in records] == []


@pytest.mark.parametrize("own", [None, {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_transformers_says_nothing(temperature: float, own: dict[str, Any] | None, model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    if own is None:
        (folder / "generation_config.json").unlink(missing_ok=True)
    else:
        (folder / "generation_config.json").write_text(json.dumps(own))
    with nothing_said():
        answered(folder, settings=Settings(3, temperature, 0.9, 1))


def test_draws_follow_the_seed_and_the_temperature(model: Path) -> None:
    drawn = [answered(model, settings=Settings(12, 5.0, 1.0, seed)).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    narrow = answered(model, settings=Settings(12, 5.0, 0.0, 1)).tokens
    assert narrow == answered(model).tokens, "of probability 0 the likeliest token is left"


TEXTS = ["two words", "naïve – 😀👩‍👩‍👧 日本語", " leading and\n\nlines\n", "one<|im_end|>two", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_shows_whole_characters_and_leaves_none_out(text: str) -> None:
    tokenizer = tiny_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    parts: list[str] = []
    stream = Stream(tokenizer, parts.append)
    stream.put(torch.tensor([[5, 6]]))  # the prompt
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.end()
    assert not any("\ufffd" in part for part in parts)
    expected = text.replace("<|im_end|>", "")
    assert "".join(parts) == expected == stream.given("done").text
    assert stream.given("done").tokens == tuple(tokens)
    assert len(parts) >= len(expected.split()), "as it comes, not at the end"


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    tokenizer = tiny_tokenizer()
    stream = Stream(tokenizer)
    stream.put(torch.tensor([[1]]))
    stream.put(torch.tensor(tokenizer("a😀")["input_ids"][:-1]))
    assert stream.given("cut").text == "a\ufffd"


def test_a_question_must_fit_and_a_system_message_needs_a_template(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    with loaded(folder, "auto", CPU, title="mine") as it:
        with pytest.raises(ModelError, match="mine reads 128 at most"):
            Dialogue(it).ask("z" * 200, max_new_tokens=4)
        with pytest.raises(ModelError, match="empty"):
            Dialogue(it).ask(" \n", max_new_tokens=4)
        long = Dialogue(it).ask("z" * 80, max_new_tokens=100)
        given = it.answer(long.prompt, Settings(100), Stream(it.tokenizer))
        assert long.prompt.shape[1] + len(given.tokens) <= 128
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system here') }}")
    with loaded(folder, "auto", CPU) as it, pytest.raises(ModelError, match=r"refuses.*system, user.*no system here"):
        Dialogue(it, "be brief").ask("what", max_new_tokens=4)
    (folder / "chat_template.jinja").unlink()
    with loaded(folder, "auto", CPU) as it, pytest.raises(ModelError, match="no chat template"):
        Dialogue(it, "be brief")
