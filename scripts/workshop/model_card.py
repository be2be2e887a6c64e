"""The card of a model: metadata for the Hub's search, and what a reader needs to use the model and to judge it."""

import math
import tempfile
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.modelcard import TrainingSummary
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_spiralformer import SpiralFormerPreTrainedModel
from modeling_spiralformer.files_spiralformer import (
    DIGESTS_NAME,
    MODEL_FILES,
    list_digests,
    matches,
    read_digests,
    write_digests,
)
from modeling_spiralformer.modeling_spiralformer import AUTO_CLASSES
from workshop.checkpoints import CHECKPOINT_FILES, TOKENIZER_PATTERNS, remove_replaced_tokenizer
from workshop.costs import repeated_flops
from workshop.tables import config_schedule

PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
TEMPLATE = Path(__file__).with_name("model_card.md")


def auto_class_of(model: PreTrainedModel) -> str:
    """The name of the Auto class that loads such a model."""
    for name, model_class in AUTO_CLASSES.items():
        if type(model).__name__.removeprefix("FSDP") == model_class.__name__:
            return name
    allowed = sorted(model_class.__name__ for model_class in AUTO_CLASSES.values())
    raise ValueError(f"`model` must be one of {allowed}, but got {type(model).__name__}.")


def loop_in_words(config: PreTrainedConfig) -> str:
    """What a model's schedule makes of it: a loop over chunks, a loop over all tokens, or a plain stack."""
    if not config.chunk_sizes:
        return f"a plain stack of {config.num_prelude_layers + config.num_coda_layers} layers"
    core = "shared core" if config.share_core else "core, with layers of its own each time,"
    count, sizes = config.num_iterations, [str(size) for size in config.chunk_sizes]
    times = "once" if count == 1 else f"{count} times"
    chunks = f"{', '.join(sizes[:-1])} and {sizes[-1]}" if count > 1 else sizes[0]
    over = "all tokens" if set(sizes) == {"1"} else f"chunks of {chunks} tokens"
    return f"a looped Transformer whose {core} runs {times}, over {over}"


def ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts eos after each text that it begins with a token of its own, such as bos."""
    ids = tokenizer("")["input_ids"]
    return len(ids) > 1 and ids[-1] == tokenizer.eos_token_id


def make_card(
    model: PreTrainedModel,
    repo_id: str,
    license: str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    training_data: str | None = None,
    evaluation: dict[str, float | str] | None = None,
    evaluated_on: str = "text held out of the training data",
    settings: dict[str, object] | None = None,
    with_code: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    sampling: dict[str, float] | None = None,
) -> ModelCard:
    """
    A card with metadata, description, usage, training data, evaluation and limits.

    Args:
        model: the model, for its class, its size and its configuration.
        repo_id: where it will be, "user/name"; what the usage names.
        license, language: as the Hub spells them, such as "apache-2.0" and "en".
        base_model: the model on the Hub that this one was trained on from.
        dataset: the data set on the Hub that it was trained and evaluated on.
        training_data: the same in words.
        evaluation: figures by name. With a `dataset` those that are finite are metadata too.
        evaluated_on: what they were measured on, in words.
        settings: settings of the training by name.
        with_code: whether the code of the model is beside the weights, or in the package alone.
        tokenizer: that of the model. Where it ends each text, the usage draws new ones: a pipeline would go on after
            the end.
        sampling: settings of `generate()` that the usage then shows.
    """
    auto_class = auto_class_of(model)
    task, name = PIPELINES[auto_class], repo_id.split("/")[-1]
    sampling = sampling or {"max_length": model.config.max_position_embeddings}
    evaluation = evaluation or {}
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name.lower().replace(" ", "_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in evaluation.items()
        if dataset is not None and isinstance(value, int | float) and math.isfinite(value)
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=["spiralformer", *(["custom_code"] if with_code else [])],
        license=license,
        language=language,
        base_model=base_model,
        datasets=None if dataset is None else [dataset],
        model_name=name if results else None,
        eval_results=results or None,
    )
    config = model.config
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        repo_id=repo_id,
        task=task,
        auto_class=auto_class,
        config=config,
        loop=loop_in_words(config),
        layers=config_schedule(config),
        parameters=f"{model.num_parameters():,}",
        training_data=training_data or (None if dataset is None else f"The data set `{dataset}`."),
        evaluation=evaluation,
        evaluated_on=evaluated_on,
        settings=settings or {},
        with_code=with_code,
        ends_texts=task == "text-generation" and tokenizer is not None and ends_texts(tokenizer),
        sampling=", ".join(f"{setting}={value}" for setting, value in sampling.items()),
    )


def folder_of_step(output_dir: str, step: int) -> Path:
    """Where `Trainer` saves the checkpoint of a step."""
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"


class PushedDigests(TrainerCallback):
    """Lists the digests of what the library is about to copy out of a checkpoint into `output_dir`, and to upload."""

    def on_push_begin(self, args, state, control, processing_class=None, **kwargs) -> None:
        if state.is_world_process_zero:
            copied = MODEL_FILES if processing_class is None else (*MODEL_FILES, *TOKENIZER_PATTERNS)
            digests = read_digests(folder_of_step(args.output_dir, state.global_step))
            new = {name: value for name, value in digests.items() if matches(name, copied)}
            list_digests(args.output_dir, new, CHECKPOINT_FILES)


class CardTrainer(Trainer):
    """
    A `Trainer` that writes such a card where the library's would write a draft.

    Commits that are pushed while it trains hold the code of the model too: `Trainer` itself takes only weights and
    configuration from a checkpoint. Each commit has the digests of its files, as the repository may hold older ones.

    Args:
        training_data: what it trains on, in words.
    """

    def __init__(self, *args, training_data: str | None = None, **kwargs):
        self.training_data = training_data
        super().__init__(*args, **kwargs)
        self.add_callback(PushedDigests)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """As the library's; puts the code into the folder that is uploaded."""
        super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            self.model.config.save_pretrained(self.args.output_dir)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the library's; lists the files of `output_dir` in SHA256SUMS, with which they are pushed."""
        super().save_model(output_dir, _internal_call)
        if output_dir is None and self.args.should_save:
            if self.processing_class is not None:
                remove_replaced_tokenizer(self.processing_class, self.args.output_dir)
            write_digests(self.args.output_dir, CHECKPOINT_FILES)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """As the library's; lists the files in SHA256SUMS, which tells a run that goes on whether they are damaged."""
        folder = folder_of_step(self.args.output_dir, self.state.global_step)
        if self.args.should_save:
            (folder / DIGESTS_NAME).unlink(missing_ok=True)  # of a checkpoint that is written over
        super()._save_checkpoint(*args, **kwargs)
        if not self.args.push_to_hub:
            self._list_checkpoint(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the library's; the files are listed before, since the upload may go on when this returns."""
        self._list_checkpoint(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _list_checkpoint(self, folder: Path) -> None:
        """Writes SHA256SUMS of a checkpoint, all files of which are there."""
        self.accelerator.wait_for_everyone()  # each process saves its random state
        if self.args.should_save:
            write_digests(folder, CHECKPOINT_FILES)

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        """As the library's, to the last row: `dataloader_drop_last` has steps of training in mind."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = dropped

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As the library's; training draws the same random numbers after it, however often a run is evaluated."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            metrics = super().evaluate(*args, **kwargs)
            self._load_rng_state(folder)
        return metrics

    def prediction_step(self, *args, **kwargs):
        """As the library's, without label smoothing: perplexity and bits per byte are made of the loss itself."""
        smoother, self.label_smoother = self.label_smoother, None
        try:
            return super().prediction_step(*args, **kwargs)
        finally:
            self.label_smoother = smoother

    def floating_point_ops(self, inputs: dict) -> int:
        """As the library's, 6 for each token and weight; a core layer meets one latent in g tokens, each iteration.

        Of embeddings in place of ids the library counts nothing.
        """
        if "input_ids" not in inputs:
            return super().floating_point_ops(inputs)
        return super().floating_point_ops(inputs) + repeated_flops(self.model, inputs["input_ids"].numel())

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes README.md into `output_dir`: `make_card` with what `TrainingSummary` finds in the Trainer."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, SpiralFormerPreTrainedModel):  # an adapter: the library's card knows its library
            given = (language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args)
            return super().create_model_card(*given)
        if not self.is_world_process_zero():
            return
        summary = TrainingSummary.from_trainer(
            self, language, license, tags, model_name, finetuned_from, tasks, dataset_tags, None, dataset, dataset_args
        )
        known = [summary.dataset_tags] if isinstance(summary.dataset_tags, str) else summary.dataset_tags
        card = make_card(
            model,
            self.hub_model_id or summary.model_name,
            license=summary.license,
            language=summary.language,
            base_model=summary.finetuned_from or None,
            dataset=known[0] if known else None,
            training_data=self.training_data,
            evaluation=summary.eval_results,
            settings=summary.hyperparameters,
            tokenizer=self.processing_class,
        )
        for tag in [summary.tags] if isinstance(summary.tags, str) else summary.tags:
            if tag not in card.data.tags:
                card.data.tags.append(tag)
        card.save(Path(self.args.output_dir) / "README.md")
