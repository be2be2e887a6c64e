"""Draws molecules from a model, and says what they are worth; and what becomes of them when its loop stops early.

    python scripts/evaluate_molecules.py --model runs/molecules --train_file data/zinc_jtnn/train.txt --by_pass

`docs/molecules.md` says what is measured.
"""

import csv
import sys
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.evaluation import load
from workshop.files import check_folder, remove_older, write_json
from workshop.molecules.hierarchy import hierarchy_figures, tally, tally_by_validity
from workshop.molecules.judging import check_rdkit, classes_of
from workshop.molecules.measures import measure
from workshop.molecules.passes import check_loop, errors_by_pass
from workshop.molecules.pictures import draw_passes
from workshop.molecules.rows import read_molecules
from workshop.molecules.sampling import SAMPLING, sample
from workshop.molecules.tables import figures_table, hierarchy_table, passes_table
from workshop.settings import LARGEST_SEED, check_counts, check_numbers


@dataclass
class MoleculeEvaluationArguments:
    """What to evaluate, on how many samples."""

    model: str = field(metadata={"help": "Folder or Hub name of a checkpoint with its tokenizer."})
    train_file: str = field(metadata={"help": "The molecules it was trained on, one SMILES a line."})
    samples: int = field(default=10000, metadata={"help": "How many molecules are drawn."})
    temperature: float = field(default=SAMPLING["temperature"], metadata={"help": "Of the samples."})
    top_k: int = field(default=SAMPLING["top_k"], metadata={"help": "Tokens that are drawn from."})
    max_length: int = field(
        default=SAMPLING["max_length"], metadata={"help": "Most tokens of a sample, with bos and eos."}
    )
    seed: int = field(default=0, metadata={"help": "Of samples, bootstrap and heads."})
    references: int = field(default=10000, metadata={"help": "Training molecules that FCD is taken to."})
    resamples: int = field(default=200, metadata={"help": "Draws of the bootstrap."})
    by_pass: bool = field(default=False, metadata={"help": "Also stop the model after each of its passes."})
    pass_samples: int = field(default=2000, metadata={"help": "Molecules that are drawn after each pass."})
    head_steps: int | None = field(
        default=None, metadata={"help": "With by_pass: train a linear head for each pass, so many steps."}
    )
    output_dir: str = field(default="runs/molecules_evaluation", metadata={"help": "Where figures and samples go."})

    def __post_init__(self):
        check_numbers(self, seed=(0, LARGEST_SEED))
        check_counts(self, "samples", "top_k", "pass_samples", "head_steps")
        check_counts(self, "max_length", "references", "resamples", least=2)
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, but got {self.temperature}.")
        if self.head_steps is not None and not self.by_pass:
            raise ValueError(f"`head_steps` must go with `by_pass`, but got only {self.head_steps}.")


def main(argv: list[str]) -> dict:
    """The figures: printed as tables, written with samples and picture into the folder, and returned."""
    (arguments,) = HfArgumentParser(MoleculeEvaluationArguments).parse_args_into_dataclasses(argv)
    check_rdkit()
    folder = check_folder("output_dir", arguments.output_dir, ("molecules.json", "samples.csv", "passes.png"))
    training = read_molecules("train_file", arguments.train_file)
    model, tokenizer = load(arguments.model, arguments.model)
    if arguments.by_pass:
        check_loop(model)
    options = {name: getattr(arguments, name) for name in ("seed", "temperature", "top_k", "max_length")}
    samples = sample(model, tokenizer, arguments.samples, **options)
    figures = measure(samples, training, arguments.references, arguments.resamples, arguments.seed)
    classes = classes_of(samples)
    hierarchy = hierarchy_figures(tally_by_validity(samples, classes), tally(training))
    print(f"{figures_table(figures, len(samples))}\n\n{hierarchy_table(hierarchy)}")
    results = {"settings": vars(arguments), "figures": figures, "hierarchy": hierarchy}
    folder.mkdir(parents=True, exist_ok=True)
    remove_older(folder, ["passes.png"])
    with open(folder / "samples.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("smiles", "class"), *((smiles, classes[smiles]) for smiles in samples)])
    if arguments.by_pass:
        options["count"] = arguments.pass_samples
        results["passes"] = list(errors_by_pass(model, tokenizer, training, arguments.head_steps, **options))
        print(f"\n{passes_table(results['passes'])}")
        draw_passes(results["passes"], folder / "passes.png")
    write_json(folder / "molecules.json", results, indent=1)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
