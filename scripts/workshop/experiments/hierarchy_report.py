"""The part of a report on molecules that asks where samples go wrong: at how many rings, how deep in branches."""

import statistics

from workshop.experiments.hierarchy import FEWEST, Hierarchy, pooled
from workshop.experiments.report import NOTHING
from workshop.experiments.results import ExperimentResults
from workshop.experiments.statistics import NOISE, Comparison
from workshop.molecules.hierarchy import COUNTED, LAST_BINS, Tally, binned, bins
from workshop.molecules.judging import share
from workshop.tables import markdown_table

TRAINING = "training molecules"
COMMAND = "python scripts/tally_samples.py"
READING = (
    "Ring bonds and depth are counted in the string alone, so that invalid samples have a bin too: ring digits that "
    "open a bond, closed or not, and the most parentheses that are open at a time. An invalid sample is so in the bin "
    "of what it wrote, not of what would have been valid: a digit too many is one ring bond more. Samples with more "
    "rings or deeper branches are also longer. Valid: the valid share of a bin, all seeds together, with its 95% "
    "interval (Wilson), which knows nothing of what another seed would have trained. In the table of samples stands "
    "how much of all samples is in a bin, and how many they are: a model that avoids rings shows there. Differences "
    "are paired over the seeds that have {fewest} samples or more in a bin, with 95% intervals as above; bold where 0 "
    "is outside, which happens by chance too in so many cells."
)


MIXED = (
    "How long samples are, and how many rings they have, depends on the seed and on the last batches of a run "
    "([why](../experiments.md#molecules)). Runs of a seed with other numbers of steps end on other batches, and their "
    "validity differs for that alone. Here each bin of ring bonds counts as much as it does among the training "
    "molecules. Differences in points, paired over seeds, with 95% intervals as above; bold where 0 is outside. This "
    "table was added when the runs at 50K had ended."
)


def valid_cell(valid: int, count: int) -> str:
    """A valid share in percent with its interval."""
    figure = share(valid, count)
    if figure["value"] is None:
        return NOTHING
    low, high = figure["interval"]
    return f"{100 * figure['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def valid_table(results: ExperimentResults, hierarchy: Hierarchy, name: str) -> str:
    """One row a model: the valid share in each bin."""
    rows = []
    for model in results.models:
        runs = hierarchy.of(model)
        rows.append([model.name, str(len(runs)), *(valid_cell(*found) for found in pooled(runs, name))])
    return markdown_table(["valid, %", "seeds", *bins(name)], rows)


def samples_table(results: ExperimentResults, hierarchy: Hierarchy, training: Tally, name: str) -> str:
    """How many of the samples of each model, and of the training molecules, are in each bin."""
    counts = {TRAINING: binned([training], name)}
    counts |= {model.name: [count for _, count in pooled(hierarchy.of(model), name)] for model in results.models}
    rows = [
        [label, *(f"{100 * count / sum(found):.2f}% ({count:,})" if sum(found) else NOTHING for count in found)]
        for label, found in counts.items()
    ]
    return markdown_table(["samples", *bins(name)], rows)


def mixed_table(results: ExperimentResults, hierarchy: Hierarchy, training: Tally, name: str) -> str:
    """One row a model: its valid share as counted and at the mix of the training molecules, and differences there."""
    shares = {model.name: hierarchy.mixed_shares(model, name, training) for model in results.models}
    known = {name: found for name, found in shares.items() if found}
    compared = {reference: Comparison.of(known, reference) for reference in results.references}
    rows = []
    for model in results.models:
        mixed, valid = shares[model.name], model.figures("valid")
        counted = {seed: valid[seed] for seed in mixed}
        cells = [f"{100 * statistics.fmean(found.values()):.1f}" if found else NOTHING for found in (counted, mixed)]
        cells += [difference_cell(compared[reference], model.name) for reference in results.references]
        rows.append([model.name, str(len(mixed)), *cells])
    header = [
        "model",
        "seeds",
        "valid, %",
        "at one mix, %",
        *(f"above `{reference}`" for reference in results.references),
    ]
    return markdown_table(header, rows)


def compare_bins(results: ExperimentResults, hierarchy: Hierarchy, name: str, reference: str) -> list[Comparison]:
    """For each bin the valid shares beside those of the reference."""
    shares = {model.name: hierarchy.valid_shares(model, name) for model in results.models}
    return [
        Comparison.of({model: found[index] for model, found in shares.items() if found[index]}, reference)
        for index in range(LAST_BINS[name] + 1)
    ]


def difference_cell(comparison: Comparison, model: str) -> str:
    """A difference in points with its interval, bold where it is resolved."""
    mean, interval = comparison.mean(model), comparison.interval(model)
    if mean is None:
        return NOTHING
    if interval is None:
        return f"{100 * mean.mean:+.1f}"
    text = f"{100 * mean.mean:+.1f} ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
    return text if comparison.verdict(model) == NOISE else f"**{text}**"


def difference_table(results: ExperimentResults, hierarchy: Hierarchy, name: str, reference: str) -> str:
    """One row a model but for the reference: differences of the valid share in each bin, in points."""
    comparisons = compare_bins(results, hierarchy, name, reference)
    rows = [
        [model.name, *(difference_cell(comparison, model.name) for comparison in comparisons)]
        for model in results.models
        if model.name != reference
    ]
    return markdown_table([f"valid, points above `{reference}`", *bins(name)], rows)


def hierarchy_section(results: ExperimentResults, hierarchy: Hierarchy) -> list[str]:
    """The paragraphs of the section; none before the first run has finished."""
    lines = [line for model in results.models for line in model.runs.values()]
    if not lines:
        return []
    read = [line for line in lines if line["key"] in hierarchy.runs]
    parts = []
    if len(read) < len(lines):
        parts.append(f"**Samples of {len(read)} of {len(lines)} finished runs were read**: `{COMMAND}` reads more.")
    if not read:
        return parts
    (digest,) = {line["text"]["train"]["sha256"] for line in read}
    training = hierarchy.training[digest]
    parts += ["### At one mix of ring bonds", MIXED, mixed_table(results, hierarchy, training, "rings")]
    parts.append(READING.format(fewest=FEWEST))
    for name, words in COUNTED.items():
        parts.append(f"### By {words}")
        parts.append(valid_table(results, hierarchy, name))
        parts.append(samples_table(results, hierarchy, training, name))
        parts += [difference_table(results, hierarchy, name, reference) for reference in results.references]
    return parts
