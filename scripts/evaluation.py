"""What `evaluate.py` runs: sliding-window perplexity of texts, LAMBADA through lm-evaluation-harness, one table."""

import logging
from dataclasses import dataclass, field

import evaluate
import torch
from checkpoints import load_config, load_model, load_tokenizer
from files import check_file, write_json
from training_arguments import ROOT, check_counts
from training_data import load_file
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

METRIC = ROOT / "scripts" / "metrics" / "sliding_window_perplexity"
TASKS = ROOT / "scripts" / "tasks"
LARGEST_DEFAULT_WINDOW = 1024
COLUMNS = ("data", "size", "perplexity", "bits per byte", "accuracy")


@dataclass
class EvaluationArguments:
    """What to evaluate, and on what."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of the checkpoint."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the checkpoint's own tokenizer."})
    text_files: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files of text: .txt (one document), or .json, .jsonl, .csv (a document a row, column `text`)."
        },
    )
    window: int | None = field(
        default=None, metadata={"help": "Tokens seen at once. Default: max_position_embeddings, at most 1024."}
    )
    stride: int | None = field(
        default=None, metadata={"help": "Tokens from one window to the next, at most the window. Default: its half."}
    )
    batch_size: int = field(default=8, metadata={"help": "Windows, or passages of LAMBADA, in one forward pass."})
    lambada_folder: str | None = field(default=None, metadata={"help": "Folder that holds lambada_test.jsonl."})
    limit: int | None = field(
        default=None, metadata={"help": "Only the first so many documents of each file and passages of LAMBADA."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Where to write the figures as JSON."})

    def __post_init__(self):
        self.tokenizer_name = self.tokenizer_name or self.model_name_or_path
        if not self.text_files and self.lambada_folder is None:
            raise ValueError("`text_files` or `lambada_folder` must be given, but got neither.")
        check_counts(self, "batch_size", "limit")
        if self.output_file is not None:
            check_file("output_file", self.output_file)


def choose_window(window: int | None, longest: int) -> int:
    """Tokens per window; a model is not asked about positions that it does not claim."""
    if window is None:
        return min(LARGEST_DEFAULT_WINDOW, longest)
    if not 1 <= window <= longest:
        raise ValueError(f"`window` must be in [1, max_position_embeddings = {longest}], but got {window}.")
    return window


def load(arguments: EvaluationArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, on the accelerator where there is one, and its tokenizer."""
    config = load_config(arguments.model_name_or_path)
    tokenizer = load_tokenizer(arguments.tokenizer_name, config)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    model = load_model(arguments.model_name_or_path, config).to(accelerator or "cpu")
    return model.eval(), tokenizer


def evaluate_text(path: str, model, tokenizer, arguments: EvaluationArguments) -> dict:
    """Sliding-window figures of the documents of one file."""
    texts = load_file("text_files", path)
    if arguments.limit is not None:
        texts = texts.select(range(min(arguments.limit, len(texts))))
    metric = evaluate.load(str(METRIC))
    window = choose_window(arguments.window, model.config.max_position_embeddings)
    return metric.compute(
        predictions=list(texts["text"]),
        model=model,
        tokenizer=tokenizer,
        window=window,
        stride=arguments.stride,
        batch_size=arguments.batch_size,
    )


def evaluate_lambada(model, tokenizer, arguments: EvaluationArguments) -> dict:
    """Accuracy (is the last word the most likely continuation, token by token?) and perplexity of the last word."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch_size)
    tasks = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"lambada_folder": arguments.lambada_folder}
    )
    results = simple_evaluate(
        harness,
        tasks=["lambada_local"],
        task_manager=tasks,
        limit=arguments.limit,
        bootstrap_iters=0,  # a hundred thousand resamplings for one error bar
    )
    figures = results["results"]["lambada_local"]
    return {
        "perplexity": figures["perplexity,none"],
        "accuracy": figures["acc,none"],
        "passages": results["n-samples"]["lambada_local"]["effective"],
    }


def format_table(figures: dict[str, dict]) -> str:
    """One row a file, and one for LAMBADA; a dash where a figure does not exist."""
    rows = [COLUMNS]
    for name, values in figures.items():
        size = f"{values['tokens']} tokens" if "tokens" in values else f"{values['passages']} passages"
        measured = [(values.get(key.replace(" ", "_")), key) for key in COLUMNS[2:]]
        rows.append((name, size, *("-" if value is None else f"{value:.4g}" for value, _ in measured)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def run(arguments: EvaluationArguments) -> dict[str, dict]:
    """All figures by file name, LAMBADA last."""
    model, tokenizer = load(arguments)
    figures = {path: evaluate_text(path, model, tokenizer, arguments) for path in arguments.text_files}
    if arguments.lambada_folder is not None:
        figures["LAMBADA"] = evaluate_lambada(model, tokenizer, arguments)
    return figures


def main(argv: list[str]) -> dict[str, dict]:
    """Evaluates what the command line names, prints the table, writes the figures and returns them."""
    (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    figures = run(arguments)
    print(format_table(figures))
    if arguments.output_file is not None:
        write_json(arguments.output_file, figures, indent=1)
    return figures
