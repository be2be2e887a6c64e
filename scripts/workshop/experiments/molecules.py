"""
Molecules as SMILES, one a line: rows for the Trainer with their loss per token, samples, and what RDKit says of them.

The measures and error classes are those of SMolLM (arXiv 2605.06322).
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import binomtest
from transformers import (
    DataCollatorForLanguageModeling,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.trainer_pt_utils import get_length_grouped_indices

from workshop.experiments.store import SAMPLE_CLASSES
from workshop.files import finite, read_text
from workshop.training import build_model, choose_block_size, record_run
from workshop.training_arguments import DataArguments, ModelArguments, SpiralTrainingArguments

CONFIDENCE = 0.95
SAMPLED_AT_ONCE = 1000
BRACKET_ATOM = re.compile(r"\[[^\]]*\]")


# -- rows -------------------------------------------------------------------------------------------------------------


def read_molecules(field: str, path: str | Path) -> list[str]:
    """The SMILES of a file. Raises ValueError for a file without any, and for a line that holds none, or a blank."""
    molecules = read_text(field, path).splitlines()
    if not molecules:
        raise ValueError(f"`{field}` must hold one SMILES a line, but {path} is empty.")
    for number, smiles in enumerate(molecules, start=1):
        if not smiles or smiles.split() != [smiles]:
            raise ValueError(f"`{field}` must hold one SMILES a line, but line {number} of {path} is {smiles!r}.")
    return molecules


def make_rows(molecules: list[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> Dataset:
    """One row a molecule: bos, its tokens, eos. Raises ValueError for one of more than `block_size` tokens."""

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["smiles"], return_attention_mask=False, verbose=False)

    rows = Dataset.from_dict({"smiles": molecules}).map(tokenize, batched=True, remove_columns="smiles")
    longest = max(map(len, rows["input_ids"]))
    if longest > block_size:
        raise ValueError(
            f"`block_size` must be at least {longest}, the longest molecule's tokens, but got {block_size}."
        )
    return rows


# -- training and its loss --------------------------------------------------------------------------------------------


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats and count of the predicted tokens of each row, `(B, 2)`; padding is not predicted."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), labels[:, 1:], reduction="none")
    return torch.stack([losses.sum(dim=1), (labels[:, 1:] != -100).sum(dim=1).float()], dim=1)


def nats_per_token(prediction: EvalPrediction) -> dict[str, float]:
    """Loss over all tokens that are predicted: rows of more tokens count more, whatever the batches."""
    losses, counts = prediction.predictions.astype("float64").sum(axis=0)
    return {"nats_per_token": float(losses / counts)}


class LengthGroups(torch.utils.data.Sampler):
    """
    Rows in batches of like length, as the library groups them, and the batches in random order. The library's own
    sampler draws from the global random state, which a resumed run has lost: here seed and epoch decide.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called before each pass over the rows."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        (state,) = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(state))
        grouped = torch.tensor(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))
        *batches, last = grouped.split(self.batch_size)  # the last one may be smaller
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter(torch.cat([batches[index] for index in order] + [last]).tolist())


