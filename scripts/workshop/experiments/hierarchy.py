"""
Rings and branches in the samples of finished runs (`molecules.hierarchy`). The line of a run does not hold them: they
are read from the samples that the run kept beside its model, and have lines of their own.
"""

from dataclasses import dataclass
from pathlib import Path

from modeling_spiralformer.files_spiralformer import digest
from workshop.experiments.results import ModelResults, check_line
from workshop.experiments.store import append_line, read_lines, run_folder
from workshop.files import read_text
from workshop.molecules.hierarchy import LAST_BINS, Tally, binned, tally, tally_by_validity
from workshop.molecules.judging import classes_of
from workshop.molecules.rows import read_molecules

FEWEST = 30  # samples of a run in a bin whose valid share is compared: differences of shares are taken as normal


def check_tallies(tallies: dict[str, Tally], line: dict) -> None:
    """Raises ValueError where samples are not those that a run counted, or another RDKit judges them otherwise."""
    for part, counted in (("samples", "count"), ("valid", "valid")):
        for name in LAST_BINS:
            found, expected = sum(tallies[part][name].values()), line["samples"][counted]
            if found != expected:
                raise ValueError(
                    f"`{name}` of run {line['key']} must be of the {expected} {part} that its line counts (RDKit "
                    f"{line['samples']['rdkit']}), but are of {found}."
                )


@dataclass(frozen=True)
class Hierarchy:
    """Tallies of the samples of runs, by their keys, and of training molecules, by the digest of their file."""

    runs: dict[str, dict[str, Tally]]
    training: dict[str, Tally]

    @classmethod
    def load(cls, path: str | Path) -> "Hierarchy":
        """What a file holds; nothing where there is none yet."""
        lines = read_lines(path)
        return cls(
            {line["key"]: line for line in lines if "key" in line},
            {line["training"]: line["samples"] for line in lines if "training" in line},
        )

    def of(self, model: ModelResults) -> dict[int, dict[str, Tally]]:
        """Seed -> tallies of the runs of a model that were read; nothing of a model that diverged."""
        if model.diverged_seeds:
            return {}
        found = {seed: line for seed, line in model.runs.items() if line["key"] in self.runs}
        for line in found.values():
            check_tallies(self.runs[line["key"]], line)
        return {seed: self.runs[line["key"]] for seed, line in found.items()}

    def valid_shares(self, model: ModelResults, name: str) -> list[dict[int, float]]:
        """For each bin seed -> valid share of the samples in it; a seed with fewer than FEWEST of them is left out."""
        shares: list[dict[int, float]] = [{} for _ in range(LAST_BINS[name] + 1)]
        for seed, tallies in self.of(model).items():
            counts = [binned([tallies[part]], name) for part in ("samples", "valid")]
            for found, count, valid in zip(shares, *counts, strict=True):
                if count >= FEWEST:
                    found[seed] = valid / count
        return shares

    def mixed_shares(self, model: ModelResults, name: str, training: Tally) -> dict[int, float]:
        """
        Seed -> valid share of samples if each bin were as frequent as among the training molecules. A bin without a
        sample counts for nothing.
        """
        weights, shares = binned([training], name), {}
        for seed, tallies in self.of(model).items():
            counts = zip(weights, *(binned([tallies[part]], name) for part in ("samples", "valid")), strict=True)
            known = [(weight, valid / count) for weight, count, valid in counts if count]
            shares[seed] = sum(weight * valid for weight, valid in known) / sum(weight for weight, _ in known)
        return shares


def pooled(runs: dict[int, dict[str, Tally]], name: str) -> list[tuple[int, int]]:
    """For each bin the valid samples in it and all of them, those of all seeds together."""
    counts = [binned([tallies[part] for tallies in runs.values()], name) for part in ("valid", "samples")]
    return list(zip(*counts, strict=True))


def read_samples(path: Path) -> list[str]:
    """The samples of a run; one that is empty has an empty line."""
    return read_text("samples", path).split("\n")[:-1]


def tally_runs(lines: list[dict], runs_dir: str | Path, data_dir: str | Path, path: str | Path) -> list[dict]:
    """
    Writes a line for every run on molecules that has none, and for their training molecules. Returns the lines of the
    runs whose samples are not there.
    """
    known, absent = Hierarchy.load(path), []
    for line in lines:
        check_line(line)
        if "smiles" not in line["settings"]:
            continue
        train = line["text"]["train"]
        if train["sha256"] not in known.training:
            file = Path(data_dir) / train["file"]
            molecules = read_molecules("data_dir", file)
            if digest(file) != train["sha256"]:
                raise ValueError(f"`data_dir` must hold the {train['file']} that run {line['key']} was trained on.")
            known.training[train["sha256"]] = tally(molecules)
            append_line(path, {"training": train["sha256"], "samples": known.training[train["sha256"]]})
        samples_file = run_folder(runs_dir, line) / "samples.txt"
        if line["key"] in known.runs:
            continue
        if not samples_file.is_file():
            absent.append(line)
            continue
        samples = read_samples(samples_file)
        tallies = tally_by_validity(samples, classes_of(samples))
        check_tallies(tallies, line)
        known.runs[line["key"]] = tallies
        append_line(path, {"key": line["key"], **tallies})
    return absent
