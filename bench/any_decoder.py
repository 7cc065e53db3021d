"""Every causal language model that transformers knows: is it trained, or refused with a reason?

    python bench/any_decoder.py --output outputs/any-decoder.jsonl               # those that the tests do not cover
    python bench/any_decoder.py --output outputs/any-decoder.jsonl --types phimoe nemotron glm
    python bench/any_decoder.py --output outputs/any-decoder.jsonl --table

For each type of model, a small one is made from its default configuration, with random weights and a tokenizer. Then
`check`, two steps, and two steps with weights in int8 are run on it as a user would, and the model that was written is
read by transformers. A line is written for each type; what the file holds is not run again.
"""

from __future__ import annotations

import os

# Before torch is imported: copies of a process with threads hang.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import copy
import itertools
import json
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from faults_child import command, start, without_pictures
from faults_world import last_words, traceback_in
from measured import provenance, read_lines, reason
from sophia_galore.doctor.tiny_model import chat_tokenizer, write_data
from sophia_galore.model.architecture import SUPPORTED
from sophia_galore.model.twin import twins
from sophia_galore.records.files import PLAN

_WORDS = (
    "data.eval_fraction=0.2",
    "training.max_steps=2",
    "training.batch_size=2",
    "training.gradient_accumulation_steps=2",
    "training.max_length=64",
    "training.device=cpu",
    "training.sample_questions=[]",
    "optimizer.galore.rank=8",
)
_COMMANDS: dict[str, tuple[str, ...]] = {
    "check": (),
    "train": (),
    "train, int8": ("quantization.enabled=true", "quantization.block_size=32"),
}
# Larger ones take minutes, and show nothing else.
_MOST_PARAMETERS = 100_000_000
_MOST_TRIES = 8


def causal_types() -> list[str]:
    """Return the types of models that can be built as causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def write_small_model(kind: str, folder: Path) -> int:
    """Write a small model of a type as a hub would give it.

    Args:
        kind: The type.
        folder: A folder that does not exist.

    Returns:
        Its number of parameters.

    Raises:
        ValueError: None of the sizes that were tried works with transformers alone.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    said = "there is no configuration"
    whole = CONFIG_MAPPING[kind]()
    if not hasattr(whole, "hidden_size"):
        raise ValueError("its configuration has a part for each kind of input")
    if getattr(whole, "num_key_value_heads", 0) is None:  # a default that some models' own code does not take
        whole.num_key_value_heads = whole.num_attention_heads
    words = chat_tokenizer(280)
    for config in itertools.islice(twins(whole), _MOST_TRIES):
        try:
            config.vocab_size = len(words)
            if hasattr(config, "vocab_size_per_layer_input"):
                config.vocab_size_per_layer_input = len(words)
            config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
            torch.manual_seed(0)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
            if size > _MOST_PARAMETERS:
                said = f"it has {size:,} parameters"
                continue
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
            model.save_pretrained(folder)
            words.save_pretrained(folder)
            AutoModelForCausalLM.from_pretrained(folder)  # some configurations change as they are read
            return size
        except Exception as error:  # whatever a model says of sizes that it does not take
            shutil.rmtree(folder, ignore_errors=True)
            said = reason(error)
    raise ValueError(said)


def keys_that_differ(folder: Path) -> str:
    """Return what transformers says is missing in a model, or too much; empty if all is there."""
    from transformers import AutoModelForCausalLM

    _, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return ", ".join(sorted({*found["missing_keys"], *found["unexpected_keys"]}))


def try_type(kind: str, folder: Path) -> dict[str, Any]:
    """Run the commands on a small model of a type.

    Args:
        kind: The type.
        folder: An empty folder.

    Returns:
        For each command its exit code and the end of what it said if that is not 0; and what is wrong.
    """
    model, data, config = folder / "model", write_data(folder / "data.json"), folder / "config.yaml"
    config.write_text("{}\n", encoding="utf-8")
    try:
        found: dict[str, Any] = {"type": kind, "parameters": write_small_model(kind, model)}
    except Exception as error:
        return {"type": kind, "not_built": reason(error)}
    wrong: list[str] = []
    for name, words in _COMMANDS.items():
        output, log = folder / name.replace(", ", "-"), folder / "log"
        given = [f"model.name={model}", f"data.train={data}", f"training.output_dir={output}", *_WORDS, *words]
        (child,) = start(command([name.split(",")[0], "--config", str(config), *given]), log, 1)
        code = child.wait()
        found[name] = {"exit": code} | ({"said": last_words(log)} if code else {})
        if code not in (0, 2) or traceback_in(log):
            wrong.append(f"{name}: exit {code}")
        if name == "train" and code == 0:
            found["proof"] = json.loads((output / PLAN).read_text(encoding="utf-8"))["proof"]
            if keys := keys_that_differ(output):
                wrong.append(f"the keys of what was written differ: {keys}")
        if code:
            break  # the next one says the same
    return found | {"wrong": wrong}


def table(lines: list[dict[str, Any]]) -> str:
    """Return a table of what was found."""
    rows = ["| Type | Result |", "|---|---|"]
    counts: Counter[str] = Counter()
    for line in sorted(lines, key=lambda each: each["type"]):
        if "not_built" in line:
            kind, said = "not built by transformers in a small size", line["not_built"]
        elif line["wrong"]:
            kind, said = "fault", "; ".join(line["wrong"])
        else:
            refused = next((line[name] for name in _COMMANDS if line.get(name, {}).get("exit")), None)
            kind, said = ("refused", refused["said"]) if refused else ("trained", "")
        counts[kind] += 1
        rows.append(f"| {line['type']} | {kind}{': ' if said else ''}{said} |".replace("\n", " "))
    return "\n".join([*rows, "", ", ".join(f"{count} {kind}" for kind, count in counts.most_common())])


def main() -> None:
    """Try the types that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="file of results, a line for each type")
    parser.add_argument("--types", nargs="+", help="types of models; those that the tests do not cover if left out")
    parser.add_argument("--table", action="store_true", help="print what the file holds, and end")
    asked = parser.parse_args()
    lines = read_lines(asked.output)
    if asked.table:
        print(table(lines))
        return
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    without_pictures()
    done = {line["type"] for line in lines}
    for kind in asked.types or [each for each in causal_types() if each not in SUPPORTED]:
        if kind in done:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            line = try_type(kind, Path(temporary)) | provenance()
        print(
            kind, {key: value for key, value in line.items() if key in ("not_built", "wrong", *_COMMANDS)}, flush=True
        )
        with asked.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
