"""Pushes a checkpoint to the Hub in one commit: weights, configuration, code, tokenizer and model card.

python scripts/push.py --checkpoint runs/mine --repo_id me/my-spiralformer
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints import load_config, load_model, load_tokenizer
from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.utils import validate_repo_id
from model_card import make_card
from transformers import HfArgumentParser, PreTrainedModel

import modeling_spiralformer
from modeling_spiralformer.modeling_spiralformer import AUTO_CLASSES

# What `Trainer` writes of an evaluation beside the figures.
NOT_FIGURES = ("epoch", "eval_runtime", "eval_samples", "eval_samples_per_second", "eval_steps_per_second")


@dataclass
class PushArguments:
    """What to push, where to, and what its card says."""

    checkpoint: str = field(metadata={"help": "Folder with weights, config.json and the tokenizer's files."})
    repo_id: str = field(metadata={"help": 'Repository on the Hub, "user/name". Made where it is not there.'})
    private: bool = field(default=False, metadata={"help": "Make a new repository private."})
    revision: str = field(default="main", metadata={"help": "Branch to push to. Made where it is not there."})
    commit_message: str = field(default="Upload model", metadata={"help": "First line of the commit."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest file of weights."})
    license: str | None = field(default=None, metadata={"help": "License of the weights, such as apache-2.0."})
    language: str | None = field(default=None, metadata={"help": "Language of the text, such as en."})
    dataset: str | None = field(default=None, metadata={"help": "Data set on the Hub that it was trained on."})
    training_data: str | None = field(
        default=None, metadata={"help": "The training text in words. Not with a README.md: that has them."}
    )


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


def build_card(arguments: PushArguments, model: PreTrainedModel) -> ModelCard:
    """The checkpoint's own README.md with the metadata that is given, or a new card."""
    readme = Path(arguments.checkpoint) / "README.md"
    if not readme.is_file():
        return make_card(
            model,
            arguments.repo_id,
            license=arguments.license,
            language=arguments.language,
            dataset=arguments.dataset,
            training_data=arguments.training_data,
            evaluation=read_evaluation(Path(arguments.checkpoint)),
        )
    if arguments.training_data is not None:
        raise ValueError(
            f"`training_data` must be left out where the checkpoint has a card, but got {arguments.training_data!r}: "
            f"edit {readme}."
        )
    card = ModelCard.load(readme)
    given = {"license": arguments.license, "language": arguments.language}
    given["datasets"] = None if arguments.dataset is None else [arguments.dataset]
    for name, value in given.items():
        if value is not None:
            card.data[name] = value
    return card


def push(arguments: PushArguments) -> CommitInfo:
    """Pushes, and returns the commit. Until it is made, the repository is what it was."""
    validate_repo_id(arguments.repo_id)
    model = load_checkpoint(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint, model.config, field="checkpoint")
    api = HfApi()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=arguments.max_shard_size)
        tokenizer.save_pretrained(folder)
        build_card(arguments, model).save(Path(folder) / "README.md")
        api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
        if arguments.revision != "main":
            api.create_branch(arguments.repo_id, branch=arguments.revision, exist_ok=True)
        return api.upload_folder(
            repo_id=arguments.repo_id,
            folder_path=folder,
            revision=arguments.revision,
            commit_message=arguments.commit_message,
            # A checkpoint in one file after one in several, or the other way round: what is gone here goes there.
            delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        )


if __name__ == "__main__":
    (parsed,) = HfArgumentParser(PushArguments).parse_args_into_dataclasses(sys.argv[1:])
    print(push(parsed).commit_url)
