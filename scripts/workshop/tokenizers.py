"""The tokenizers that are trained here: a byte-level BPE of text, and the tokens of SMILES."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# Their ids are 0, 1, 2: configuration/tiny names the same three.
SPECIAL_TOKENS = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
SPECIAL_IDS = tuple(range(len(SPECIAL_TOKENS)))
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
# The tokens of SMolLM: an atom of two letters, a chirality mark, a whole bracket atom; else one character.
SMILES_PATTERN = r"Cl|Br|@@|\[[^\]]*\]|[CNOSPFIcnosp()=#\-+./\\@0-9]"


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


def split_smiles(smiles: str) -> list[str]:
    """The tokens of a molecule. Raises ValueError where it holds something that is none."""
    tokens = re.findall(SMILES_PATTERN, smiles)
    if "".join(tokens) != smiles:
        raise ValueError(f"A SMILES must consist of the tokens {SMILES_PATTERN}, but got {smiles!r}.")
    return tokens


def train_smiles_tokenizer(molecules: Iterable[str]) -> Tokenizer:
    """
    Ids 0, 1, 2 are pad, bos and eos, then the sorted tokens of the molecules. Encoding puts bos before a molecule and
    eos behind it; decoding without special tokens gives the SMILES back. There is no token for what is unknown: a
    SMILES that holds other tokens is an error of the tokenizer.
    """
    names = [*SPECIAL_TOKENS.values(), *sorted({token for smiles in molecules for token in split_smiles(smiles)})]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(names)}))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(SMILES_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    bos, eos = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, names.index(bos)), (eos, names.index(eos))]
    )
    return tokenizer


def make_word_tokenizer(words: Iterable[str], template: str) -> Tokenizer:
    """
    Ids 0, 1, 2 are pad, bos and eos, then the words in their order. A text is words with blanks between them; encoding
    puts it in the place of $A in the template, whose "{bos}" and "{eos}" are the tokens. Other words are an error.
    """
    names = [*SPECIAL_TOKENS.values(), *words]
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(names)}))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos, eos = SPECIAL_TOKENS["bos_token"], SPECIAL_TOKENS["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template.format(bos=bos, eos=eos), special_tokens=[(bos, names.index(bos)), (eos, names.index(eos))]
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
