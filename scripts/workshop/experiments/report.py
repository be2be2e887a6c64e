"""The Markdown of a report: what ran, what came out, and which differences are larger than the seeds' own."""

import math
from collections.abc import Iterable, Sequence

from workshop.experiments.results import ExperimentResults, ModelResults, figure
from workshop.experiments.statistics import HIGHER, Comparison, Mean
from workshop.published import ABLATIONS, BEST_RECURRENCE_RATIOS, PERPLEXITIES
from workshop.tables import config_schedule, markdown_table

NOTHING, DIVERGED = "-", "diverged"
# What the paper reports beside the models of each kind of report: where -> model -> perplexity on the Pile.
PAPER = {"table": PERPLEXITIES, "ablations": {"410M": ABLATIONS}, "ratio": {}}
COSTS = (
    "Counted, not timed: FLOPs, two per multiply-add, attention as the full square, here of a prefill of one block "
    "with the head on its last token; "
    "bytes of the cache in float32 after a block; layer calls of an average decode step."
)

# -- cells ------------------------------------------------------------------------------------------------------------


def or_nothing(value: float | None, form: str) -> str:
    """A number in the given format, or a dash."""
    return NOTHING if value is None else format(value, form)


def scientific(value: float | None) -> str:
    """Three digits and a power of ten, such as 1.90e12."""
    return NOTHING if value is None else f"{value:.2e}".replace("e+", "e")


def mean_cell(mean: Mean | None, sign: str = "") -> str:
    """Mean ± standard error; a mean of one seed stands alone."""
    if mean is None:
        return NOTHING
    error = "" if mean.standard_error is None else f" ± {mean.standard_error:.4f}"
    return f"{mean.mean:{sign}.4f}{error}"


def bits_cell(model: ModelResults, text: str) -> str:
    diverged = model.diverged_seeds or model.diverged_at_every_rate
    return DIVERGED if diverged else mean_cell(model.mean(text))


def interval_cell(interval: tuple[float, float] | None) -> str:
    return NOTHING if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"


def share_cell(mean: Mean | None, sign: str = "") -> str:
    """A share in percent, ± standard error in points."""
    if mean is None:
        return NOTHING
    error = "" if mean.standard_error is None else f" ± {100 * mean.standard_error:.1f}"
    return f"{100 * mean.mean:{sign}.1f}%{error}"


def share_interval_cell(interval: tuple[float, float] | None) -> str:
    """The interval of a difference of shares, in points."""
    return NOTHING if interval is None else f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"


def names(models: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in models) or "none"


# -- what ran ---------------------------------------------------------------------------------------------------------


def status(results: ExperimentResults) -> str:
    """What is missing, which learning rates are not chosen yet, and what diverged."""
    done = sum(len(model.runs) for model in results.models)
    planned = len(results.models) * len(results.seeds)
    parts = [f"All {planned} runs finished." if done == planned else f"**{done} of {planned} runs finished.**"]
    rates = len(results.learning_rates)
    for model in results.swept:
        if len(model.sweep) < rates:
            parts.append(f"The sweep of `{model.name}` has {len(model.sweep)} of {rates} rates.")
        if model.diverged_at_every_rate:
            parts.append(f"`{model.name}` diverged at every learning rate.")
    for model in results.models:
        if model.diverged_seeds:
            seeds = ", ".join(map(str, model.diverged_seeds))
            parts.append(f"`{model.name}` diverged with seed {seeds}: no mean, and no part in the intervals.")
    return " ".join(parts)


def distinct(values: Iterable) -> str:
    """All different values, in order."""
    return ", ".join(map(str, sorted(set(values))))


def short(commit: str) -> str:
    """Seven digits of a commit; what says that the code differed from it stays."""
    digits, *rest = commit.split("-")
    return "-".join([digits[:7], *rest])


