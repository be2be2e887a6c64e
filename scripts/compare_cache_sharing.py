"""Lets iterations of a loop share an entry of the cache, and says what that does to the loss of models of molecules.

    python scripts/compare_cache_sharing.py --data_file data/zinc_jtnn/valid.txt

`docs/cache_precision.md` says what is measured.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.files import ROOT, check_folder, write_report
from workshop.molecules.cache_sharing import share_all, sharing_report
from workshop.molecules.rows import read_molecules
from workshop.settings import check_counts

MODELS = [str(ROOT / "checkpoints" / name) for name in ("spiralformer-53k", "smollm-53k")]


@dataclass
class CacheSharingArguments:
    """Which models, what to measure on, and where to write."""

    data_file: str = field(metadata={"help": "Molecules that the models were not trained on, one SMILES a line."})
    models: list[str] = field(
        default_factory=lambda: list(MODELS),
        metadata={"help": "Folders of checkpoints with their tokenizers. Default: those whose schedules repeat."},
    )
    molecules: int = field(default=256, metadata={"help": "Measure on so many of the molecules, the first."})
    output_dir: str = field(default="runs/cache_sharing", metadata={"help": "Where figures and table go."})

    def __post_init__(self):
        check_counts(self, "molecules", least=2)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    """The figures of each model: printed as a table, written into the folder, and returned."""
    (arguments,) = HfArgumentParser(CacheSharingArguments).parse_args_into_dataclasses(argv)
    folder = check_folder("output_dir", arguments.output_dir, ("cache_sharing.json", "cache_sharing.md"))
    molecules = read_molecules("data_file", arguments.data_file)[: arguments.molecules]
    results = share_all(arguments.models, molecules)
    text = sharing_report(results, len(molecules))
    write_report(folder, "cache_sharing", results, text, indent=1)
    return results


if __name__ == "__main__":
    main()
