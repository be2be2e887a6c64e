"""The Markdown of a report on molecules: loss and validity of each family, and which differences are resolved."""

from scipy.stats import binomtest

from workshop.experiments.hierarchy import Hierarchy
from workshop.experiments.hierarchy_report import hierarchy_section
from workshop.experiments.report import (
    NOTHING,
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
from workshop.experiments.results import ExperimentResults, ModelResults
from workshop.experiments.statistics import CONFIDENCE, Mean
from workshop.molecules.judging import SAMPLE_CLASSES
from workshop.tables import config_schedule, markdown_table

READING = (
    "Loss in nats per token on validation molecules: lower is better. Valid: the share of samples that RDKit reads: "
    "higher is better; its second column is the 95% interval (Wilson) of all samples together, which knows nothing of "
    "what another seed would have trained. Unique: different molecules among the valid ones of a seed. An invalid "
    "sample is counted in the first class that fits: parentheses that do not match, a ring digit that occurs an odd "
    "number of times, valences or aromatic rings that RDKit refuses, other. Mean ± standard error over the seeds."
)
COSTS = (
    "Counted, not timed, on a molecule of mean length: FLOPs, two per multiply-add, attention as the full square, of "
    "a prefill with the head on its last token; bytes of the cache in float32 after it; layer calls of an average "
    "decode step. Training tokens are those that the batches held, padding left out; training FLOPs are those of as "
    "many molecules of mean length, without padding."
)
DIFFERENCES = (
    "A model minus the reference with the same seed, so the same batches as far as both runs go; mean ± standard "
    "error of the row's own pairs, that of validity in points. The 95% intervals are of Student's t, with one "
    "standard deviation for a whole table, and hold for each row by itself. That of validity holds the noise of the "
    "samples too. The learning rate was chosen on the validation molecules, in runs of their own."
)


def pooled_interval(model: ModelResults) -> str:
    """The 95% interval of the valid share of all samples of a model."""
    if not model.runs or model.diverged_seeds:
        return NOTHING
    counts = [line["samples"] for line in model.runs.values()]
    valid, total = (sum(found[name] for found in counts) for name in ("valid", "count"))
    interval = binomtest(valid, total).proportion_ci(CONFIDENCE, method="wilson")
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}%"


def unique_share(model: ModelResults) -> Mean | None:
    """Different molecules over valid samples; None without a run, where a run has no valid sample or diverged."""
    counts = [] if model.diverged_seeds else [line["samples"] for line in model.runs.values()]
    return Mean.of([c["unique"] / c["valid"] for c in counts]) if counts and all(c["valid"] for c in counts) else None


def results_table(results: ExperimentResults) -> str:
    """One row a model: what it is, its loss, and what became of its samples."""
    header = ["model", "layers", "width", "non-embedding parameters", "training FLOPs", "learning rate", "seeds"]
    header += ["nats per token", "valid", "of all samples", "unique", *SAMPLE_CLASSES[1:]]
    rows = []
    for model in results.models:
        row = [model.name, config_schedule(model.config), str(model.config.hidden_size)]
        row += [or_nothing(model.cost("non_embedding_parameters"), ","), scientific(model.cost("flops"))]
        row += [or_nothing(model.learning_rate, "g"), str(len(model.runs)), bits_cell(model, "validation")]
        row += [share_cell(model.mean("valid")), pooled_interval(model), share_cell(unique_share(model))]
        row += [share_cell(model.mean(kind)) for kind in SAMPLE_CLASSES[1:]]
        rows.append(row)
    return markdown_table(header, rows, text_columns=2)


def differences(results: ExperimentResults) -> str:
    """How to read a table of differences, and the table for each reference."""
    parts = [DIFFERENCES]
    for reference in results.references:
        resolved = [
            resolution(results.compare("validation", reference), "validation loss"),
            resolution(results.compare("valid", reference), "validity", in_points=True),
        ]
        parts += [f"### To `{reference}`", shares_table(results, reference, {"valid": "valid"}), " ".join(resolved)]
    return "\n\n".join(parts)


def molecules_report(results: ExperimentResults, pictures: dict[str, str], hierarchy: Hierarchy) -> str:
    """A whole report; `pictures` are file name -> what it shows."""
    tables = {
        "Results": [READING, results_table(results)],
        "Costs": [COSTS, costs_table(results)],
        "Differences": [differences(results)],
    }
    if section := hierarchy_section(results, hierarchy):
        tables["Rings and branches"] = section
    return join_report(results, pictures, tables, sweep_budget(results))