def provenance(results: ExperimentResults) -> str:
    """Seeds, tokens, texts, time, machine, commits and dates of every run behind the report."""
    lines = results.lines
    if not lines:
        return f"Seeds {distinct(results.seeds)}. No run yet."
    texts = ", ".join(
        f"{name} " + distinct(f"{line['text'][name]['file']} ({line['text'][name]['sha256'][:7]})" for line in lines)
        for name in lines[0]["text"]
    )
    machines = {
        "{device}, {cores} cores, {workers} runs at a time, {threads} threads in each; Python {python}, "
        "torch {torch}, transformers {transformers}".format(**line["machine"])
        for line in lines
    }
    dates = sorted({line["date"] for line in lines})
    hours = sum(line["wall_seconds"] for line in lines) / 3600
    time = f"{hours:.1f} hours, summed over {len(lines)} runs, sweep included"
    if resumed := sum(line["resumed_from_step"] > 0 for line in lines):
        time += f"; of {resumed} resumed runs, the part after the resumption"
    facts = [
        f"seeds: {distinct(results.seeds)}",
        f"tokens of a run: {'; '.join(f'{tokens:,}' for tokens in sorted({line['tokens'] for line in lines}))}",
        f"text (sha256): {texts}",
        f"time: {time}",
        f"machine: {'; or '.join(sorted(machines))}",
        f"commit: {distinct(short(line['commit']) for line in lines)}",
        f"date: {' to '.join(dict.fromkeys((dates[0], dates[-1])))}",
    ]
    return "\n".join(f"- {fact}" for fact in facts)


# -- what came out ----------------------------------------------------------------------------------------------------


def results_table(results: ExperimentResults) -> str:
    """One row a model: what it is, and bits per byte on both texts as mean ± standard error over the seeds."""
    header = ["model", "layers"]
    if results.report == "ratio":
        header.append("recurrence ratio")
    header += ["non-embedding parameters", "training FLOPs", "learning rate", "seeds"]
    header += ["bits per byte, validation", "foreign"]
    rows = []
    for model in results.models:
        row = [model.name, config_schedule(model.config)]
        if results.report == "ratio":
            row.append(f"{model.recurrence_ratio:.0%}")
        row += [or_nothing(model.cost("non_embedding_parameters"), ","), scientific(model.cost("flops"))]
        row += [or_nothing(model.learning_rate, "g"), str(len(model.runs))]
        row += [bits_cell(model, "validation"), bits_cell(model, "foreign")]
        rows.append(row)
    return markdown_table(header, rows, text_columns=2)


def costs_table(results: ExperimentResults) -> str:
    """One row a model: what it costs to keep, to train and to run."""
    forms = {
        "parameters": ("parameters", ","),
        "training tokens": ("tokens", ","),
        "prefill FLOPs/token": ("prefill_flops_per_token", ",.0f"),
        "KV bytes/token": ("kv_bytes_per_token", ",.0f"),
        "decode layer-equivalents": ("decode_layer_equivalents", ".2f"),
    }
    rows = [
        [model.name, *(or_nothing(model.cost(field), form) for field, form in forms.values())]
        for model in results.models
    ]
    return markdown_table(["model", *forms], rows)


def paper_change(perplexities: dict[str, float], name: str, reference: str) -> float | None:
    """ln(perplexity / the reference's) in nats per token; None of a model that the paper does not have there."""
    if name not in perplexities or reference not in perplexities:
        return None
    return math.log(perplexities[name] / perplexities[reference])


def expected_change(changes: Sequence[float | None]) -> float | None:
    """The paper's difference where it has one sign everywhere; None where it has none, or it depends on the scale."""
    known = [change for change in changes if change is not None]
    agree = all((change < 0) == (known[0] < 0) for change in known)
    return known[0] if known and agree else None


def difference_table(results: ExperimentResults, reference: str) -> str:
    """One row a model but for the reference: paired differences on both texts, beside the paper's."""
    paper = PAPER[results.report]
    validation, foreign = (results.compare(text, reference) for text in ("validation", "foreign"))
    header = ["model", "pairs", "validation", "95% interval", "foreign", "95% interval"]
    header += [*(f"paper, {where}" for where in paper), "verdict, validation", "verdict, foreign"]
    rows = []
    for model in results.models:
        if model.name == reference:
            continue
        changes = [paper_change(perplexities, model.name, reference) for perplexities in paper.values()]
        expected, mean = expected_change(changes), validation.mean(model.name)
        row = [model.name, "0" if mean is None else str(mean.count)]
        for comparison in (validation, foreign):
            row += [mean_cell(comparison.mean(model.name), "+"), interval_cell(comparison.interval(model.name))]
        row += [or_nothing(change, "+.4f") for change in changes]
        row += [comparison.verdict(model.name, expected) or NOTHING for comparison in (validation, foreign)]
        rows.append(row)
    return markdown_table(header, rows)


