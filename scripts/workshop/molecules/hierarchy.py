"""
Rings and branches of SMILES, counted in the string alone: RDKit reads only valid ones, and the others have both too.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from workshop.molecules.judging import BRACKET_ATOM, RING_DIGIT, share

# What is counted -> the first number of the last, open bin: 0.4% and 1.9% of the training molecules of ZINC are in it.
LAST_BINS = {"rings": 6, "depth": 4}
COUNTED = {"rings": "ring bonds", "depth": "nesting depth of branches"}
Tally = dict[str, dict[str, int]]  # what is counted -> number -> how many SMILES have it


def ring_bonds(smiles: str) -> int:
    """
    Ring bonds that are opened: outside of bracket atoms a ring digit that is not open opens one, else it closes it.
    In a valid SMILES they are its rings: bonds less atoms, and one for each part. One that is never closed counts.
    """
    opened, bonds = set(), 0
    for digit in RING_DIGIT.findall(BRACKET_ATOM.sub("", smiles)):
        bonds += digit not in opened
        opened ^= {digit}
    return bonds


def branch_depth(smiles: str) -> int:
    """The most parentheses that are open at a time. One that closes nothing is passed over."""
    depth = deepest = 0
    for character in smiles:
        depth = max(0, depth + (character == "(") - (character == ")"))
        deepest = max(deepest, depth)
    return deepest


def tally(molecules: Collection[str]) -> Tally:
    """How many SMILES have each number of ring bonds, and each depth of branches."""
    numbers = {"rings": map(ring_bonds, molecules), "depth": map(branch_depth, molecules)}
    return {name: {str(n): count for n, count in sorted(Counter(found).items())} for name, found in numbers.items()}


def tally_by_validity(samples: list[str], classes: dict[str, str]) -> dict[str, Tally]:
    """The tallies of all samples and of the valid ones."""
    return {"samples": tally(samples), "valid": tally([smiles for smiles in samples if classes[smiles] == "valid"])}


def bins(name: str) -> list[str]:
    """The bins of what is counted, the last one open."""
    return [*map(str, range(LAST_BINS[name])), f"{LAST_BINS[name]}+"]


def binned(tallies: Iterable[Tally], name: str) -> list[int]:
    """How many SMILES of all tallies together are in each of the bins."""
    counts = [0] * (LAST_BINS[name] + 1)
    for found in tallies:
        for number, count in found[name].items():
            counts[min(int(number), LAST_BINS[name])] += count
    return counts


def hierarchy_figures(tallies: dict[str, Tally], training: Tally) -> dict[str, dict]:
    """What is counted -> bin -> shares of the training molecules and of the samples, their number, the valid share."""
    figures: dict[str, dict] = {}
    for name in LAST_BINS:
        counts = [binned([found], name) for found in (training, tallies["samples"], tallies["valid"])]
        totals = [sum(found) for found in counts]
        figures[name] = {
            label: {
                "training": share(known, totals[0]),
                "of_samples": share(count, totals[1]),
                "samples": count,
                "valid": share(valid, count),
            }
            for label, known, count, valid in zip(bins(name), *counts, strict=True)
        }
    return figures
