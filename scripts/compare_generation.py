"""Compares what generation costs checkpoints with one tokenizer: cache, prefill, steps, and drafts for one another.

    python scripts/compare_generation.py --models runs/source runs/spiral --text_file text.txt --compiled

Of all times the ratios to the first model's, made within one run, are what to read: seconds are this machine's.
"""

import json
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from workshop.evaluation import load
from workshop.files import check_file, read_text, write_json
from workshop.generation import compare_assisted, compare_contexts, time_compiled
from workshop.memory import MEBIBYTE
from workshop.settings import check_counts
from workshop.tables import markdown_table


@dataclass
class GenerationArguments:
    """Which models, on which text, and how long."""

    models: list[str] = field(metadata={"help": "Folders or Hub names; the first one is what the others are held to."})
    text_file: str = field(metadata={"help": "Text whose beginning is the context, and pieces of which are prompts."})
    context_lengths: list[int] = field(default_factory=lambda: [512, 4096], metadata={"help": "Tokens before a step."})
    new_tokens: int = field(default=32, metadata={"help": "Greedy tokens after each context and prompt."})
    prompts: int = field(default=4, metadata={"help": "Pieces of the text for assisted decoding; 0 for none."})
    prompt_length: int = field(default=64, metadata={"help": "Tokens of such a piece."})
    rounds: int = field(default=3, metadata={"help": "Rounds through all models, after one that is not counted."})
    compiled: bool = field(default=False, metadata={"help": "Also generate with a compiled static cache."})
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})

    def __post_init__(self):
        check_counts(self, "context_lengths", "new_tokens", "prompt_length", "rounds")
        check_counts(self, "prompts", least=0)
        if self.output_file is not None:
            check_file("output_file", self.output_file)


def main(arguments: GenerationArguments) -> dict:
    """Figures: printed as tables, written where the command line asks, and returned."""
    loaded = {name: load(name, name) for name in arguments.models}
    models = {name: model for name, (model, _) in loaded.items()}
    _, tokenizer = loaded[arguments.models[0]]
    first, new_tokens = arguments.models[0], arguments.new_tokens
    text = read_text("text_file", arguments.text_file)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    needed = max(*arguments.context_lengths, arguments.prompts * arguments.prompt_length)
    if ids.shape[1] < needed:
        raise ValueError(f"`text_file` must hold {needed} tokens, but {arguments.text_file!r} has {ids.shape[1]}.")
    contexts = compare_contexts(models, ids, arguments.context_lengths, new_tokens, arguments.rounds)
    rows = []
    for length, by_name in contexts.items():
        for name, run in by_name.items():
            ratios = [f"{run[key] / by_name[first][key]:.2f}" for key in ("prefill", "step")]
            rows.append([name, str(length), f"{run['bytes'] / MEBIBYTE:.1f}", f"{1 / run['step']:.1f}", *ratios])
    print(markdown_table(["model", "context", "MiB of cache", "tokens/s", "prefill", "step"], rows))

    prompts = [ids[:, i * arguments.prompt_length :][:, : arguments.prompt_length] for i in range(arguments.prompts)]
    assisted = compare_assisted(models, prompts, new_tokens, arguments.rounds) if prompts else {}
    rows = [
        [*pair, f"{run['accepted']:.1%}", f"{run['tokens_per_call']:.1f}", f"{run['ratio']:.2f}"]
        for pair, run in assisted.items()
    ]
    print(markdown_table(["target", "assistant", "accepted", "tokens per call", "time to alone"], rows, 2))

    compiled = {}
    if arguments.compiled:
        compiled = {
            name: time_compiled(model, ids[:, : arguments.prompt_length], new_tokens, arguments.rounds)
            for name, model in models.items()
        }
        rows = [[name, f"{run['compiled'] / run['eager']:.2f}"] for name, run in compiled.items()]
        print(markdown_table(["model", "compiled to eager, static cache"], rows))
    figures = {
        "contexts": contexts,
        "assisted": {" < ".join(pair): run for pair, run in assisted.items()},
        "compiled": compiled,
    }
    if arguments.output_file is not None:
        write_json(arguments.output_file, figures, indent=1)
    return json.loads(json.dumps(figures))


if __name__ == "__main__":
    main(*HfArgumentParser(GenerationArguments).parse_args_into_dataclasses())
