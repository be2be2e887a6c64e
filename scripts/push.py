"""Pushes a checkpoint to the Hub in one commit: weights, configuration, code, tokenizer and model card.

python scripts/push.py --checkpoint runs/mine --repo_id me/my-spiralformer
"""

import sys
from dataclasses import dataclass, field

from huggingface_hub import CommitInfo
from transformers import HfArgumentParser

from workshop.hub import push


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


def main(argv: list[str]) -> CommitInfo:
    (arguments,) = HfArgumentParser(PushArguments).parse_args_into_dataclasses(argv)
    commit = push(**vars(arguments))
    print(commit.commit_url)
    return commit


if __name__ == "__main__":
    main(sys.argv[1:])
