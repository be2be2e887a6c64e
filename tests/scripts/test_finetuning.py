"""Fine-tuning with the real libraries: Trainer, PEFT's adapters, TRL's trainers, and the examples as they are."""

import copy
import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from documents import ROOT, commands
from peft import LoraConfig, PeftModel, get_peft_model
from support import large_weights, pad_rows, random_ids, small_config, small_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental import a2po, cpo, gkd, gmpo, online_dpo, orpo, tpo

from modeling_spiralformer import SpiralFormerForCausalLM, SpiralFormerForSequenceClassification

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


PAIRS = {
    "prompt": ["def add(", "x"] * 2,
    "chosen": ["a, b):\n    return a", " = 1"] * 2,
    "rejected": ["no", "?"] * 2,
}
PROMPTS = {"prompt": PAIRS["prompt"]}
MESSAGES = {
    "messages": [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in ("a b", "c")]
}


def one_step(package, method, folder, data, model=None, settings=(), tokenizer=TOKENIZER, **options):
    """Trains one step of four rows with a trainer of `package`; returns it and its first log."""
    trainer_class, config_class = getattr(package, f"{method}Trainer"), getattr(package, f"{method}Config")
    defaults = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2, **QUIET}
    arguments = config_class(str(folder), **{**defaults, **dict(settings)})
    trainer = trainer_class(
        text_model() if model is None else model,
        args=arguments,
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    return trainer, next(entry for entry in trainer.state.log_history if "loss" in entry)


def saved_and_loaded(folder) -> SpiralFormerForCausalLM:
    text_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "method, data, settings, loss, start",
    [
        ("DPO", PAIRS, {}, math.log(2), "rewards/margins"),
        ("KTO", PAIRS, {}, 0.5, "kl"),
        ("GRPO", PROMPTS, {"beta": 0.1, "max_completion_length": 8, "num_generations": 4}, 0, "kl"),
        ("RLOO", PROMPTS, {"beta": 0.1, "max_completion_length": 8, "num_generations": 4}, 0, "kl"),
    ],
)
def test_a_saved_model_is_its_own_reference(method, data, settings, loss, start, tmp_path):
    options = {"reward_funcs": rewards([])} if data is PROMPTS else {}
    with pytest.raises(OSError, match="Repo id must use"):
        one_step(trl, method, tmp_path, data, settings=settings, **options)
    model = saved_and_loaded(tmp_path)
    before = copy.deepcopy(model.state_dict())
    _, log = one_step(trl, method, tmp_path, data, model=model, settings=settings, **options)
    assert log["loss"] == pytest.approx(loss, abs=1e-5) and log[start] == pytest.approx(0, abs=1e-5)
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def rewards(seen: list):
    """A reward that keeps what was completed."""

    def length(prompts, completion_ids, completions, **kwargs):
        seen.extend(zip(prompts, completion_ids, strict=True))
        return [float(len(completion)) for completion in completions]

    return length


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_completions_are_scored_as_rows_alone(method, tmp_path):
    seen, entropies = [], []
    settings = {"beta": 0.0, "max_completion_length": 8, "num_generations": 2, "learning_rate": 0.0}
    trainer, log = one_step(trl, method, tmp_path, PROMPTS, settings=settings, reward_funcs=rewards(seen))
    assert len({len(TOKENIZER(prompt)["input_ids"]) for prompt, _ in seen}) == 2  # some rows are padded
    with torch.no_grad():
        for prompt, completion in seen:
            ids = torch.tensor([[*TOKENIZER(prompt)["input_ids"], *completion]])
            logits = trainer.model.eval()(ids).logits[0, -len(completion) - 1 : -1]
            entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    assert log["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-4)


def test_reward_loss_is_that_of_rows_alone(tmp_path):
    config = small_config(vocab_size=len(TOKENIZER), num_labels=1)
    model = large_weights(SpiralFormerForSequenceClassification(config))
    start = copy.deepcopy(model).eval()
    trainer, log = one_step(trl, "Reward", tmp_path, PAIRS, model=model)
    with torch.no_grad():
        scores = {
            kind: torch.cat([start(torch.tensor([row[f"{kind}_ids"]])).logits for row in trainer.train_dataset])
            for kind in ("chosen", "rejected")
        }
    loss = -torch.nn.functional.logsigmoid(scores["chosen"] - scores["rejected"]).mean()
    assert log["loss"] == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_distillation_is_nothing_from_the_same_weights(seed, tmp_path):
    teacher = large_weights(text_model(), seed)
    settings = {"max_completion_length": 8}
    _, log = one_step(trl, "Distillation", tmp_path, PROMPTS, settings=settings, teacher_model=teacher)
    assert log["loss"] == pytest.approx(0, abs=1e-6) if seed == 0 else log["loss"] > 1e-4


TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
EXPERIMENTAL = {
    "CPO": (cpo, PAIRS, {}),
    "ORPO": (orpo, PAIRS, {}),
    "TPO": (tpo, {**PAIRS, "reference": PAIRS["chosen"]}, {}),
    "GMPO": (gmpo, PROMPTS, {"max_completion_length": 8, "num_generations": 4}),
    "OnlineDPO": (online_dpo, PROMPTS, {"max_new_tokens": 8}),
    "GKD": (gkd, MESSAGES, {"max_new_tokens": 8}),
    "A2PO": (a2po, PROMPTS, {"max_completion_length": 8}),
}


@pytest.mark.parametrize("method", EXPERIMENTAL)
def test_other_trainers_take_a_step(method, tmp_path):
    package, data, settings = EXPERIMENTAL[method]
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE, "left"
    options = {}
    if method in ("GMPO", "OnlineDPO", "A2PO"):
        options["reward_funcs"] = lambda completions, **kwargs: [float(len(text)) for text in completions]
    if method == "OnlineDPO":
        options["ref_model"] = text_model()
    if method == "GKD":
        options["teacher_model"] = large_weights(text_model(), 1)
    model = saved_and_loaded(tmp_path)
    before = copy.deepcopy(model.state_dict())
    _, log = one_step(package, method, tmp_path, data, model, settings, tokenizer, **options)
    assert math.isfinite(log["loss"])
    assert any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_every_trainer_of_the_page_is_run():
    section = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8").partition("## TRL")[2]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+)Trainer`", "\n".join(rows)))
    assert named == {"SFT", "DPO", "KTO", "Reward", "GRPO", "RLOO", "Distillation", *EXPERIMENTAL}


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


def test_a_checkpoint_in_half_precision_is_fine_tuned_in_float32(tmp_path, monkeypatch):
    """A norm of 1 is left where it is by a step that bfloat16 rounds away."""
    model = small_model(vocab_size=len(TOKENIZER), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    TOKENIZER.save_pretrained(tmp_path / "half")
    (tmp_path / "text.txt").write_text("def add(a, b): return a + b\n" * 20)
    words = ["--model", "half", "--text", "text.txt", "--output_dir", "tuned", "--max_steps", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words, "--learning_rate", "1e-4"])
    runpy.run_path(str(ROOT / "examples" / "finetune.py"), run_name="__main__")
    tuned = AutoModelForCausalLM.from_pretrained("tuned")
    assert model.dtype == torch.bfloat16 and tuned.dtype == torch.float32
    assert (tuned.model.norm.weight != model.model.norm.weight.float()).all()
