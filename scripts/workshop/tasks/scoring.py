"""Right answers, counted: all of them, and by what makes them easy or hard."""

from collections import Counter

import numpy as np

NO_LABEL = -100  # the library's label of what is not predicted
# Class -> [right answers, answers]: "all", and classes named by a word and a number.
Right = dict[str, list[int]]


def bins(numbers: np.ndarray) -> np.ndarray:
    """The names of the bins 1, 2-3, 4-7, ... that numbers from 1 on lie in."""
    powers = np.floor(np.log2(numbers)).astype(int)
    names = ["1", *(f"{2**power}-{2 ** (power + 1) - 1}" for power in range(1, 32))]
    return np.array(names)[powers]


def count_right(right: np.ndarray, classes: dict[str, np.ndarray]) -> Right:
    """Counts of answers `(n,)`, true where right; `classes` are word -> the number, or bin, of each answer."""
    found = {"all": [int(right.sum()), len(right)]}
    for word, values in classes.items():
        for value in np.unique(values):
            chosen = right[values == value]
            found[f"{word} {value}"] = [int(chosen.sum()), len(chosen)]
    return found


def place_of(name: str) -> tuple[str, int]:
    """What classes are sorted by: "all" first, then by word, and by number."""
    word, _, value = name.partition(" ")
    return (word, int(value.split("-")[0])) if value else ("", 0)


def add_right(parts: list[Right]) -> Right:
    """The counts of several batches together, in order."""
    right, total = Counter(), Counter()
    for part in parts:
        for name, (correct, count) in part.items():
            right[name] += correct
            total[name] += count
    return {name: [right[name], total[name]] for name in sorted(total, key=place_of)}
