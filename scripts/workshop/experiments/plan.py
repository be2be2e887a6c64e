"""Experiments as YAML describes them: models x seeds x budget, the sweep of learning rates, and the runs to do."""

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from modeling_spiralformer import SpiralFormerConfig
from workshop.costs import count_costs
from workshop.experiments.matching import match_parameters, match_steps
from workshop.experiments.store import losses
from workshop.published import to_json
from workshop.settings import LARGEST_SEED, check_numbers, check_types, read_settings, types_of
from workshop.tasks.rows import Task, make_task
from workshop.tokenizers import SPECIAL_IDS
from workshop.training_arguments import SpiralTrainingArguments

REPORTS = ("table", "ablations", "ratio", "molecules", "task")
TEXTS = ("train", "validation", "foreign")
MOLECULE_TEXTS = ("train", "validation")
# What `smiles` holds, with the types of each.
SMILES = {"mean_length": (int,), "samples": (int,), "temperature": (int, float), "top_k": (int,)}
# Enough for a look at the samples of a sweep, whose loss decides.
SWEEP_SAMPLES = 1000
# Every field that the keys of the first lines were made of. A field that came later is part of a key only where it
# has not the value that these imply: a run keeps its key when the model learns something new.
FIRST_FIELDS = {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_prelude_layers", "num_core_layers", "num_coda_layers", "chunk_sizes", "chunk_offsets", "causal_shifts"),
    *("down_scaling", "up_scaling", "topology", "num_memory_slots", "share_core", "rope_parameters"),
    *("scale_embeddings", "max_position_embeddings", "use_parallel_residual", "attention_bias", "hidden_act"),
    *("layer_norm_eps", "attention_dropout", "hidden_dropout", "classifier_dropout", "initializer_range"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
}
# The runner sets these itself, from the plan, or so that a killed run can go on and every step is alike. Or its counts
# of FLOPs, its losses and its curves rest on what they are.
RESERVED = {
    *("output_dir", "max_steps", "num_train_epochs", "learning_rate", "seed", "data_seed"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "eval_strategy", "eval_steps"),
    *("save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to", "disable_tqdm"),
    *("dataloader_pin_memory", "dataloader_drop_last", "auto_find_batch_size", "do_train", "do_eval", "push_to_hub"),
    *("save_only_model", "ignore_data_skip", "load_best_model_at_end", "include_num_input_tokens_seen", "schedules"),
    *("logging_strategy", "eval_delay", "prediction_loss_only", "batch_eval_metrics", "eval_do_concat_batches"),
    *("include_for_metrics", "label_names"),
}


def config_fields(config: SpiralFormerConfig) -> dict:
    """Every field of the model's own, as config.json holds it."""
    return json.loads(to_json(config))


def keyed_fields(fields: dict) -> dict:
    """The fields of a configuration that are part of a run's key."""
    first = {name: value for name, value in fields.items() if name in FIRST_FIELDS}
    implied = config_fields(SpiralFormerConfig(**{n: value for n, value in first.items() if n != "model_type"}))
    return {name: value for name, value in fields.items() if name in first or value != implied.get(name)}


@dataclass(frozen=True)
class Run:
    """
    One training run. `settings` holds everything that decides its result, but for the text itself; runs of two
    experiments with equal settings are one run. `flops` are its counted training FLOPs.
    """

    experiment: str
    model: str
    settings: dict
    flops: int

    @functools.cached_property
    def key(self) -> str:
        """A digest of the settings: what the run's line is found by."""
        settings = self.settings | {"config": keyed_fields(self.settings["config"])}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(eq=False)  # by identity, so that what is counted for one can be kept
class Experiment:
    """
    One file of `scripts/experiments/`; its keys are these fields (see docs/experiments.md).

    A model's entry holds fields of `SpiralFormerConfig`, on top of those in `common`. It may hold `training`, on top
    of that of all models, and `non_embedding_parameters`: its `intermediate_size` is then matched to that number.
    """

    name: str
    title: str
    report: str
    references: list[str]
    vocab_size: int
    block_size: int
    batch_size: int
    budget: dict[str, int | float]
    evaluation_blocks: int
    learning_rates: list[float]
    seeds: list[int]
    models: dict[str, dict]
    text: dict[str, str] = field(default_factory=dict)
    common: dict = field(default_factory=dict)
    training: dict = field(default_factory=dict)
    rate_of: str | None = None
    sweep_budget: dict[str, int | float] | None = None
    smiles: dict[str, int | float] | None = None
    task: dict[str, int | str] | None = None

    def __post_init__(self):
        check_numbers(self)
        self._check_names()
        for name in ("vocab_size", "block_size", "batch_size", "evaluation_blocks"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be an integer >= 1, but got {value!r}.")
        for name, kind in (("learning_rates", float), ("seeds", int)):
            values = getattr(self, name)
            right = isinstance(values, list) and values and all(type(value) is kind for value in values)
            if not right or len(set(values)) < len(values):
                raise ValueError(f"`{name}` must be a list of different {kind.__name__} values, but got {values!r}.")
        if min(self.learning_rates) <= 0:
            raise ValueError(f"`learning_rates` must be above 0, but got {self.learning_rates}.")
        if min(self.seeds) < 0 or max(self.seeds) > LARGEST_SEED:
            raise ValueError(f"`seeds` must be in [0, {LARGEST_SEED}], but got {self.seeds}.")
        for training in (self.training, *(self.training_of(name) for name in self.models)):
            self._check_training(training)
        parts = {name: self.training_of(name).get("gradient_accumulation_steps", 1) for name in self.models}
        if len(set(parts.values())) > 1:  # a run that accumulates leaves out other rows of an epoch
            raise ValueError(f"`gradient_accumulation_steps` must be the same for all models, but got {parts}.")
        self._check_smiles()
        self._check_task()
        for name in self.models:
            for sweep in (False, True):
                self.run(name, self.seeds[0], self.learning_rates[0], sweep)  # refuses a bad budget too

    def _check_smiles(self):
        if (self.report == "molecules") != (self.smiles is not None):
            raise ValueError(f"`smiles` must go with report molecules, but got {self.smiles!r} for {self.report!r}.")
        if self.smiles is None:
            return
        right = isinstance(self.smiles, dict) and set(self.smiles) == set(SMILES)
        if not right or not all(type(self.smiles[name]) in types for name, types in SMILES.items()):
            raise ValueError(f"`smiles` must hold numbers for exactly {list(SMILES)}, but got {self.smiles!r}.")
        if min(self.smiles.values()) <= 0 or self.smiles["mean_length"] > self.block_size:
            raise ValueError(
                f"`smiles` must hold numbers above 0, and a mean_length up to block_size {self.block_size}, but got "
                f"{self.smiles}."
            )

    def _check_task(self):
        if self.drawn is None:
            return
        words = len(self.drawn.words) + len(SPECIAL_IDS)
        if self.vocab_size != words:
            raise ValueError(f"`vocab_size` must be {words}, the tokens of the task, but got {self.vocab_size}.")
        if self.block_size < self.drawn.longest_row:
            raise ValueError(
                f"`block_size` must be at least {self.drawn.longest_row}, the longest row's tokens, but got "
                f"{self.block_size}."
            )

    @functools.cached_property
    def drawn(self) -> Task | None:
        """The task whose rows the runs read, where they are no texts."""
        return None if self.task is None else make_task(self.task)

    def training_of(self, name: str) -> dict:
        """The settings of one model's training beside those that the runner makes."""
        own = self.models[name].get("training", {})
        if not isinstance(own, dict):
            raise ValueError(f"`training` of model {name!r} must hold settings, but got {own!r}.")
        return self.training | own

    def _check_training(self, training: dict):
        allowed = {item.name for item in dataclasses.fields(SpiralTrainingArguments)} - RESERVED
        for name in training:
            if name not in allowed:
                raise ValueError(
                    "`training` must name settings of SpiralTrainingArguments that the runner leaves to a plan, "
                    f"but got {name!r}."
                )
        # The values stay as they were written: keys of finished runs are digests of the settings.
        check_types(training, types_of(SpiralTrainingArguments), "`training`")
        parts = training.get("gradient_accumulation_steps", 1)
        if type(parts) is not int or parts < 1 or self.batch_size % parts:
            raise ValueError(
                f"`gradient_accumulation_steps` must divide batch_size {self.batch_size}, but got {parts!r}."
            )

    def _check_names(self):
        if self.report not in REPORTS:
            raise ValueError(f"`report` must be one of {list(REPORTS)}, but got {self.report!r}.")
        if (self.report == "task") != (self.task is not None):
            raise ValueError(f"`task` must go with report task, but got {self.task!r} for {self.report!r}.")
        texts = TEXTS if self.smiles is None else MOLECULE_TEXTS
        if self.task is not None:
            if self.text or self.smiles is not None:
                raise ValueError(
                    f"`text` and `smiles` must be left out with `task`, but got {self.text}, {self.smiles}."
                )
        elif sorted(self.text) != sorted(texts):
            raise ValueError(f"`text` must name a file for each of {list(texts)}, but got {self.text}.")
        if not self.references or not isinstance(self.references, list):
            raise ValueError(f"`references` must be a list of models, but got {self.references!r}.")
        named = [("references", name) for name in self.references] + [("rate_of", self.rate_of or self.references[0])]
        for name, value in named:
            if value not in self.models:
                raise ValueError(f"`{name}` must name models of {list(self.models)}, but got {value!r}.")

    @functools.cache  # noqa: B019  experiments live as long as the process
    def model_config(self, name: str) -> SpiralFormerConfig:
        """The configuration of one model, matched in parameters where its entry asks for it."""
        fields = {"vocab_size": self.vocab_size, "max_position_embeddings": self.block_size}
        fields |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | self.common | self.models[name]
        fields.pop("training", None)
        target = fields.pop("non_embedding_parameters", None)
        known = {item.name for item in dataclasses.fields(SpiralFormerConfig)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"`models` must hold fields of SpiralFormerConfig, but {name!r} has {unknown}.")
        config = SpiralFormerConfig(architectures=["SpiralFormerForCausalLM"], **fields)
        return config if target is None else match_parameters(config, target)

    @property
    def example_length(self) -> int:
        """Tokens of an example, on which costs and budgets are counted: a block, or a row of mean length."""
        if self.drawn is not None:
            return self.drawn.mean_length
        return self.block_size if self.smiles is None else self.smiles["mean_length"]

    @functools.cache  # noqa: B019
    def costs(self, name: str) -> dict[str, float]:
        """What one model costs, counted (`costs.count_costs`)."""
        return count_costs(self.model_config(name), self.example_length)

    @functools.cache  # noqa: B019
    def run(self, name: str, seed: int, learning_rate: float, sweep: bool = False) -> Run:
        """One run of one model, on the budget of the sweep or on the whole one."""
        shorter = sweep and self.sweep_budget is not None
        budget = self.sweep_budget if shorter else self.budget
        flops_per_step = self.costs(name)["training_flops_per_block"] * self.batch_size
        steps = match_steps(budget, self.batch_size * self.example_length, flops_per_step)
        settings = {
            "config": config_fields(self.model_config(name)),
            "text": self.text,
            "vocab_size": self.vocab_size,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "steps": steps,
            "evaluation_blocks": self.evaluation_blocks,
            "training": self.training_of(name),
            "seed": seed,
            "learning_rate": learning_rate,
        }
        if self.smiles is not None:
            samples = self.smiles["samples"]
            settings["smiles"] = self.smiles | {"samples": min(samples, SWEEP_SAMPLES) if shorter else samples}
        if self.task is not None:
            settings["task"] = self.task
        return Run(self.name, name, settings, steps * flops_per_step)

    # -- what the finished lines say ----------------------------------------------------------------------------

    def sweep(self, name: str, lines: list[dict]) -> dict[float, dict]:
        """Learning rate -> line of the first seed, of those rates that have run; of `rate_of` where it is given."""
        by_key = {line["key"]: line for line in lines}
        runs = {rate: self.run(self.rate_of or name, self.seeds[0], rate, True) for rate in self.learning_rates}
        return {rate: by_key[run.key] for rate, run in runs.items() if run.key in by_key}

    def chosen_rate(self, name: str, lines: list[dict]) -> float | None:
        """The rate of lowest validation loss; None before the whole sweep has run, or where every rate diverged."""
        swept = self.sweep(name, lines)
        found = {rate: losses(line)["validation"] for rate, line in swept.items()}
        found = {rate: math.inf if loss is None else loss for rate, loss in found.items()}
        if len(found) < len(self.learning_rates) or min(found.values()) == math.inf:
            return None
        return min(found, key=found.get)

    def finished(self, name: str, lines: list[dict]) -> dict[int, dict]:
        """Seed -> line at the chosen rate, of those seeds that have run."""
        rate = self.chosen_rate(name, lines)
        if rate is None:
            return {}
        by_key = {line["key"]: line for line in lines}
        runs = {seed: self.run(name, seed, rate) for seed in self.seeds}
        return {seed: by_key[run.key] for seed, run in runs.items() if run.key in by_key}

    def pending(self, lines: list[dict]) -> tuple[list[Run], list[Run]]:
        """
        Runs that can start now, the sweep first and then seed by seed, and runs that wait for a sweep to end, with
        the first rate of the grid in place of the one that the sweep will choose.
        """
        done = {line["key"] for line in lines}
        swept = [self.rate_of] if self.rate_of else list(self.models)
        ready = [self.run(name, self.seeds[0], rate, True) for name in swept for rate in self.learning_rates]
        first, waiting = set() if self.sweep_budget else {(self.seeds[0], name) for name in swept}, []
        for seed in self.seeds:
            for name in self.models:
                rate = self.chosen_rate(name, lines)
                if rate is not None:
                    ready.append(self.run(name, seed, rate))
                elif len(self.sweep(name, lines)) < len(self.learning_rates) and (seed, name) not in first:
                    waiting.append(self.run(name, seed, self.learning_rates[0]))
        return list({run.key: run for run in ready if run.key not in done}.values()), waiting


def load_experiment(path: str | Path) -> Experiment:
    """
    Reads one YAML; the experiment's name is that of the file. What it does not hold is that of the file beside it
    which `based_on` names.

    Raises ValueError for a key that is unknown or missing, and for every value that is not allowed.
    """
    entries = read_settings("experiments", path)
    if "based_on" in entries:
        base = read_settings("based_on", Path(path).parent / str(entries.pop("based_on")))
        entries = base | entries
    known = {item.name for item in dataclasses.fields(Experiment)} - {"name"}
    required = known - {"text", "common", "training", "rate_of", "sweep_budget", "smiles", "task"}
    if set(entries) - known or required - set(entries):
        raise ValueError(
            f"{path} must hold the keys {sorted(required)}, and may hold others of {sorted(known)}: {sorted(entries)}."
        )
    entries = check_types(entries, types_of(Experiment), str(path))
    try:
        return Experiment(name=Path(path).stem, **entries)
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{path}: {error}") from error
