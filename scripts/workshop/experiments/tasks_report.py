"""The Markdown of a report on a synthetic task: loss and accuracy of each family, and the differences resolved."""

from workshop.experiments.report import (
    bits_cell,
    costs_table,
    join_report,
    or_nothing,
    resolution,
    scientific,
    share_cell,
    shares_table,
    sweep_budget,
)
from workshop.experiments.results import ExperimentResults
from workshop.tables import config_schedule, markdown_table

READING = (
    "Loss in nats per predicted token on validation rows: lower is better. Accuracy: the share of right answers, as "
    "[the page](../experiments.md#synthetic-tasks) defines them: higher is better. Mean ± standard error over seeds."
)
COSTS = (
    "Counted, not timed, on a row of mean length: FLOPs, two per multiply-add, attention as the full square, of a "
    "prefill with the head on its last token; bytes of the cache in float32 after it; layer calls of an average "
    "decode step. Training tokens are those that the batches held, padding left out; training FLOPs are those of as "
    "many rows of mean length, without padding."
)
DIFFERENCES = (
    "A model minus the reference with the same seed, so the same batches; mean ± standard error of the row's own "
    "pairs, that of accuracy in points. The 95% intervals are of Student's t, with one standard deviation for a whole "
    "column, and hold for each cell by itself: of twenty differences that are really 0, one is expected outside. The "
    "learning rate was chosen by the loss on validation rows, in runs of their own; accuracy chose nothing. By class, "
    "a bold difference is one whose interval does not hold 0 and that is 0.1 points or more: where nearly all answers "
    "are right nothing scatters."
)
SMALLEST_BOLD = 0.001


def results_table(results: ExperimentResults) -> str:
    """One row a model: what it is, its loss, and its accuracy on each split."""
    header = ["model", "layers", "width", "non-embedding parameters", "training FLOPs", "learning rate", "seeds"]
    header += ["nats per token", *(f"accuracy, {split}" for split in results.splits)]
    rows = []
    for model in results.models:
        row = [model.name, config_schedule(model.config), str(model.config.hidden_size)]
        row += [or_nothing(model.cost("non_embedding_parameters"), ","), scientific(model.cost("flops"))]
        row += [or_nothing(model.learning_rate, "g"), str(len(model.runs)), bits_cell(model, "validation")]
        row += [share_cell(model.mean(f"{split}/all")) for split in results.splits]
        rows.append(row)
    return markdown_table(header, rows, text_columns=2)


def values(names: list[str]) -> list[str]:
    """The values of classes, without their word: the heads of a table."""
    return [name.partition(" ")[2] for name in names]


def class_tables(results: ExperimentResults) -> list[str]:
    """For each split and word a table: one row a model, one column a class."""
    parts = []
    for (split, word), names in results.classes.items():
        rows = [
            [model.name, *(share_cell(model.mean(f"{split}/{name}")) for name in names)] for model in results.models
        ]
        parts += [f"### {split.capitalize()}, by {word}", markdown_table(["model", *values(names)], rows)]
    return parts


def class_difference_tables(results: ExperimentResults, reference: str) -> list[str]:
    """For each split and word a table of paired differences in accuracy; bold where the interval does not hold 0."""
    parts = []
    for (split, word), names in results.classes.items():
        comparisons = [results.compare(f"{split}/{name}", reference) for name in names]
        rows = []
        for model in results.models:
            if model.name == reference:
                continue
            row = [model.name]
            for comparison in comparisons:
                mean, interval = comparison.mean(model.name), comparison.interval(model.name)
                outside = interval is not None and not interval[0] <= 0 <= interval[1]
                is_bold = mean is not None and outside and abs(mean.mean) >= SMALLEST_BOLD
                cell = share_cell(mean, "+")
                row.append(f"**{cell}**" if is_bold else cell)
            rows.append(row)
        parts += [f"{split.capitalize()}, by {word}:", markdown_table(["model", *values(names)], rows)]
    return parts


def differences(results: ExperimentResults) -> list[str]:
    """How to read a table of differences, and the tables for each reference."""
    parts = [DIFFERENCES]
    shares = {f"accuracy, {split}": f"{split}/all" for split in results.splits}
    for reference in results.references:
        resolved = [resolution(results.compare("validation", reference), "validation loss")]
        resolved += [
            resolution(results.compare(share, reference), f"{name},", in_points=True) for name, share in shares.items()
        ]
        parts += [f"### To `{reference}`", shares_table(results, reference, shares), " ".join(resolved)]
        parts += class_difference_tables(results, reference)
    return parts


def tasks_report(results: ExperimentResults, pictures: dict[str, str]) -> str:
    """A whole report; `pictures` are file name -> what it shows."""
    tables = {"Results": [READING, results_table(results)]}
    if by_class := class_tables(results):
        tables["Accuracy by class"] = by_class
    tables |= {"Costs": [COSTS, costs_table(results)], "Differences": differences(results)}
    return join_report(results, pictures, tables, sweep_budget(results))
