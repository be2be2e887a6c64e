"""
Dyck-(k, m): well-nested brackets of k types, at most m deep (Hewitt et al. 2020, arXiv 2010.07515; Yao et al. 2021,
arXiv 2105.11115).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from workshop.tasks.scoring import Right, bins, count_right
from workshop.tokenizers import SPECIAL_IDS

# Walks that are drawn at once: a seed gives other strings with another number.
WALKERS = 1 << 11
# A closing bracket is predicted where it has more than this share of the probability of all closing ones.
THRESHOLD = 0.8
PAD, BOS, EOS = SPECIAL_IDS
FIRST = len(SPECIAL_IDS)


@dataclass(frozen=True)
class Dyck:
    """
    The language, and which of its strings a run sees. At depth 0 a string ends with probability 1/2, at full depth it
    closes, between them it opens or closes with 1/2 each; types are uniform. Strings of training and validation have
    at most `longest` brackets, those of the split "longer" have more, and at most twice as many: there an end that
    comes earlier is drawn again, as in the code of Hewitt et al.
    """

    types: int
    depth: int
    longest: int
    mean_length: int
    rows: int

    smallest: ClassVar[dict[str, int]] = {"types": 1, "depth": 1, "longest": 2, "mean_length": 4, "rows": 1}
    splits: ClassVar[tuple[str, ...]] = ("train", "validation", "longer")
    template: ClassVar[str] = "{bos} $A {eos}"

    @property
    def title(self) -> str:
        return f"Dyck-({self.types}, {self.depth})"

    @property
    def words(self) -> list[str]:
        """The tokens, opening brackets first."""
        numbers = range(1, self.types + 1)
        return [f"({number}" for number in numbers] + [f"{number})" for number in numbers]

    @property
    def longest_row(self) -> int:
        """Most tokens of a row."""
        return 2 * self.longest + 2

    def draw(self, split: str, generator: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and labels of some thousands of strings; all is predicted, the end too."""
        shortest, longest = (self.longest + 1, 2 * self.longest) if split == "longer" else (1, self.longest)
        strings, lengths = walk(WALKERS, self.types, self.depth, shortest, longest, generator)
        rows = [
            np.concatenate([[BOS], string[:length] + FIRST, [EOS]])
            for string, length in zip(strings, lengths, strict=True)
            if length
        ]
        return [(ids, ids) for ids in rows]

    def score(self, logits: np.ndarray, ids: np.ndarray) -> Right:
        """
        Wherever a bracket is open: is the one that closes it predicted, among all closing ones? Counted by the
        distance from the opening bracket to the predicted place, and by depth.
        """
        top, distance, depth = open_brackets(ids - FIRST, self.types, self.depth)
        asked = (top >= 0) & (ids != PAD)
        shares = softmax(logits[asked][:, FIRST + self.types : FIRST + 2 * self.types], axis=1)
        right = shares[np.arange(len(shares)), top[asked]] > THRESHOLD
        return count_right(right, {"distance": bins(distance[asked]), "depth": depth[asked].astype(str)})


def walk(
    walkers: int, types: int, depth: int, shortest: int, longest: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """
    Strings `(walkers, longest)` and their lengths, 0 of those that have not ended at `longest`. A type opens as its
    own number and closes as `types` above it.
    """
    strings, lengths = np.zeros((walkers, longest), np.int64), np.zeros(walkers, np.int64)
    stack, height = np.zeros((walkers, depth), np.int64), np.zeros(walkers, np.int64)
    going = np.arange(walkers)
    for place in range(longest + 1):
        coin = generator.random(len(going)) < 0.5
        ends = (height[going] == 0) & coin & (place >= shortest)
        lengths[going[ends]] = place
        going, coin = going[~ends], coin[~ends]
        if place == longest:
            break
        opens = (height[going] == 0) | (coin & (height[going] < depth))
        opening, closing = going[opens], going[~opens]
        strings[opening, place] = stack[opening, height[opening]] = generator.integers(types, size=len(opening))
        height[opening] += 1
        height[closing] -= 1
        strings[closing, place] = stack[closing, height[closing]] + types
    return strings, lengths


def open_brackets(strings: np.ndarray, types: int, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Behind each place of `(rows, length)` brackets: the type of the innermost open one (-1: none is open), the distance
    from it to the next place, and how many are open. What is no bracket changes nothing.
    """
    rows, length = strings.shape
    stack, opened = np.zeros((2, rows, depth + 1), np.int64)
    height, every = np.zeros(rows, np.int64), np.arange(rows)
    top, distance, heights = np.zeros((3, rows, length), np.int64)
    for place in range(length):
        bracket = strings[:, place]
        opens, closes = (bracket >= 0) & (bracket < types), bracket >= types
        height = height + opens - closes
        stack[every[opens], height[opens]] = bracket[opens]
        opened[every[opens], height[opens]] = place
        top[:, place] = np.where(height > 0, stack[every, height], -1)
        distance[:, place] = place + 1 - opened[every, height]
        heights[:, place] = height
    return top, distance, heights
