"""Measures what a conversion is worth: held-out loss of a plain model, of models converted from it, and of a new one.

python scripts/compare_starts.py --layer_family llama
"""

from transformers import AutoTokenizer, HfArgumentParser

from workshop.data import make_blocks
from workshop.files import ROOT
from workshop.starts import ComparisonArguments, compare, format_table
from workshop.training_arguments import DataArguments


def main(arguments: ComparisonArguments) -> list[dict]:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    data = DataArguments(
        train_file=arguments.train_file,
        validation_file=arguments.validation_file,
        max_eval_samples=arguments.max_eval_samples,
    )
    blocks = make_blocks(data, tokenizer, arguments.block_size, ["train", "validation"])
    runs = [compare(arguments, seed, blocks, len(tokenizer)) for seed in arguments.seeds]
    print(format_table(runs, arguments.max_steps))
    return runs


if __name__ == "__main__":
    main(*HfArgumentParser(ComparisonArguments).parse_args_into_dataclasses())
