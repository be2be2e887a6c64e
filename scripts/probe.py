"""Probes the core of a checkpoint on a text: attention per resolution, and how much each block changes the state.

    python scripts/probe.py --model my_model --control my_control --text text.txt --output_dir runs/probe

`docs/probes.md` says what is measured, and how to read the pictures.
"""

from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.files import check_folder, is_finite, remove_older, write_json
from workshop.probes.measures import LOCAL_TOKENS, probe
from workshop.probes.pictures import PICTURE_FILES, draw, report
from workshop.settings import check_counts


@dataclass
class ProbeArguments:
    """What to probe, and on what."""

    model: str = field(metadata={"help": "Folder or Hub name of a SpiralFormer checkpoint with its tokenizer."})
    text: str = field(metadata={"help": "File of UTF-8 text; its first tokens are read."})
    control: str | None = field(
        default=None, metadata={"help": "A second checkpoint to set beside it, such as its full-resolution loop."}
    )
    output_dir: str = field(default="runs/probe", metadata={"help": "Folder of the figures, table and pictures."})
    sequences: int = field(default=32, metadata={"help": "How many sequences are cut from the text."})
    length: int | None = field(
        default=None, metadata={"help": "Tokens of a sequence. Default: max_position_embeddings, at most 1024."}
    )
    batch_size: int = field(default=4, metadata={"help": "Sequences in one forward pass."})
    local_tokens: int = field(default=LOCAL_TOKENS, metadata={"help": "Tokens of the window of the local mass."})
    smiles: bool = field(
        default=False, metadata={"help": "The text is a molecule a line: those of `length` tokens are the sequences."}
    )

    def __post_init__(self):
        check_counts(self, "sequences", "batch_size", "local_tokens")
        if self.smiles and self.length is None:
            raise ValueError("`length` must be given with `smiles`: the tokens of a molecule, bos and eos included.")


def main(argv: list[str] | None = None) -> dict:
    """Probes what the command line names, prints the table, and writes figures, table and pictures."""
    (arguments,) = HfArgumentParser(ProbeArguments).parse_args_into_dataclasses(argv)
    folder = check_folder("output_dir", arguments.output_dir, ("probes.json", "probes.md", *PICTURE_FILES))
    checkpoints = {"model": arguments.model, "control": arguments.control}
    how = (arguments.sequences, arguments.length, arguments.batch_size, arguments.smiles, arguments.local_tokens)
    results = probe(checkpoints, arguments.text, *how)
    table = report(results)
    print(table)
    write_json(folder / "probes.json", results)
    (folder / "probes.md").write_text(table + "\n", encoding="utf-8")
    remove_older(folder, PICTURE_FILES)
    if is_finite(results):
        draw(results, folder)
    else:
        print(f"no pictures: some of the figures are not finite, and null in {folder / 'probes.json'}")
    return results


if __name__ == "__main__":
    main()
