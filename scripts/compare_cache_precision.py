"""Quantises the cache of models of molecules to int8 and int4, level by level, and says what that does to their loss.

    python scripts/compare_cache_precision.py --data_file data/zinc_jtnn/valid.txt

`docs/cache_precision.md` says what is measured.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.files import ROOT, check_folder, write_report
from workshop.molecules.cache_precision import compare_all, precision_report
from workshop.molecules.rows import read_molecules
from workshop.settings import check_counts

MODELS = [str(ROOT / "checkpoints" / name) for name in ("spiralformer-155k", "spiralformer-53k", "smollm-53k")]


@dataclass
class CachePrecisionArguments:
    """Which models, what to measure on, and where to write."""

    data_file: str = field(metadata={"help": "Molecules that the models were not trained on, one SMILES a line."})
    models: list[str] = field(
        default_factory=lambda: list(MODELS),
        metadata={"help": "Folders of checkpoints with their tokenizers. Default: those that the repository holds."},
    )
    molecules: int = field(default=4096, metadata={"help": "Measure on so many of the molecules, the first."})
    group_size: int = field(default=8, metadata={"help": "Channels of a head that share a scale, beside whole heads."})
    output_dir: str = field(default="runs/cache_precision", metadata={"help": "Where figures and tables go."})

    def __post_init__(self):
        check_counts(self, "group_size")
        check_counts(self, "molecules", least=2)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """The figures of each model: printed as tables, written into the folder, and returned."""
    (arguments,) = HfArgumentParser(CachePrecisionArguments).parse_args_into_dataclasses(argv)
    folder = check_folder("output_dir", arguments.output_dir, ("cache_precision.json", "cache_precision.md"))
    molecules = read_molecules("data_file", arguments.data_file)[: arguments.molecules]
    results = compare_all(arguments.models, molecules, arguments.group_size)
    text = precision_report(results, arguments.group_size, len(molecules))
    write_report(folder, "cache_precision", results, text, indent=1)
    return results


if __name__ == "__main__":
    main()
