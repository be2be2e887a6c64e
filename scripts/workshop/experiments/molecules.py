"""What a run on molecules comes to: loss on validation molecules, and what became of its samples."""

from pathlib import Path

from transformers import Trainer

from workshop.files import finite
from workshop.molecules.judging import judge
from workshop.molecules.rows import make_rows, read_molecules
from workshop.molecules.sampling import sample


def outcome(trainer: Trainer, settings: dict, validation_file: str) -> dict:
    """
    What the line of a run holds: loss on validation molecules, and what became of its samples, kept in a file. A model
    that diverged has none: there is nothing to draw from.
    """
    rows = make_rows(read_molecules("validation", validation_file), trainer.processing_class, settings["block_size"])
    rows = rows.select(range(min(len(rows), settings["evaluation_blocks"])))
    loss, samples = finite(trainer.evaluate(rows)["eval_nats_per_token"]), []
    if loss is not None:
        options = settings["smiles"]
        samples = sample(
            trainer.model,
            trainer.processing_class,
            options["samples"],
            settings["seed"],
            options["temperature"],
            options["top_k"],
            settings["block_size"],
        )
    text = "".join(f"{smiles}\n" for smiles in samples)
    (Path(trainer.args.output_dir) / "samples.txt").write_text(text, encoding="utf-8")
    return {"nats_per_token": {"validation": loss}, "samples": judge(samples)}
