"""Probes the core of every looped model of an experiment on molecules, all seeds, and sets the models side by side.

    python scripts/compare_probes.py --experiment scripts/experiments/molecules_50k.yaml --data_dir data

`docs/probes.md` says what is measured; `probe.py` draws the pictures of one model.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.experiments.probing import probe_all, probes_report
from workshop.experiments.trained import TrainedArguments, describe_trained, load_trained
from workshop.files import check_folder, write_report
from workshop.settings import check_counts


@dataclass
class ProbesArguments:
    """What to read, and where to write."""

    sequences: int = field(default=200, metadata={"help": "How many of the validation molecules are read."})
    length: int | None = field(
        default=None,
        metadata={"help": "Their tokens, bos and eos included. Default: `mean_length` of the experiment."},
    )
    local_tokens: int = field(default=8, metadata={"help": "Tokens of the window of the local mass."})
    output_dir: str = field(default="runs/probed_models", metadata={"help": "Where figures and tables go."})

    def __post_init__(self):
        check_counts(self, "sequences", "length", "local_tokens")


def main(argv: list[str] | None = None) -> list[dict]:
    """The figures of each model: printed as tables, written into the folder, and returned."""
    asked, arguments = HfArgumentParser((TrainedArguments, ProbesArguments)).parse_args_into_dataclasses(argv)
    experiment, path, trained = load_trained(asked)
    if not asked.models:  # a model without a loop has nothing to compare
        trained = [item for item in trained if experiment.model_config(item.model).num_iterations > 1]
    folder = check_folder("output_dir", arguments.output_dir, ("probes.json", "probes.md"))
    how = (arguments.sequences, arguments.length or experiment.example_length, arguments.local_tokens)
    results = probe_all(trained, path, *how)
    text = probes_report(results, describe_trained(trained), *how)
    write_report(folder, "probes", results, text)
    return results


if __name__ == "__main__":
    main()
