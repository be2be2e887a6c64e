"""Run by test_hub.py where the package is installed: pushes in every way, pulls back, and writes down what was pushed.

python hub_push.py folder
"""

import runpy
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from documents import ROOT, blocks
from hub_snapshot import same, snapshot
from huggingface_hub import HfApi
from support import large_weights, random_ids, small_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import modeling_spiralformer as package
from modeling_spiralformer.modeling_spiralformer import AUTO_CLASSES
from workshop.model_card import CardTrainer

FOLDER = Path(sys.argv[1])
API = HfApi()
IDS = random_ids(3, 21, seed=4)
MASK = (torch.arange(21) >= torch.tensor([[0], [5], [11]])).long()
BATCH = {"input_ids": IDS, "attention_mask": MASK}


def make_model(seed: int, model_class=package.SpiralFormerForCausalLM, **options):
    config = small_config(vocab_size=4096, **options)
    return large_weights(model_class(config), seed).eval()


def look(model) -> dict:
    """The snapshot that a pull has to agree with."""
    return snapshot(model.eval(), BATCH)


def check_same(model, expected: dict) -> None:
    assert same(look(model), expected), type(model)


def push_revisions(tokenizer) -> dict:
    """Three states of one repository: a tag, main, and a branch; the first in several files."""
    first, second, third = (make_model(seed) for seed in (1, 2, 3))
    first.push_to_hub("me/lm", max_shard_size="60KB")
    tokenizer.push_to_hub("me/lm")
    commit = API.model_info("me/lm").sha
    API.create_tag("me/lm", tag="v1")
    second.push_to_hub("me/lm", max_shard_size="60KB")
    third.push_to_hub("me/lm", max_shard_size="60KB", revision="experiment")
    expected = {"v1": look(first), "main": look(second), "experiment": look(third), commit: look(first)}
    for revision, values in expected.items():
        check_same(AutoModelForCausalLM.from_pretrained("me/lm", revision=revision), values)
    model = AutoModelForCausalLM.from_pretrained("me/lm")
    assert type(model) is package.SpiralFormerForCausalLM and type(model.config) is package.SpiralFormerConfig
    assert type(AutoModel.from_pretrained("me/lm")) is package.SpiralFormerModel
    assert AutoTokenizer.from_pretrained("me/lm", revision="v1")("def f():") == tokenizer("def f():")
    return expected


def push_heads(tokenizer) -> dict:
    """A repository for every other Auto class, and one that holds a configuration alone."""
    expected = {}
    for auto_class, model_class in AUTO_CLASSES.items():
        model = make_model(5, model_class, num_labels=2 if "Question" in auto_class else 3)
        model.push_to_hub(f"me/{auto_class}")
        tokenizer.push_to_hub(f"me/{auto_class}")
        expected[auto_class] = look(model)
    small_config().push_to_hub("me/config")
    return expected


def train_and_push(trainer_class: type, name: str, tokenizer, **options) -> dict:
    rows = [{"input_ids": row, "labels": row} for row in random_ids(4, 16, seed=8)]
    arguments = TrainingArguments(
        output_dir=str(FOLDER / name),
        hub_model_id=f"me/{name}",
        max_steps=2,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        make_model(6), arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    return look(trainer.model)


def cut_an_upload(expected: dict) -> dict:
    """The server hangs up in the middle of the weights: main stays what it was, and pushing once more mends it."""
    model = make_model(7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between tries
        huggingface_hub.get_session().post(f"{API.endpoint}/cut_uploads", content="true")
        with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'"):
            model.push_to_hub("me/cut")
        huggingface_hub.get_session().post(f"{API.endpoint}/cut_uploads", content="false")
    check_same(AutoModelForCausalLM.from_pretrained("me/cut"), expected)
    model.push_to_hub("me/cut")
    check_same(AutoModelForCausalLM.from_pretrained("me/cut"), look(model))


def check_refusals(expected: dict) -> None:
    """What is missing, or private, is refused in the library's words; what is private loads with the token."""
    make_model(1).push_to_hub("me/private", private=True)
    check_same(AutoModelForCausalLM.from_pretrained("me/private"), expected)
    for name, options, words in (
        ("me/private", {"token": False, "cache_dir": FOLDER / "empty"}, "not a local folder and is not a valid model"),
        ("me/missing", {}, "not a local folder and is not a valid model identifier"),
        ("me/lm", {"revision": "v9"}, "v9 is not a valid git identifier"),
    ):
        for auto_class in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
            with pytest.raises(OSError, match=words):
                auto_class.from_pretrained(name, **options)
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="401"):
        make_model(1).push_to_hub("me/lm", token=False)


def run_documentation() -> None:
    """The snippets of docs/hub.md that push, and that pull with the package; and the example."""
    snippets = [text for text, network in blocks("docs/hub.md", "python") if network]
    with_package = [text for text in snippets if "modeling_spiralformer" in text]
    assert len(snippets) == 3 and len(with_package) == 2 and "push_to_hub" in with_package[0]
    for text in with_package:
        exec(text, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["push_and_pull.py", "me/example"])
        runpy.run_path(str(ROOT / "examples" / "push_and_pull.py"), run_name="__main__")


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization", padding_side="left")
    expected = push_revisions(tokenizer)
    expected |= push_heads(tokenizer)
    check_refusals(expected["v1"])
    make_model(1).push_to_hub("me/cut")
    cut_an_upload(expected["v1"])
    expected["trainer"] = train_and_push(Trainer, "trainer", tokenizer)
    expected["card-trainer"] = train_and_push(
        CardTrainer, "card-trainer", tokenizer, push_to_hub=True, save_steps=1, hub_always_push=True
    )
    for name in ("trainer", "card-trainer"):
        check_same(AutoModelForCausalLM.from_pretrained(f"me/{name}"), expected[name])

    run_documentation()

    # The installed classes win, whatever is trusted.
    model = AutoModelForCausalLM.from_pretrained("me/lm", trust_remote_code=True)
    assert type(model) is package.SpiralFormerForCausalLM
    assert not any(name.startswith("transformers_modules") for name in sys.modules)
    expected["generated"] = AutoModelForCausalLM.from_pretrained("me/lm", revision="v1").generate(
        **BATCH, max_new_tokens=20, do_sample=False, use_cache=False
    )
    torch.save({"batch": BATCH, "expected": expected}, FOLDER / "expected.pt")


if __name__ == "__main__":
    main()