def shares_table(results: ExperimentResults, reference: str, shares: dict[str, str]) -> str:
    """
    One row a model but for the reference: paired differences in nats per token, and in shares.

    Args:
        shares: words of a column -> the measure that it shows.
    """
    loss = results.compare("validation", reference)
    compared = [results.compare(measure, reference) for measure in shares.values()]
    header = ["model", "pairs", "nats per token", "95% interval", "verdict"]
    for words in shares:
        header += [words, "95% interval", "verdict"]
    rows = []
    for model in results.models:
        if model.name == reference:
            continue
        mean = loss.mean(model.name)
        row = [model.name, "0" if mean is None else str(mean.count), mean_cell(mean, "+")]
        row += [interval_cell(loss.interval(model.name)), loss.verdict(model.name) or NOTHING]
        for share in compared:
            row += [share_cell(share.mean(model.name), "+"), share_interval_cell(share.interval(model.name))]
            row.append(share.verdict(model.name) or NOTHING)
        rows.append(row)
    return markdown_table(header, rows)


def resolution(comparison: Comparison, measure: str, in_points: bool = False) -> str:
    """How large a difference has to be seen before it counts; of a share that is given `in_points`."""
    deviation = comparison.run_deviation
    if deviation is None:
        return f"On {measure} no interval can be given: that takes two pairs of runs of one model."

    def size(value: float) -> str:
        return f"{100 * value:.2f} points" if in_points else f"{value:.4f}"

    def sizes(comparison: Comparison) -> str:
        counts = sorted({len(found) for found in comparison.differences.values()})
        return " and ".join(f"{size(comparison.half_width(count))} with {count}" for count in counts)

    text = (
        f"On {measure} the standard deviation of a run, the means of its model and its seed taken out, is "
        f"{size(deviation)} ({comparison.degrees_of_freedom} degrees of freedom): a difference seen to `"
        f"{comparison.reference}` beyond {sizes(comparison)} pairs is resolved. One that is really of this size would "
        "be so in half of such experiments only."
    )
    if (name := comparison.scattered) is not None:
        others = comparison.without(name)
        text += (
            f" Leaving out `{name}`, whose runs scatter more than all others', which was not planned, it is "
            f"{size(others.run_deviation)} ({others.degrees_of_freedom} degrees of freedom), and of the others a "
            f"difference beyond {sizes(others)} pairs is resolved."
        )
    return text


def differences(results: ExperimentResults) -> str:
    """How to read a table of differences, and the table for each reference."""
    text = (
        "Bits per byte of a model minus those of the reference with the same seed; below 0 is better. Mean ± standard "
        "error of the row's own pairs. The 95% intervals are of Student's t, with one standard deviation for a whole "
        "table. They hold for each row by itself: of twenty differences that are really 0, one is expected outside. "
        "Where a rate was swept, it was chosen on the first seed's validation text, so that a validation mean is a "
        "little too low; the foreign text chose nothing."
    )
    if PAPER[results.report]:
        text += (
            "\n\nThe paper's change is ln(perplexity / the reference's) on the Pile, in nats per token: its sign "
            "compares, its size does not; 0.001 is its last digit. "
            '"Reproduces" and "opposite": the interval lies on the paper\'s side of 0, '
            'or on the other. "Lower" and "higher": so it lies, and the paper has no such model, or both signs.'
        )
    parts = [text]
    for reference in results.references:
        resolutions = [
            resolution(results.compare(text, reference), f"{text} text") for text in ("validation", "foreign")
        ]
        parts += [f"### To `{reference}`", difference_table(results, reference), " ".join(resolutions)]
    return "\n\n".join(parts)


