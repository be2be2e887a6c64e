"""Quantises the trained models of an experiment on molecules to int8 and int4, and says what that does to their loss.

    python scripts/compare_quantised.py --experiment scripts/experiments/molecules_50k.yaml --data_dir data

`docs/deployment.md` says what is measured.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.experiments.quantised import quantise_all, quantised_report
from workshop.experiments.trained import TrainedArguments, describe_trained, load_trained
from workshop.files import check_folder, write_report
from workshop.molecules.quantising import check_torchao
from workshop.molecules.rows import read_molecules
from workshop.settings import check_counts


@dataclass
class QuantisedArguments:
    """How to quantise, what to measure on, and where to write."""

    group_size: int = field(default=8, metadata={"help": "Weights of a row that share a scale of int4, beside rows."})
    molecules: int = field(default=2048, metadata={"help": "Measure on so many of the validation molecules."})
    output_dir: str = field(default="runs/quantised_models", metadata={"help": "Where figures and table go."})

    def __post_init__(self):
        check_counts(self, "group_size")
        check_counts(self, "molecules", least=2)


def main(argv: list[str] | None = None) -> list[dict]:
    """The figures of each model: printed as tables, written into the folder, and returned."""
    asked, arguments = HfArgumentParser((TrainedArguments, QuantisedArguments)).parse_args_into_dataclasses(argv)
    check_torchao()
    experiment, path, trained = load_trained(asked)
    folder = check_folder("output_dir", arguments.output_dir, ("quantised.json", "quantised.md"))
    molecules = read_molecules("data_dir", path)[: arguments.molecules]
    results = quantise_all(trained, experiment.references, molecules, arguments.group_size)
    text = quantised_report(results, experiment.references, describe_trained(trained), len(molecules))
    write_report(folder, "quantised", results, text, indent=1)
    return results


if __name__ == "__main__":
    main()