class MoleculeTrainer(Trainer):
    """A Trainer whose grouping by length goes on as it began where a run is resumed."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroups([len(ids) for ids in rows["input_ids"]], batch_size, seed)


def make_trainer(
    model_arguments: ModelArguments, data_arguments: DataArguments, training: SpiralTrainingArguments
) -> Trainer:
    """As `training.make_trainer`, with a molecule a row, padded to the longest of its batch."""
    set_seed(training.seed)
    model, tokenizer = build_model(model_arguments, training)
    block_size = choose_block_size(data_arguments.block_size, model.config)
    files = {"train_file": data_arguments.train_file, "validation_file": data_arguments.validation_file}
    rows = {field: make_rows(read_molecules(field, path), tokenizer, block_size) for field, path in files.items()}
    evaluated = rows["validation_file"]
    trainer = MoleculeTrainer(
        model=model,
        args=training,
        train_dataset=rows["train_file"],
        eval_dataset=evaluated.select(range(min(len(evaluated), data_arguments.max_eval_samples or len(evaluated)))),
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        compute_metrics=nats_per_token,
        preprocess_logits_for_metrics=row_losses,
    )
    trainer.add_callback(record_run(model.config, training, rows["train_file"]))
    return trainer


# -- samples ----------------------------------------------------------------------------------------------------------


def check_rdkit() -> None:
    """Raises ImportError, with the remedy, where RDKit is not installed."""
    if find_spec("rdkit") is None:
        raise ImportError('Molecules need RDKit: pip install ".[molecules]".')


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    temperature: float,
    top_k: int,
    max_length: int,
) -> list[str]:
    """`count` SMILES drawn from bos, each of at most `max_length` tokens with bos and eos. A seed gives the same."""
    set_seed(seed)
    model.eval()
    samples: list[str] = []
    while len(samples) < count:
        rows = min(SAMPLED_AT_ONCE, count - len(samples))
        start = torch.full((rows, 1), tokenizer.bos_token_id, device=model.device)
        drawn = model.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            temperature=temperature,
            top_k=top_k,
            max_length=max_length,
        )
        samples += tokenizer.batch_decode(drawn, skip_special_tokens=True)
    return samples


def classify(smiles: str) -> str:
    """
    One of SAMPLE_CLASSES, the first that fits: RDKit reads it; its parentheses do not match; a ring digit occurs an
    odd number of times; RDKit parses it, but refuses its valences or aromatic rings; other.
    """
    from rdkit import Chem

    if smiles and Chem.MolFromSmiles(smiles) is not None:
        return "valid"
    depth = 0
    for character in smiles:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return "bracket"
    if depth:
        return "bracket"
    bonds = BRACKET_ATOM.sub("", smiles)  # digits in a bracket atom count hydrogens, isotopes and charges
    if any(bonds.count(digit) % 2 for digit in "0123456789"):
        return "ring"
    return "valence" if smiles and Chem.MolFromSmiles(smiles, sanitize=False) is not None else "other"


def judge(samples: Iterable[str]) -> dict:
    """
    Counts of samples: all, of each class, and of different molecules among the valid ones; the 95% interval (Wilson)
    of the valid share; RDKit's version.
    """
    check_rdkit()
    import rdkit
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():  # a line for every sample that cannot be read
        classes = {smiles: classify(smiles) for smiles in set(samples)}
        molecules = {Chem.CanonSmiles(smiles) for smiles, kind in classes.items() if kind == "valid"}
    counts = Counter(classes[smiles] for smiles in samples)
    interval = binomtest(counts["valid"], counts.total()).proportion_ci(CONFIDENCE, method="wilson")
    return {
        "count": counts.total(),
        **{kind: counts[kind] for kind in SAMPLE_CLASSES},
        "valid_interval": [float(interval.low), float(interval.high)],
        "unique": len(molecules),
        "rdkit": rdkit.__version__,
    }


# -- a run's outcome --------------------------------------------------------------------------------------------------


def outcome(trainer: Trainer, settings: dict, validation_file: str) -> dict:
    """What the line of a run holds: loss on validation molecules, and what became of its samples, kept in a file."""
    rows = make_rows(read_molecules("validation", validation_file), trainer.processing_class, settings["block_size"])
    rows = rows.select(range(min(len(rows), settings["evaluation_blocks"])))
    loss = trainer.evaluate(rows)["eval_nats_per_token"]
    options = settings["smiles"]
    samples = sample(
        trainer.model,
        trainer.processing_class,
        options["samples"],
        settings["seed"],
        options["temperature"],
        options["top_k"],
        settings["block_size"],
    )
    (Path(trainer.args.output_dir) / "samples.txt").write_text("\n".join(samples) + "\n", encoding="utf-8")
    return {"nats_per_token": {"validation": finite(loss)}, "samples": judge(samples)}
