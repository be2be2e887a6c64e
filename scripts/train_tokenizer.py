"""Trains the default tokenizer, a byte-level BPE, on the training split of the default corpus."""

import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from corpus import read_corpus
from files import check_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import HfArgumentParser

ROOT = Path(__file__).resolve().parent.parent
# Their ids are 0, 1, 2: configuration/tiny names the same three.
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass
class TokenizerArguments:
    """What to train and where to write it."""

    output_dir: str = field(default=str(ROOT / "tokenization"), metadata={"help": "Folder to write to."})
    vocab_size: int = field(default=4096, metadata={"help": "Number of token ids, special tokens included."})
    model_max_length: int = field(default=1024, metadata={"help": "Longest text the tokenizer declares, in tokens."})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    Trains a byte-level BPE of `vocab_size` ids. The same texts give the same tokenizer.

    All 256 bytes are tokens of their own and nothing is normalised, so every Unicode text comes back unchanged.
    Encoding adds no special token, as with the Pythia tokenizer. Raises ValueError where the bytes alone do not fit,
    or the texts give fewer ids than asked for.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"`vocab_size` must be at least {SMALLEST_VOCABULARY}, but got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"`vocab_size` must be at most {tokenizer.get_vocab_size()} on these texts, but got {vocab_size}."
        )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output_dir: str | Path, model_max_length: int):
    """Writes tokenizer.json and tokenizer_config.json, which is all that `AutoTokenizer.from_pretrained` needs."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
        **SPECIAL_TOKENS,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (output_dir / "tokenizer_config.json").write_text(text, encoding="utf-8")


def main(arguments: TokenizerArguments):
    check_folder("output_dir", arguments.output_dir, ("tokenizer.json", "tokenizer_config.json"))
    corpus = read_corpus("train")
    tokenizer = train_tokenizer(corpus.texts, arguments.vocab_size)
    save_tokenizer(tokenizer, arguments.output_dir, arguments.model_max_length)
    print(f"corpus: standard library of Python {platform.python_version()}, training split")
    print(f"files: {len(corpus.texts)}, left out: {corpus.skipped}")
    print(f"bytes: {sum(len(text.encode()) for text in corpus.texts)}")
    print(f"tokenizers {tokenizers.__version__}, {tokenizer.get_vocab_size()} ids, written to {arguments.output_dir}")


if __name__ == "__main__":
    main(*HfArgumentParser(TokenizerArguments).parse_args_into_dataclasses())