def sweep(results: ExperimentResults) -> str:
    """The sweep of learning rates: the loss of each, the chosen rate's in bold."""
    rates = results.learning_rates
    rows, edges = [], []
    for model in results.swept:
        row = [model.name]
        for rate in rates:
            line = model.sweep.get(rate)
            cell = NOTHING if line is None else or_nothing(figure(line, "validation"), ".4f")
            if line is not None and cell == NOTHING:
                cell = DIVERGED
            row.append(f"**{cell}**" if rate == model.learning_rate else cell)
        rows.append(row)
        if model.learning_rate in (min(rates), max(rates)):
            edge = "lowest" if model.learning_rate == min(rates) else "highest"
            edges.append(f"`{model.name}` ({edge})")
    text = f"{results.loss.capitalize()} with seed {results.seeds[0]}; the rate of the lowest, bold, is chosen."
    if results.rate_of:
        text += f" All models take the rate of `{results.rate_of}`: others may do better at one of their own."
    parts = [text, markdown_table(["model", *(f"{rate:g}" for rate in rates)], rows)]
    if edges:
        parts.append(f"Chosen at an edge of the grid: {', '.join(edges)}. The optimum may lie outside.")
    return "\n\n".join(parts)


def lowest_ratio(results: ExperimentResults) -> str:
    """Which recurrence ratio has the lowest mean, and which of the others are resolved from it."""
    if not results.measured:
        return "No ratio has a mean yet."
    lowest = min(results.measured, key=lambda model: model.mean("validation").mean)
    comparison = results.compare("validation", lowest.name)
    resolved = [name for name in comparison.differences if comparison.verdict(name) == HIGHER]
    low, high = BEST_RECURRENCE_RATIOS
    inside = "within" if low <= lowest.recurrence_ratio <= high else "outside"
    parts = [
        f"Lowest mean on validation text: `{lowest.name}`, recurrence ratio {lowest.recurrence_ratio:.0%}, {inside} "
        f"the paper's {low:.0%} to {high:.0%}."
    ]
    for model in results.models:
        if model.recurrence_ratio == 0 and model.name in comparison.differences:
            verb = "is" if model.name in resolved else "is not"
            parts.append(f"Its difference to ratio 0 (`{model.name}`) {verb} resolved.")
    others = [name for name in comparison.differences if name not in resolved]
    parts.append(f"Resolved above it: {names(resolved)}; not resolved: {names(others)}.")
    parts.append(resolution(comparison, "validation text"))
    parts.append("It is the lowest of several noisy means, so its own is likely to be a little too low.")
    return " ".join(parts)


def sweep_budget(results: ExperimentResults) -> str:
    """How long the runs of the sweep were."""
    tokens = sorted({line["tokens"] for model in results.swept for line in model.sweep.values()})
    return f"Runs of {' or '.join(f'{count:,}' for count in tokens)} tokens. " if tokens else ""


def join_report(
    results: ExperimentResults, pictures: dict[str, str], tables: dict[str, list[str]], sweep_budget: str = ""
) -> str:
    """A whole report.

    Args:
        pictures: file name -> what it shows; they follow the first of the tables.
        tables: heading -> its paragraphs, in order.
        sweep_budget: what is said of the sweep before its table.
    """
    parts = [
        f"# {results.title}",
        f"Written by `python scripts/report.py` from `runs.jsonl`, experiment `{results.name}`: not to be edited.",
        status(results),
        provenance(results),
    ]
    for index, (heading, paragraphs) in enumerate(tables.items()):
        parts += [f"## {heading}", *paragraphs]
        if index == 0:
            parts += [f"![{shows}]({file})" for file, shows in pictures.items()]
    if len(results.learning_rates) > 1:
        parts += ["## Sweep of learning rates", sweep_budget + sweep(results)]
    return "\n\n".join(parts) + "\n"


def report(results: ExperimentResults, pictures: dict[str, str]) -> str:
    """A whole report; `pictures` are file name -> what it shows."""
    tables = {
        "Results": [results_table(results)],
        "Costs": [COSTS, costs_table(results)],
        "Differences": [differences(results)],
    }
    if results.report == "ratio":
        tables["The lowest ratio"] = [lowest_ratio(results)]
    return join_report(results, pictures, tables)
