"""Fine-tuning with the real libraries: Trainer, PEFT's adapters, TRL's trainers, and the examples as they are."""

import copy
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from documents import ROOT, commands
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from support import large_weights, pad_rows, random_ids, small_config, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from modeling_spiralformer import SpiralFormerForCausalLM

LAYERS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "tokenization")
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
QUIET["bf16"] = False  # TRL's default would be autocast in half precision


def adapted(targets="all-linear", **options):
    """A small model with LoRA on `targets`, large random weights in the adapters too."""
    config = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=targets)
    model = get_peft_model(small_model(**options), config).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def adapters(model) -> dict[str, torch.nn.Module]:
    """The adapted linear layers, by their name in the plain model."""
    prefix = "base_model.model."
    return {name.removeprefix(prefix): module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def batch() -> dict[str, torch.Tensor]:
    """Rows of 21, 3 and 13 tokens, padded on the left."""
    ids, mask = pad_rows([random_ids(1, length, length)[0] for length in (21, 3, 13)], "left")
    return {"input_ids": ids, "attention_mask": mask}


def real(logits: torch.Tensor) -> torch.Tensor:
    """The logits at real tokens."""
    return logits[batch()["attention_mask"].bool()]


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return real(model(**batch()).logits)


# -- LoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_core", [True, False])
def test_targets_are_every_layer_and_not_the_head(share_core):
    layers = {re.sub(r"\.\d+", ".*", name) for name in adapters(adapted(LAYERS, share_core=share_core))}
    parts = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert layers == {f"model.{block}.*.{part}" for block in ("prelude", "core", "coda") for part in parts}
    everything = {re.sub(r"\.\d+", ".*", name) for name in adapters(adapted(share_core=share_core))}
    small = {"model.resolutions.*.scorer", "model.resolutions.*.allocator", "model.topology.*.*"}
    assert {re.sub("write|read", "*", name) for name in everything} == layers | small


def test_the_default_asks_for_targets():
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(small_model(), LoraConfig(task_type="CAUSAL_LM"))


def test_the_cores_adapter_acts_in_every_iteration():
    model, calls = adapted(), {}
    for name, module in adapters(model).items():
        module.lora_A["default"].register_forward_hook(
            lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1})
        )
    logits_of(model)
    assert calls.keys() == adapters(model).keys()
    assert {name: count for name, count in calls.items() if count != 1} == {
        name: 3 for name in calls if name.startswith("model.core.")
    }


@pytest.mark.parametrize("share_core", [True, False])
def test_adapters_are_weights_merged_by_hand(share_core, tmp_path):
    model = adapted(share_core=share_core)
    expected, plain = logits_of(model), small_model(share_core=share_core)
    untouched = logits_of(plain)
    with torch.no_grad():
        for name, module in adapters(model).items():
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            plain.get_submodule(name).weight += 5 / 3 * b @ a
    assert torch.allclose(logits_of(plain), expected, atol=1e-9)
    assert not torch.allclose(untouched, expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), untouched)

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_model(share_core=share_core), tmp_path).eval()
    assert (tmp_path / "adapter_model.safetensors").is_file() and not (tmp_path / "model.safetensors").exists()
    assert torch.allclose(logits_of(loaded.double()), expected, atol=1e-9)
    merged = loaded.merge_and_unload()
    assert type(merged) is SpiralFormerForCausalLM and merged.state_dict().keys() == plain.state_dict().keys()
    assert torch.allclose(logits_of(merged), expected, atol=1e-9)


def test_adapters_generate_with_the_cache():
    model = adapted()
    text = model.generate(**batch(), max_new_tokens=12, do_sample=False)
    assert torch.equal(text, model.generate(**batch(), max_new_tokens=12, do_sample=False, use_cache=False))


def train_adapters(model, folder, **arguments) -> list[float]:
    """Trains on ragged rows and returns the losses."""

    def collate(rows):
        ids, mask = pad_rows([row["input_ids"] for row in rows], "right")
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    settings = {"max_steps": 12, "learning_rate": 1e-1, "per_device_train_batch_size": 4, **QUIET, **arguments}
    rows = [{"input_ids": random_ids(1, length, length)[0]} for length in (21, 2, 13, 9)]
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows, data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_training_changes_adapters_alone_with_and_without_checkpointing(tmp_path):
    plain = adapted().float()
    replayed, before = copy.deepcopy(plain), copy.deepcopy(plain.state_dict())
    losses = train_adapters(plain, tmp_path)
    assert losses[-1] < losses[0] - 0.1
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, before[name]) != ("lora_" in name), name
    assert train_adapters(replayed, tmp_path, gradient_checkpointing=True) == pytest.approx(losses, abs=1e-5)


# -- prompts --------------------------------------------------------------------------------------------------------


def test_prefix_tuning_is_refused():
    model = get_peft_model(small_model(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="Prefix tuning .* is not supported"):
        model(random_ids(1, 9))
    with pytest.raises(ValueError, match="Prefix tuning .* is not supported"):
        model.generate(input_ids=random_ids(1, 9), max_new_tokens=2)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig])
