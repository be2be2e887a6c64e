"""Trains a byte-level BPE: the default tokenizer on the training split of the default corpus, or one on a file."""

import platform
from dataclasses import dataclass, field

import tokenizers
from transformers import HfArgumentParser

from workshop.corpus import read_corpus
from workshop.files import ROOT, check_folder, read_text
from workshop.settings import check_counts
from workshop.tokenizers import save_tokenizer, train_tokenizer


@dataclass
class TokenizerArguments:
    """What to train and where to write it."""

    train_file: str | None = field(default=None, metadata={"help": "Text in UTF-8. Default: the default corpus."})
    output_dir: str = field(default=str(ROOT / "tokenization"), metadata={"help": "Folder to write to."})
    vocab_size: int = field(default=4096, metadata={"help": "Number of token ids, special tokens included."})
    model_max_length: int = field(default=1024, metadata={"help": "Longest text the tokenizer declares, in tokens."})

    def __post_init__(self):
        check_counts(self, "model_max_length")


def main(arguments: TokenizerArguments):
    check_folder("output_dir", arguments.output_dir, ("tokenizer.json", "tokenizer_config.json"))
    if arguments.train_file is not None:
        texts, source = [read_text("train_file", arguments.train_file)], arguments.train_file
    else:
        corpus = read_corpus("train")
        texts = corpus.texts
        source = f"standard library of Python {platform.python_version()}, training split, left out: {corpus.skipped}"
    tokenizer = train_tokenizer(texts, arguments.vocab_size)
    save_tokenizer(tokenizer, arguments.output_dir, arguments.model_max_length)
    print(f"corpus: {source}")
    print(f"files: {len(texts)}, bytes: {sum(len(text.encode()) for text in texts)}")
    print(f"tokenizers {tokenizers.__version__}, {tokenizer.get_vocab_size()} ids, written to {arguments.output_dir}")


if __name__ == "__main__":
    main(*HfArgumentParser(TokenizerArguments).parse_args_into_dataclasses())
