"""
What molecules that a model wrote are worth beside the ones it was trained on: the measures of SMolLM (arXiv
2605.06322), each with its 95% interval.
"""

from collections import Counter
from importlib.util import find_spec

import numpy as np
from scipy.linalg import eigh
from scipy.stats import norm
from tqdm import tqdm

from workshop.molecules.judging import CONFIDENCE, SAMPLE_CLASSES, Figure, canonical, classes_of, share

FEWEST = 10  # molecules that the bootstrap draws from
RADIUS, BITS = 2, 1024  # of Morgan's fingerprints
ROWS_AT_ONCE = 1000
NO_FCD = "not measured: the package fcd, which carries ChemNet's weights, is not installed"


# -- diversity --------------------------------------------------------------------------------------------------------


def fingerprints(molecules: list[str]) -> np.ndarray:
    """Morgan's fingerprints, `(molecules, BITS)` of 0 and 1."""
    from rdkit import Chem
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    generator = GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    rows = [generator.GetFingerprintAsNumPy(Chem.MolFromSmiles(smiles)) for smiles in molecules]
    return np.array(rows, dtype=np.float32).reshape(len(rows), BITS)


def draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of `count` things is there `(1 + resamples, count)`: once, and then as the bootstrap draws it."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.concatenate([np.ones((1, count)), drawn])


def spread(values: np.ndarray) -> Figure:
    """The first value, and as its interval so many standard deviations of the others, those of the bootstrap."""
    half = norm.ppf((1 + CONFIDENCE) / 2) * values[1:].std(ddof=1)
    return {"value": float(values[0]), "interval": [float(values[0] - half), float(values[0] + half)]}


def diversity(bits: np.ndarray, resamples: int, seed: int) -> Figure:
    """1 - the mean Tanimoto similarity of two different molecules; None of fewer than FEWEST."""
    count = len(bits)
    if count < FEWEST:
        return {"value": None, "interval": None}
    weights, sizes = draws(count, resamples, seed).astype(np.float32), bits.sum(axis=1)
    sums = np.zeros(len(weights))
    for start in range(0, count, ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        common = bits[rows] @ bits.T
        similar = common / np.maximum(sizes[rows, None] + sizes[None] - common, 1)
        sums += ((weights[:, rows] @ similar) * weights).sum(axis=1, dtype=np.float64)
    twice = np.square(weights, dtype=np.float64).sum(axis=1)  # a molecule beside itself: similarity 1
    return spread(1 - (sums - twice) / (count**2 - twice))


# -- Fréchet ChemNet distance -----------------------------------------------------------------------------------------


def activations(molecules: list[str]) -> np.ndarray:
    """What ChemNet makes of molecules, `(molecules, 512)`."""
    from fcd import get_predictions, load_ref_model

    return get_predictions(load_ref_model(), molecules, n_jobs=0)


def frechet(samples: np.ndarray, reference: np.ndarray, resamples: int, seed: int) -> Figure:
    """The Fréchet distance of two normal distributions, fitted to activations; the samples alone are drawn again."""
    mean, covariance = reference.mean(axis=0), np.cov(reference.T)
    values, vectors = eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    found = []
    for weights in draws(len(samples), resamples, seed).astype(int):
        own = np.cov(samples.T, fweights=weights)
        # The trace of the root of own @ covariance, which has the eigenvalues of this symmetric product.
        overlap = np.sqrt(np.maximum(eigh(root @ own @ root, eigvals_only=True), 0)).sum()
        shift = np.square(np.average(samples, axis=0, weights=weights) - mean).sum()
        found.append(shift + np.trace(own) + np.trace(covariance) - 2 * overlap)
    return spread(np.array(found))


# -- all of them ------------------------------------------------------------------------------------------------------


def measure(samples: list[str], training: list[str], references: int, resamples: int, seed: int) -> dict:
    """
    Shares of the classes of samples, of different molecules among the valid ones, and of new ones among the different
    ones; diversity of the different ones; distance (FCD) of the valid ones from `references` training molecules.

    `fcd` is the reason where it is not measured.
    """
    classes = classes_of(samples)
    counts = Counter(classes[smiles] for smiles in samples)
    valid = [smiles for smiles in samples if classes[smiles] == "valid"]
    different, known = canonical(valid), canonical(tqdm(training, desc="training molecules", leave=False))
    figures: dict = {kind: share(counts[kind], len(samples)) for kind in SAMPLE_CLASSES}
    figures["unique"] = share(len(different), len(valid))
    figures["novel"] = share(len(different - known), len(different))
    figures["diversity"] = diversity(fingerprints(sorted(different)), resamples, seed)
    if find_spec("fcd") is None:
        figures["fcd"] = NO_FCD
    elif len(valid) < FEWEST:
        figures["fcd"] = f"not measured: fewer than {FEWEST} samples are valid"
    elif len(training) < 2:
        figures["fcd"] = "not measured: fewer than 2 training molecules"
    else:
        chosen = np.random.default_rng(seed).permutation(len(training))[:references]
        reference = activations([training[index] for index in chosen])
        figures["fcd"] = frechet(activations(valid), reference, resamples, seed)
    return figures
