"""
p-hop induction (Sanford et al. 2024, arXiv 2402.09268; Saunshi et al. 2025, arXiv 2502.17416). In v_1 ... v_n,
find_1(i) is the place behind the last v_i before place i, find_p(i) = find_1(find_{p-1}(i)), and the answer is the
letter at find_p(n).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from workshop.tasks.scoring import NO_LABEL, Right, count_right
from workshop.tokenizers import SPECIAL_IDS

# Sequences of each number of hops that are drawn at once: a seed gives other ones with another number.
DRAWN_AT_ONCE = 1 << 9
_, BOS, _ = SPECIAL_IDS
FIRST = len(SPECIAL_IDS)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Hops:
    """1 to `hops` hops, equally often, in sequences of `length` out of `letters` letters."""

    hops: int
    letters: int
    length: int
    rows: int

    smallest: ClassVar[dict[str, int]] = {"hops": 1, "letters": 2, "length": 3, "rows": 1}
    splits: ClassVar[tuple[str, ...]] = ("train", "validation")
    template: ClassVar[str] = "{bos} $A"

    def __post_init__(self):
        if self.letters > len(LETTERS):
            raise ValueError(f"`letters` must be at most {len(LETTERS)}, but got {self.letters}.")
        if self.length <= 2 * self.hops:
            raise ValueError(f"`length` must be above twice hops {self.hops}, but got {self.length}.")

    @property
    def title(self) -> str:
        return f"p-hop induction, p up to {self.hops}, n = {self.length}"

    @property
    def words(self) -> list[str]:
        """The tokens: numbers of hops, then letters."""
        return [str(count + 1) for count in range(self.hops)] + list(LETTERS[: self.letters])

    @property
    def longest_row(self) -> int:
        """Tokens of a row: bos, the number of hops, the sequence, the answer."""
        return self.length + 3

    @property
    def mean_length(self) -> int:
        return self.longest_row

    def draw(self, split: str, generator: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """
        Ids and labels of some thousands of rows. As in Sanford et al. the answer of every letter is a label, where it
        has one; the last, which decides, always has.
        """
        hops = np.arange(DRAWN_AT_ONCE * self.hops) % self.hops + 1
        sequences = np.zeros((len(hops), self.length), np.int64)
        for count in range(1, self.hops + 1):
            sequences[hops == count] = chains(DRAWN_AT_ONCE, count, self.letters, self.length, generator)
        first = FIRST + self.hops  # the id of the letter a
        found = answers(sequences, hops, self.letters)
        ids = np.concatenate([np.full((len(hops), 2), BOS), sequences + first, found[:, -1:] + first], axis=1)
        ids[:, 1] = hops - 1 + FIRST
        labels = np.full_like(ids, NO_LABEL)
        labels[:, 3:] = np.where(found >= 0, found + first, NO_LABEL)
        return list(zip(ids, labels, strict=True))

    def score(self, logits: np.ndarray, ids: np.ndarray) -> Right:
        """Whether the most probable token behind a sequence is the answer, counted by the number of hops."""
        right = logits[:, -2].argmax(axis=1) == ids[:, -1]
        return count_right(right, {"hops": (ids[:, 1] - FIRST + 1).astype(str)})


def chains(count: int, hops: int, letters: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """
    Sequences `(count, length)` in which `hops` hops exist from the last letter, as Saunshi et al. make them: the pairs
    that they pass are put into random places, and what is left is filled with letters that stand in no hop's way.
    """
    passed = np.zeros(
        (count, hops + 1), np.int64
    )  # the letters at find_0, find_1, ...: each other than the one before
    passed[:, 0] = generator.integers(letters, size=count)
    for hop in range(1, hops + 1):
        passed[:, hop] = (passed[:, hop - 1] + 1 + generator.integers(letters - 1, size=count)) % letters
    slots = generator.random((count, length - 1 - hops)).argsort(axis=1)[:, :hops]  # a pair takes one slot, two places
    starts = np.sort(slots, axis=1)[:, ::-1] + np.arange(hops)[::-1]  # the first hop's pair is the last one
    behind = (starts[:, None, :] > np.arange(length)[:, None]).sum(axis=2)  # pairs between a place and the end
    avoided = np.take_along_axis(passed, behind, axis=1)
    others = (avoided + 1 + generator.integers(letters - 1, size=(count, length))) % letters
    sequences = np.where(behind < hops, others, generator.integers(letters, size=(count, length)))
    every = np.arange(count)
    for hop in range(hops):
        sequences[every, starts[:, hop]] = passed[:, hop]
        sequences[every, starts[:, hop] + 1] = passed[:, hop + 1]
    sequences[:, -1] = passed[:, 0]
    return sequences


def answers(sequences: np.ndarray, hops: np.ndarray, letters: int) -> np.ndarray:
    """The letter that each row's number of hops leads to from each place, `(rows, length)`; -1 where a hop fails."""
    rows, length = sequences.shape
    every, last = np.arange(rows), np.full((rows, letters), -1)
    find = np.zeros((rows, length + 1), np.int64)  # the last column: a hop that has failed fails again
    find[:, -1] = length
    for place in range(length):
        letter = sequences[:, place]
        find[:, place] = np.where(last[every, letter] >= 0, last[every, letter] + 1, length)
        last[every, letter] = place
    places = np.broadcast_to(np.arange(length), (rows, length))
    for hop in range(1, int(hops.max()) + 1):
        places = np.where((hops >= hop)[:, None], np.take_along_axis(find, places, axis=1), places)
    return np.take_along_axis(np.pad(sequences, ((0, 0), (0, 1)), constant_values=-1), places, axis=1)
