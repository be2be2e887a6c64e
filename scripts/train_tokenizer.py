"""Trains the default tokenizer, a byte-level BPE, on the training split of the default corpus."""

import platform
from dataclasses import dataclass, field

import tokenizers
from transformers import HfArgumentParser

from workshop.corpus import read_corpus
from workshop.files import ROOT, check_folder
from workshop.tokenizers import save_tokenizer, train_tokenizer


@dataclass
class TokenizerArguments:
    """What to train and where to write it."""

    output_dir: str = field(default=str(ROOT / "tokenization"), metadata={"help": "Folder to write to."})
    vocab_size: int = field(default=4096, metadata={"help": "Number of token ids, special tokens included."})
    model_max_length: int = field(default=1024, metadata={"help": "Longest text the tokenizer declares, in tokens."})


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
