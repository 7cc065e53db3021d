"""A new model for pre-training: config.json of a Llama, and a tokenizer made from the text that it will learn from.

python examples/new_model.py data/corpus.txt models/new --vocab-size 4096 --hidden-size 256 --layers 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("text", type=Path, nargs="+", help="text files")
parser.add_argument("folder", type=Path, help="where both are written")
parser.add_argument("--vocab-size", type=int, default=4096)
parser.add_argument("--hidden-size", type=int, default=256)
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--heads", type=int, default=4)
parser.add_argument("--max-length", type=int, default=1024, help="longest text that the model will read, in tokens")
options = parser.parse_args()

END = "<|endoftext|>"
bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bpe.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=options.vocab_size,
    special_tokens=[END],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
)
bpe.train([str(path) for path in options.text], trainer)
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END)
config = LlamaConfig(
    vocab_size=len(tokenizer),
    hidden_size=options.hidden_size,
    # As in Llama: two thirds of four times the width, in whole multiples of 32.
    intermediate_size=-(-8 * options.hidden_size // 3 // 32) * 32,
    num_hidden_layers=options.layers,
    num_attention_heads=options.heads,
    num_key_value_heads=options.heads,
    max_position_embeddings=options.max_length,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
    tie_word_embeddings=True,
)
options.folder.mkdir(parents=True, exist_ok=True)
tokenizer.save_pretrained(options.folder)
config.save_pretrained(options.folder)
print(f"{options.folder}: {len(tokenizer)} tokens; train it with model.name={options.folder} model.init=random")
