"""
What RDKit says of sampled SMILES: valid, or what is wrong with them. The error classes are those of SMolLM (arXiv
2605.06322).
"""

import re
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec

from scipy.stats import binomtest

Figure = dict[str, float | list[float] | None]  # value and interval; None where there is nothing to measure
# What becomes of a sample: the first that fits (`classify`).
SAMPLE_CLASSES = ("valid", "bracket", "ring", "valence", "other")
CONFIDENCE = 0.95
BRACKET_ATOM = re.compile(r"\[[^\]]*\]")
RING_DIGIT = re.compile(r"%\d\d|\d")


def check_rdkit() -> None:
    """Raises ImportError, with the remedy, where RDKit is not installed."""
    if find_spec("rdkit") is None:
        raise ImportError('Molecules need RDKit: pip install ".[molecules]".')


def classify(smiles: str) -> str:
    """
    One of SAMPLE_CLASSES, the first that fits: RDKit reads it; its parentheses do not match; a ring's number occurs an
    odd number of times; RDKit parses it, but refuses its valences or aromatic rings; other, as is what holds blanks.
    """
    from rdkit import Chem

    if re.search(r"\s", smiles):  # RDKit would read the rest as a name
        return "other"
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
    if any(count % 2 for count in Counter(RING_DIGIT.findall(bonds)).values()):
        return "ring"
    return "valence" if smiles and Chem.MolFromSmiles(smiles, sanitize=False) is not None else "other"


def share(count: int, total: int) -> Figure:
    """A share with its interval (Wilson); None of nothing."""
    if total == 0:
        return {"value": None, "interval": None}
    interval = binomtest(count, total).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": count / total, "interval": [float(interval.low), float(interval.high)]}


def classes_of(samples: Iterable[str]) -> dict[str, str]:
    """The class of each different sample."""
    check_rdkit()
    from rdkit import rdBase

    with rdBase.BlockLogs():  # a line for every sample that cannot be read
        return {smiles: classify(smiles) for smiles in dict.fromkeys(samples)}


def read_smiles(smiles: str):
    """RDKit's molecule. Raises ValueError for a SMILES that it does not read."""
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None:
        raise ValueError(f"`train_file` must hold SMILES that RDKit reads, but got {smiles!r}.")
    return molecule


def canonical(molecules: Iterable[str]) -> set[str]:
    """The spellings that RDKit gives them. Raises ValueError for one that it does not read."""
    from rdkit import Chem

    return {Chem.MolToSmiles(read_smiles(smiles)) for smiles in molecules}


def judge(samples: Iterable[str], classes: dict[str, str] | None = None) -> dict:
    """
    Counts of samples: all, of each class, and of different molecules among the valid ones; the 95% interval (Wilson)
    of the valid share; RDKit's version.

    Args:
        classes: those of the samples, where they are known.
    """
    if classes is None:
        classes = classes_of(samples)
    import rdkit

    counts = Counter(classes[smiles] for smiles in samples)
    return {
        "count": counts.total(),
        **{kind: counts[kind] for kind in SAMPLE_CLASSES},
        "valid_interval": share(counts["valid"], counts.total())["interval"],
        "unique": len(canonical(smiles for smiles, kind in classes.items() if kind == "valid")),
        "rdkit": rdkit.__version__,
    }
