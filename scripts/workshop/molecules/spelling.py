"""Random spellings of molecules by RDKit: the same molecule, its atoms numbered otherwise."""

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from workshop.molecules.judging import check_rdkit, read_smiles
from workshop.tokenizers import split_smiles

ATTEMPTS = 10


def spellings(smiles: str, count: int, known: set[str], longest: int, generator: random.Random) -> Iterator[str]:
    """
    `count` spellings of a molecule, each from a random order of its atoms; equal ones may be among them.

    An order whose spelling holds a token that is not `known`, or more than `longest` tokens, is drawn again, ten times
    at most: then the given spelling stands. Raises ValueError for a SMILES that RDKit does not read.
    """
    from rdkit import Chem

    molecule = read_smiles(smiles)
    atoms = list(range(molecule.GetNumAtoms()))
    for _ in range(count):
        for _ in range(ATTEMPTS):
            generator.shuffle(atoms)
            spelled = Chem.MolToSmiles(Chem.RenumberAtoms(molecule, atoms), canonical=False)
            if fits(spelled, known, longest):
                yield spelled
                break
        else:
            yield smiles


def fits(smiles: str, known: set[str], longest: int) -> bool:
    """Whether a spelling consists of known tokens, at most so many."""
    try:
        tokens = split_smiles(smiles)
    except ValueError:  # such as a tenth ring that is open at once, %10
        return False
    return len(tokens) <= longest and known.issuperset(tokens)


def write_spellings(
    molecules: list[str], folder: Path, count: int, seed: int, known: set[str], longest: int, quiet: bool = False
) -> Path:
    """
    A file in `folder` with `count` spellings of each molecule, one a line, in their order. Its name tells what it is
    made of: a resumed run finds it again.
    """
    check_rdkit()
    import rdkit

    made_of = "\n".join([rdkit.__version__, f"{count} {seed} {longest}", *sorted(known), *molecules])
    path = folder / f"spellings-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.txt"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished, generator = path.with_suffix(".unfinished"), random.Random(seed)
    with open(unfinished, "w", encoding="utf-8") as file:
        for smiles in tqdm(molecules, desc="spelling", disable=quiet):
            file.writelines(f"{spelled}\n" for spelled in spellings(smiles, count, known, longest, generator))
    return unfinished.rename(path)
