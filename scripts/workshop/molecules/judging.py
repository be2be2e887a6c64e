"""
What RDKit says of sampled SMILES: valid, or what is wrong with them. The error classes are those of SMolLM (arXiv
2605.06322).
"""

import re
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec

from scipy.stats import binomtest

# What becomes of a sample: the first that fits (`classify`).
SAMPLE_CLASSES = ("valid", "bracket", "ring", "valence", "other")
CONFIDENCE = 0.95
BRACKET_ATOM = re.compile(r"\[[^\]]*\]")


def check_rdkit() -> None:
    """Raises ImportError, with the remedy, where RDKit is not installed."""
    if find_spec("rdkit") is None:
        raise ImportError('Molecules need RDKit: pip install ".[molecules]".')


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
