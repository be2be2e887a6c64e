"""What a conversion is worth: held-out loss of a plain model, of models converted from it, and of a new one.

Trains a small GPT-NeoX, Llama or Qwen3 on the source of the Python standard library, starts SpiralFormers of one
configuration from it and from random weights, and trains each for the same few steps on the same blocks of text.
"""

import math
import statistics
from dataclasses import dataclass, field

from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Trainer,
    default_data_collator,
    set_seed,
)

from modeling_spiralformer.configuration_spiralformer import refuse
from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.checkpoints import parse_overrides
from workshop.conversion import to_spiralformer
from workshop.files import ROOT, check_folder
from workshop.settings import LARGEST_SEED, check_counts, check_numbers
from workshop.tables import markdown_table
from workshop.training_arguments import SpiralTrainingArguments

# How far the seed by which a start is trained is from that of its source: another order of the blocks.
ORDER_SHIFT = 1000
OUTPUT = ROOT / "runs" / "compare_starts"  # Trainer makes it, and nothing is saved there


@dataclass
class ComparisonArguments:
    """The source, the split, and how long everything is trained."""

    layer_family: str = field(
        default="gpt_neox", metadata={"help": "Whose layers the source has.", "choices": [*FAMILIES]}
    )
    hidden_size: int = field(default=64, metadata={"help": "Width of all models, with 4 heads of queries."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers of the source."})
    config_overrides: str = field(
        default="num_prelude_layers=2,num_core_layers=4,num_coda_layers=2,chunk_sizes=[8,4,2,1]",
        metadata={"help": "The loop of the converted models."},
    )
    source_steps: int = field(default=800, metadata={"help": "Optimiser steps that the source is trained for."})
    source_learning_rate: float = field(default=3e-3, metadata={"help": "Peak learning rate of the source."})
    max_steps: int = field(default=100, metadata={"help": "Optimiser steps that every start is trained for."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of every start."})
    block_size: int = field(default=128, metadata={"help": "Tokens per example."})
    batch_size: int = field(default=8, metadata={"help": "Examples per optimiser step."})
    max_eval_samples: int = field(default=64, metadata={"help": "Held-out blocks."})
    train_file: str | None = field(default=None, metadata={"help": "Text. Default: the standard library's source."})
    validation_file: str | None = field(default=None, metadata={"help": "Held-out text that goes with train_file."})
    starts: list[str] | None = field(default=None, metadata={"help": "Only the starts of these names. Default: all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One source and comparison each."})

    def __post_init__(self):
        if self.layer_family not in FAMILIES:
            refuse("layer_family", self.layer_family, f"one of {[*FAMILIES]}")
        check_counts(self, "hidden_size", "num_hidden_layers", "source_steps", "max_steps", "block_size", "batch_size")
        check_counts(self, "max_eval_samples")
        check_numbers(self, source_learning_rate=(0, math.inf), learning_rate=(0, math.inf))
        for seed in self.seeds:
            if not 0 <= seed <= LARGEST_SEED - ORDER_SHIFT:
                raise ValueError(f"`seeds` must be in [0, {LARGEST_SEED - ORDER_SHIFT}], but got {seed}.")
        check_folder("output_dir", OUTPUT)


def new_source(arguments: ComparisonArguments, vocab_size: int) -> PreTrainedModel:
    """A model of the family with random weights, for the tokenizer in `tokenization/`."""
    family, width = FAMILIES[arguments.layer_family], arguments.hidden_size
    sizes = {"intermediate_size": 4 * width}
    if "num_key_value_heads" in family.fields():  # queries in pairs, and a gated MLP of as many parameters
        sizes = {"intermediate_size": round(8 / 3 * width), "num_key_value_heads": 2, "head_dim": width // 4}
    config = family.config_class(
        vocab_size=vocab_size,
        hidden_size=width,
        num_attention_heads=4,
        num_hidden_layers=arguments.num_hidden_layers,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **sizes,
    )
    return AutoModelForCausalLM.from_config(config)


def starts(source: PreTrainedModel, options: dict) -> dict:
    """Name -> a function that makes the model: the default conversion first, then what else was tried, then random."""

    def convert(core_layers=None, router_bias=None, **changes):
        bias = {} if router_bias is None else {"router_bias": router_bias}
        return lambda: to_spiralformer(source, core_layers, **bias, **{**options, **changes})

    def random():
        return AutoModelForCausalLM.from_config(to_spiralformer(source, **options).config)

    model = to_spiralformer(source, **options)
    if not model.config.chunk_sizes:
        refuse("chunk_sizes", model.config.chunk_sizes, "at least one chunk size: a plain stack has no core to start")
    first, count = model.config.num_prelude_layers, len(model.model.core)
    between = range(first, source.config.num_hidden_layers - model.config.num_coda_layers)
    edges = [index * len(between) // count for index in range(count + 1)]
    means = [list(between[start:end]) for start, end in zip(edges, edges[1:], strict=False)]
    return {
        "converted": convert(),
        "core from the first layers": convert([[index] for index in between[:count]]),
        "core from the last layers": convert([[index] for index in between[-count:]]),
        "core from means of neighbours": convert(means),
        "router_bias 0": convert(router_bias=0.0),
        "router_bias 4": convert(router_bias=4.0),
        "router_bias 8": convert(router_bias=8.0),
        "anchor": convert(topology="anchor"),
        "random": random,
    }


def make_trainer(
    model: PreTrainedModel, arguments: ComparisonArguments, blocks: dict[str, Dataset], seed: int, **options
) -> Trainer:
    """The paper's optimiser on the given blocks, nothing saved."""
    training = SpiralTrainingArguments(
        output_dir=str(OUTPUT),
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        seed=seed,
        **options,
    )
    return Trainer(
        model=model,
        args=training,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        data_collator=default_data_collator,
    )


def compare(arguments: ComparisonArguments, seed: int, blocks: dict[str, Dataset], vocab_size: int) -> dict:
    """Name -> held-out loss in nats per token before and after `max_steps`; the source is not trained further."""
    set_seed(seed)
    source = new_source(arguments, vocab_size)
    makers = starts(source, parse_overrides(arguments.config_overrides))
    chosen = list(makers) if arguments.starts is None else arguments.starts
    for name in chosen:
        if name not in makers:
            raise ValueError(f"`starts` must be among {list(makers)}, but got {name!r}.")
        makers[name]()  # one that does not go with `config_overrides` is refused before the source is trained
    options = {"max_steps": arguments.source_steps, "learning_rate": arguments.source_learning_rate}
    trainer = make_trainer(source, arguments, blocks, seed, **options)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    losses = {"source": (loss, loss)}
    print(f"seed {seed}, source: {loss:.3f}", flush=True)
    options = {"max_steps": arguments.max_steps, "learning_rate": arguments.learning_rate}
    source.eval()
    for name in chosen:
        set_seed(seed)
        trainer = make_trainer(makers[name](), arguments, blocks, seed + ORDER_SHIFT, **options)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        losses[name] = (before, trainer.evaluate()["eval_loss"])
        print(f"seed {seed}, {name}: {losses[name][0]:.3f} {losses[name][1]:.3f}", flush=True)
    return losses


def format_table(runs: list[dict], max_steps: int) -> str:
    """Mean over the seeds, and the lowest and highest of them, as Markdown."""

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    rows = []
    for name in runs[0]:
        before, after = zip(*(run[name] for run in runs), strict=True)
        rows.append([name, cell(before), "" if name == "source" else cell(after)])
    return markdown_table(["start", "held-out loss, step 0", f"after {max_steps} steps"], rows)