def test_prompt_tuning_is_embeddings_in_front(kind):
    base = small_model()
    embed = base.get_input_embeddings()
    model = get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).double().eval()
    rows = [random_ids(1, length, length)[0] for length in (21, 5)]
    ids, mask = pad_rows(rows, "right")
    with torch.no_grad():
        found = model(ids, attention_mask=mask).logits
        prompt = model.get_prompt(1)
        for row, logits in zip(rows, found, strict=True):
            expected = base(inputs_embeds=torch.cat([prompt, embed(row[None])], dim=1)).logits[0]
            assert torch.allclose(logits[: len(expected)], expected, atol=1e-9)
    one = {"input_ids": ids[:1], "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(**one), model.generate(**one, use_cache=False))
    with pytest.raises(ValueError, match="attention_mask"):
        model(**batch())  # the prompt stands before left padding


# -- TRL --------------------------------------------------------------------------------------------------------------


def text_model() -> SpiralFormerForCausalLM:
    """A small model with the vocabulary of the tokenizer."""
    return large_weights(SpiralFormerForCausalLM(small_config(vocab_size=len(TOKENIZER))))


def masked_loss(model, ids, mask, counted) -> torch.Tensor:
    """The mean loss of the tokens that count, each row run alone and without its padding."""
    losses = []
    for row, real_tokens, count in zip(ids, mask.bool(), counted, strict=True):
        tokens = row[real_tokens]
        logits = model(tokens[None]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        losses.append(loss[count[real_tokens][1:]])
    return torch.cat(losses).mean()


TEXTS = {
    "plain": {"text": ["def add(a, b):\n    return a + b\n" * count for count in (1, 3, 2, 1)]},
    "completion": {
        "prompt": ["def add(a, b):", "import", "x =", "for i in"],
        "completion": ["\n    return a + b\n", " os", " [1, 2, 3]\n", " range(10):\n        print(i)\n"],
    },
}


@pytest.mark.parametrize("kind", TEXTS)
def test_sft_loss_is_the_masked_loss_of_rows_alone(kind, tmp_path):
    arguments = SFTConfig(str(tmp_path), max_steps=5, per_device_train_batch_size=4, learning_rate=1e-2, **QUIET)
    model = text_model()
    start = copy.deepcopy(model).eval()
    trainer = SFTTrainer(model, arguments, train_dataset=Dataset.from_dict(TEXTS[kind]), processing_class=TOKENIZER)
    rows = next(iter(trainer.get_train_dataloader()))
    counted = rows["labels"] != -100
    mask = rows.get("attention_mask", torch.ones_like(rows["input_ids"]))
    assert 0 in mask  # rows differ in length
    if kind == "completion":  # and the prompt does not count
        prompts = [len(TOKENIZER(text)["input_ids"]) for text in TEXTS[kind]["prompt"]]
        assert sorted((mask.bool() & ~counted).sum(-1).tolist()) == sorted(prompts)
    with torch.no_grad():
        expected = masked_loss(start, rows["input_ids"], mask, counted)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), abs=1e-5) and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("with_adapters", [True, False])
def test_dpo_prefers_what_was_chosen(with_adapters, tmp_path):
    data = {
        "prompt": ["def add(", "x"] * 2,
        "chosen": ["a, b):\n    return a", " = 1"] * 2,
        "rejected": ["no", "?"] * 2,
    }
    rate = 1e-1 if with_adapters else 1e-2
    arguments = DPOConfig(str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=rate, **QUIET)
    model = text_model()
    trainer = DPOTrainer(
        model,
        ref_model=None if with_adapters else copy.deepcopy(model),
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if with_adapters else None,
    )
    trainer.train()
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.05


# -- the examples ---------------------------------------------------------------------------------------------------


def test_the_commands_of_the_page_run(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    for command in commands("docs/finetuning.md"):
        python, *words = shlex.split(command)
        assert python == "python"
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")
        first, last = map(float, re.search(r"loss: first (\S+), last (\S+)", capsys.readouterr().out).groups())
        assert last < first or "runs/again" in words, (command, first, last)
    weights = {
        name: AutoModelForCausalLM.from_pretrained(f"runs/{name}").state_dict()
        for name in ("finetuned", "lora/merged", "again")
    }
    base, merged, again = weights.values()
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("runs/finetuned"), "runs/lora")
    # Lines too short for a chunk of 8 leave some of the adapters at zero.
    assert {name.removesuffix(".weight") for name in changed} <= set(adapters(loaded))
    assert all(f"model.core.{layer}.attention.query_key_value.weight" in changed for layer in range(4))
    assert json.loads(Path("runs/lora/adapter_config.json").read_text())["r"] == 4
    assert 0 < (again["lm_head.weight"] - merged["lm_head.weight"]).abs().max() < 2.01e-4  # that learning rate
