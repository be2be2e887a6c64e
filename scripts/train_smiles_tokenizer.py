"""Writes the tokenizer of SMILES: SMolLM's regular expression, with the tokens that a training file holds."""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.files import ROOT, check_folder
from workshop.molecules.rows import read_molecules
from workshop.tokenizers import save_tokenizer, train_smiles_tokenizer

CONTEXT = 128


@dataclass
class SmilesTokenizerArguments:
    """What to read, and where to write."""

    train_file: str = field(metadata={"help": "One SMILES a line."})
    output_dir: str = field(default=str(ROOT / "tokenization" / "smiles"), metadata={"help": "Folder to write to."})


def main(arguments: SmilesTokenizerArguments):
    check_folder("output_dir", arguments.output_dir, ("tokenizer.json", "tokenizer_config.json"))
    molecules = read_molecules("train_file", arguments.train_file)
    tokenizer = train_smiles_tokenizer(molecules)
    save_tokenizer(tokenizer, arguments.output_dir, CONTEXT)
    print(f"{len(molecules)} molecules, {tokenizer.get_vocab_size()} ids, written to {arguments.output_dir}")


if __name__ == "__main__":
    main(*HfArgumentParser(SmilesTokenizerArguments).parse_args_into_dataclasses())
