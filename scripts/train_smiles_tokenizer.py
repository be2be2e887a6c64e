"""Writes the tokenizer of SMILES: SMolLM's regular expression, with the tokens that a training file holds."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from files import check_folder
from molecules import read_molecules
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from train_tokenizer import ROOT, SPECIAL_TOKENS, save_tokenizer
from transformers import HfArgumentParser

# An atom of two letters, a chirality mark, a whole bracket atom; else one character.
PATTERN = r"Cl|Br|@@|\[[^\]]*\]|[CNOSPFIcnosp()=#\-+./\\@0-9]"
CONTEXT = 128


@dataclass
class SmilesTokenizerArguments:
    """What to read, and where to write."""

    train_file: str = field(metadata={"help": "One SMILES a line."})
    output_dir: str = field(default=str(ROOT / "tokenization" / "smiles"), metadata={"help": "Folder to write to."})


def split(smiles: str) -> list[str]:
    """The tokens of a molecule. Raises ValueError where it holds something that is none."""
    tokens = re.findall(PATTERN, smiles)
    if "".join(tokens) != smiles:
        raise ValueError(f"A SMILES must consist of the tokens {PATTERN}, but got {smiles!r}.")
    return tokens


def train_smiles_tokenizer(molecules: Iterable[str]) -> Tokenizer:
    """
    Ids 0, 1, 2 are pad, bos and eos, then the sorted tokens of the molecules. Encoding puts bos before a molecule and
    eos behind it; decoding without special tokens gives the SMILES back. There is no token for what is unknown: a
    SMILES that holds other tokens is an error of the tokenizer.
    """
    names = [*SPECIAL_TOKENS.values(), *sorted({token for smiles in molecules for token in split(smiles)})]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(names)}))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    bos, eos = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, names.index(bos)), (eos, names.index(eos))]
    )
    return tokenizer


def main(arguments: SmilesTokenizerArguments):
    check_folder("output_dir", arguments.output_dir, ("tokenizer.json", "tokenizer_config.json"))
    molecules = read_molecules("train_file", arguments.train_file)
    tokenizer = train_smiles_tokenizer(molecules)
    save_tokenizer(tokenizer, arguments.output_dir, CONTEXT)
    print(f"{len(molecules)} molecules, {tokenizer.get_vocab_size()} ids, written to {arguments.output_dir}")


if __name__ == "__main__":
    main(*HfArgumentParser(SmilesTokenizerArguments).parse_args_into_dataclasses())
