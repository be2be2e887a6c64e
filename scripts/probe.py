"""Probes the core of a checkpoint on a text: attention per resolution, and how much each block changes the state.

    python scripts/probe.py --model my_model --control my_control --text text.txt --output_dir runs/probe

`docs/probes.md` says what is measured, and how to read the pictures.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoints import load_config, load_model, load_tokenizer
from files import check_folder, is_finite, read_text, write_json
from plot_probes import PICTURE_FILES, draw, report
from probes import check_length, check_looped, collect, cut_text
from training_arguments import check_counts
from transformers import HfArgumentParser

LARGEST_DEFAULT_LENGTH = 1024


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

    def __post_init__(self):
        check_counts(self, "sequences", "batch_size")


def probe(arguments: ProbeArguments) -> dict:
    """What was asked and what `collect` found, for the model and its control, on the same text."""
    paths = {"model": arguments.model, "control": arguments.control}
    configs = {role: load_config(path, field=role) for role, path in paths.items() if path is not None}
    for config in configs.values():
        check_looped(config)
    length = arguments.length
    if length is None:
        length = min(LARGEST_DEFAULT_LENGTH, *(config.max_position_embeddings for config in configs.values()))
    for config in configs.values():  # before one of them takes its time and the other is refused
        check_length(config, length)
    text = read_text("text", arguments.text)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    results = {"text": Path(arguments.text).name, "sequences": arguments.sequences, "length": length, "models": {}}
    for role, config in configs.items():
        tokenizer = load_tokenizer(paths[role], config, field=role)
        sequences = cut_text(text, tokenizer, arguments.sequences, length)
        model = load_model(paths[role], config).to(device)
        results["models"][role] = {
            "checkpoint": Path(paths[role]).name,
            **collect(model, sequences, arguments.batch_size),
        }
    return results


def main(argv: list[str] | None = None) -> dict:
    """Probes what the command line names, prints the table, and writes figures, table and pictures."""
    (arguments,) = HfArgumentParser(ProbeArguments).parse_args_into_dataclasses(argv)
    folder = check_folder("output_dir", arguments.output_dir, ("probes.json", "probes.md", *PICTURE_FILES))
    results = probe(arguments)
    table = report(results)
    print(table)
    write_json(folder / "probes.json", results)
    (folder / "probes.md").write_text(table + "\n", encoding="utf-8")
    if is_finite(results):
        draw(results, folder)
    else:
        print(f"no pictures: some of the figures are not finite, and null in {folder / 'probes.json'}")
    return results


if __name__ == "__main__":
    main()
