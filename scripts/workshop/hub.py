"""A checkpoint for the Hub: weights, configuration, code, tokenizer and model card, pushed in one commit."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import modeling_spiralformer
from modeling_spiralformer.files_spiralformer import write_digests
from modeling_spiralformer.modeling_spiralformer import AUTO_CLASSES
from workshop.checkpoints import CHECKPOINT_FILES, TOKENIZER_PATHS, load_config, load_model, load_tokenizer
from workshop.model_card import make_card

# What `Trainer` writes of an evaluation beside the figures.
NOT_FIGURES = ("epoch", "eval_runtime", "eval_samples", "eval_samples_per_second", "eval_steps_per_second")


def load_checkpoint(folder: str) -> PreTrainedModel:
    """The model of a checkpoint, of the class and in the dtype it was saved with; refused where it is not all."""
    config = load_config(folder, field="checkpoint")
    known = {model_class.__name__ for model_class in AUTO_CLASSES.values()}
    saved = config.architectures or []
    if len(saved) != 1 or saved[0] not in known:
        raise ValueError(f"`architectures` of {folder!r} must be one of {sorted(known)}, but got {saved}.")
    return load_model(folder, config, getattr(modeling_spiralformer, saved[0]), dtype="auto")


def read_evaluation(folder: Path) -> dict[str, float | str]:
    """The figures of eval_results.json, which `Trainer.save_metrics` writes; none where there is no such file."""
    path = folder / "eval_results.json"
    if not path.is_file():
        return {}
    figures = {
        name: value for name, value in json.loads(path.read_text(encoding="utf-8")).items() if name not in NOT_FIGURES
    }
    # JSON holds null for a figure of a model that diverged.
    figures = {name: "not finite" if value is None else value for name, value in figures.items()}
    return {name.removeprefix("eval_").replace("_", " ").title(): value for name, value in figures.items()}


def build_card(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    repo_id: str,
    license: str | None = None,
    language: str | None = None,
    dataset: str | None = None,
    training_data: str | None = None,
) -> ModelCard:
    """The checkpoint's own README.md with the metadata that is given, or a new card."""
    readme = folder / "README.md"
    if not readme.is_file():
        said = {"license": license, "language": language, "dataset": dataset, "training_data": training_data}
        return make_card(model, repo_id, **said, evaluation=read_evaluation(folder), tokenizer=tokenizer)
    if training_data is not None:
        raise ValueError(
            f"`training_data` must be left out where the checkpoint has a card, but got {training_data!r}: "
            f"edit {readme}."
        )
    card = ModelCard.load(readme)
    given = {"license": license, "language": language, "datasets": None if dataset is None else [dataset]}
    for name, value in given.items():
        if value is not None:
            card.data[name] = value
    return card


def push(
    checkpoint: str,
    repo_id: str,
    private: bool = False,
    revision: str = "main",
    commit_message: str = "Upload model",
    max_shard_size: str = "5GB",
    **said: str | None,
) -> CommitInfo:
    """
    Pushes, and returns the commit. Until it is made, the repository is what it was.

    Args:
        said: what the card is to say, as `build_card` takes it.
    """
    validate_repo_id(repo_id)
    model = load_checkpoint(checkpoint)
    tokenizer = load_tokenizer(checkpoint, model.config, field="checkpoint")
    api = HfApi()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        write_digests(folder, CHECKPOINT_FILES)
        build_card(Path(checkpoint), model, tokenizer, repo_id, **said).save(Path(folder) / "README.md")
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            # One file of weights after several, or the other way round, or another tokenizer: what is gone goes there.
            delete_patterns=["*.safetensors*", *TOKENIZER_PATHS],
        )
