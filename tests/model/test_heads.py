"""The heads under the real Trainer: accumulated parts against the whole batch, label smoothing, names in lists."""

from inspect import signature

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from peft.utils import constants
from support import large_weights, pad_rows, random_ids, small_config
from transformers import AutoTokenizer, DynamicCache, Trainer, TrainerCallback, TrainingArguments, pipeline
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from modeling_spiralformer import (
    SpiralFormerForCausalLM,
    SpiralFormerForQuestionAnswering,
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerModel,
)
from modeling_spiralformer.layers_spiralformer import FAMILIES

QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
LENGTH = 21


def make_head(model_class, **options) -> torch.nn.Module:
    config = small_config(**{"num_labels": 3, "classifier_dropout": 0.0, **options})
    return large_weights(model_class(config)).double()


def ignored_after(labels: torch.Tensor, count: int) -> torch.Tensor:
    """The labels with all but the first `count` left out."""
    return torch.where(torch.arange(len(labels)) < count, labels, -100)


TOKENS = random_ids(8, LENGTH)
# Per case: the head, its labels for row i, and options. Counts of labels differ from part to part.
CASES = {
    "causal": (SpiralFormerForCausalLM, lambda i: {"labels": ignored_after(TOKENS[i], 3 + 2 * i)}, {}),
    "causal, llama": (
        SpiralFormerForCausalLM,
        lambda i: {"labels": ignored_after(TOKENS[i], 3 + 2 * i)},
        {"layer_family": "llama"},
    ),
    "one of three": (SpiralFormerForSequenceClassification, lambda i: {"labels": torch.tensor(i % 3)}, {}),
    "some without": (
        SpiralFormerForSequenceClassification,
        lambda i: {"labels": torch.tensor(-100 if i in (0, 1, 4) else i % 3)},
        {},
    ),
    "regression": (SpiralFormerForSequenceClassification, lambda i: {"labels": i / 4 - 1}, {"num_labels": 1}),
    "regression of three": (
        SpiralFormerForSequenceClassification,
        lambda i: {"labels": [i / 4, 0.5, -i / 2]},
        {"problem_type": "regression"},
    ),
    "several of three": (
        SpiralFormerForSequenceClassification,
        lambda i: {"labels": [float(i % 2), float(i % 3 == 0), 1.0]},
        {},
    ),
    "tokens": (
        SpiralFormerForTokenClassification,
        lambda i: {"labels": ignored_after(TOKENS[i] % 3, 0 if i < 2 else 2 * i)},
        {},
    ),
    "span": (SpiralFormerForQuestionAnswering, lambda i: {"start_positions": i, "end_positions": 2 * i}, {}),
}


class Gradients(TrainerCallback):
    """Keeps the gradients of a step and the loss that is logged."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = logs.get("loss", getattr(self, "loss", None))


def gradients(case: str, folder, rows: int, size: int, parts: int, **arguments) -> Gradients:
    """What one step of `parts` batches of `size` rows gives."""
    model_class, labels, options = CASES[case]
    data = [{"input_ids": TOKENS[i], **labels(i)} for i in range(rows)]
    settings = {"max_steps": 1, "max_grad_norm": 0, "logging_steps": 1, **QUIET, **arguments}
    settings |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
    look = Gradients()
    model = make_head(model_class, **options)
    trainer = Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=data, callbacks=[look])
    trainer.get_train_sampler = trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    return look


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [8, 7])  # four equal parts, and a smaller one at the end
def test_accumulated_parts_give_the_gradients_of_the_whole_batch(case, rows, tmp_path):
    if case == "span" and rows == 7:
        pytest.skip("Trainer counts no labels but those named `labels`: docs/finetuning.md")
    whole, parts = gradients(case, tmp_path, rows, rows, 1), gradients(case, tmp_path, rows, 2, 4)
    assert whole.found.keys() == parts.found.keys() and len(whole.found) > 10
    largest = max(gradient.abs().max().item() for gradient in whole.found.values())
    assert largest > 1e-3
    for name, expected in whole.found.items():
        assert (parts.found[name] - expected).abs().max() < 1e-6 * max(1, largest), name
    assert parts.loss == pytest.approx(whole.loss, abs=1e-5)


def test_a_part_without_labels_adds_nothing():
    """The mean over nothing would be NaN, and with it every weight of the step."""
    model = make_head(SpiralFormerForTokenClassification)
    loss = model(TOKENS, labels=torch.full_like(TOKENS, -100), num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert loss == 0 and all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_a_regression_on_minus_100_in_parts_is_refused():
    model = make_head(SpiralFormerForSequenceClassification, num_labels=1)
    labels = torch.tensor([1.0, -100.0, 3.0])
    alone = model(TOKENS[:3], labels=labels).loss
    assert torch.equal(model(TOKENS[:3], labels=labels, num_items_in_batch=torch.tensor(2)).loss, alone)
    with pytest.raises(ValueError, match="`labels` must not hold -100 for a regression"):
        model(TOKENS[:3], labels=labels, num_items_in_batch=torch.tensor(9))


@pytest.mark.parametrize("model_class", [SpiralFormerForSequenceClassification, SpiralFormerForTokenClassification])
def test_what_a_head_returns(model_class):
    model = make_head(model_class).eval()
    labels = TOKENS % 3 if "Token" in model_class.__name__ else TOKENS[:, 0] % 3
    whole = model(TOKENS, labels=labels, output_hidden_states=True)
    as_tuple = model(TOKENS, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], whole.loss) and torch.equal(as_tuple[1], whole.logits)
    assert list(whole)[:2] == ["loss", "logits"] and len(whole.hidden_states) > 1
    expected = torch.nn.functional.cross_entropy(whole.logits.float().view(-1, 3), labels.view(-1))
    assert whole.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert model(TOKENS, labels=labels, num_items_in_batch=labels.numel() * 4).loss.item() == pytest.approx(
        expected.item() / 4, abs=1e-6
    )
    assert model(TOKENS).loss is None
    # Each argument at its place in the library's heads: ids, mask, positions, cache, embeddings, labels.
    in_order = model(TOKENS, None, None, None, None, labels, num_items_in_batch=labels.numel() * 4).loss
    assert in_order.item() == pytest.approx(expected.item() / 4, abs=1e-6)
    # Trainer drops columns of a data set that the signature lacks.
    assert {"input_ids", "attention_mask", "labels", "inputs_embeds"} < set(signature(model.forward).parameters)


TWO_ROWS = {"input_ids": TOKENS[:2, 4:9], "attention_mask": torch.ones(2, 9, dtype=torch.long)}
ROWS, TOKENS_, SPAN = (
    SpiralFormerForSequenceClassification,
    SpiralFormerForTokenClassification,
    SpiralFormerForQuestionAnswering,
)


@pytest.mark.parametrize(
    ("model_class", "targets", "message"),
    [
        (ROWS, {"labels": [0, 1]}, "`labels` must be a tensor, but got list"),
        (ROWS, {"labels": torch.tensor([0, 1, 2])}, r"`labels` must have shape \(2,\) or \(2, 1\), but got \(3,\)"),
        (ROWS, {"labels": torch.tensor([0, 3])}, r"`labels` must be in \[0, 2\], or -100, but got 3"),
        (ROWS, {"labels": torch.tensor([0.0, 1.7])}, "`labels` must be a tensor of integers, but got torch.float"),
        (ROWS, {"labels": torch.zeros(2, 2)}, r"`labels` must have shape \(2, 3\), but got \(2, 2\)"),
        (TOKENS_, {"labels": torch.zeros(2, 9).long()}, r"`labels` must have shape \(2, 5\)"),
        (TOKENS_, {"labels": torch.zeros(2, 5)}, "`labels` must be a tensor of integers, but got torch.float"),
        (TOKENS_, {"labels": torch.full((2, 5), 3)}, r"`labels` must be in \[0, 2\], or -100, but got 3"),
        (
            SPAN,
            {"start_positions": torch.zeros(2), "end_positions": torch.zeros(2)},
            "`start_positions` must be a tensor",
        ),
        (
            SPAN,
            {"start_positions": torch.zeros(2).long(), "end_positions": torch.zeros(3).long()},
            r"`end_positions` must have shape \(2,\) or \(2, 1\), but got \(3,\)",
        ),
    ],
)
def test_labels_are_refused_before_the_cache_is_written_to(model_class, targets, message):
    model = make_head(model_class).eval()
    if model_class is ROWS and "integers" in message:  # where nothing says so, numbers are labels of their own
        model.config.problem_type = "single_label_classification"
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(TOKENS[:2, :4], attention_mask=torch.ones(2, 4, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            model(**TWO_ROWS, past_key_values=cache, **targets)
    assert cache.get_seq_length() == 4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize(
    ("model_class", "targets"),
    [
        (ROWS, {"labels": torch.tensor([0, 2])}),
        (TOKENS_, {"labels": TOKENS[:2] % 3}),
        (SPAN, {"start_positions": torch.tensor([0, 2]), "end_positions": torch.tensor([[1], [5]])}),
    ],
)
def test_labels_may_be_integers_of_any_dtype(model_class, targets, dtype):
    expected = make_head(model_class).eval()(TOKENS[:2], **targets).loss
    given = {name: value.to(dtype) for name, value in targets.items()}
    assert torch.equal(make_head(model_class).eval()(TOKENS[:2], **given).loss, expected)


@pytest.mark.parametrize("dtype", [torch.long, torch.int8, torch.bool, torch.double])
@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
@pytest.mark.parametrize("count", [1, 3])
def test_numbers_of_a_row_may_have_any_dtype(problem, count, dtype):
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])[:, :count]
    expected, model = (make_head(ROWS, num_labels=count, problem_type=problem).eval() for _ in range(2))
    loss = model(TOKENS[:2], labels=labels.to(dtype)).loss
    torch.testing.assert_close(loss.float(), expected(TOKENS[:2], labels=labels.float()).loss.float())
    loss.backward()
    if dtype == torch.bool and count == 3:  # without a problem's name they are several labels
        model.config.problem_type = None
        found = model(TOKENS[:2], labels=labels.bool()).loss
        several = make_head(ROWS, num_labels=3, problem_type="multi_label_classification").eval()
        torch.testing.assert_close(found, several(TOKENS[:2], labels=labels.float()).loss)


def test_one_label_of_several_kinds_has_a_column():
    model = make_head(ROWS, num_labels=1, problem_type="multi_label_classification").eval()
    with pytest.raises(ValueError, match=r"`labels` must have shape \(2, 1\), but got \(2,\)"):
        model(TOKENS[:2], labels=torch.ones(2))
    model.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match=r"`labels` must be in \[0, 0\], or -100, but got 1"):
        model(TOKENS[:2], labels=torch.ones(2, dtype=torch.long))


# -- label smoothing ------------------------------------------------------------------------------------------------


def smoothed(logits: torch.Tensor, labels: torch.Tensor, epsilon: float) -> float:
    """The loss of the paper of label smoothing: (1 - e) of the label's, e of the mean over all of the vocabulary."""
    losses = -logits.log_softmax(-1)[labels != -100]
    right = losses.gather(-1, labels[labels != -100][:, None])
    return ((1 - epsilon) * right.mean() + epsilon * losses.mean()).item()


class Mine(SpiralFormerForCausalLM):
    """A class of a user's own."""


def as_fsdp_wraps(model: SpiralFormerForCausalLM) -> SpiralFormerForCausalLM:
    """FSDP2 makes a class of its own of the model's class."""
    model.__class__ = type("FSDPSpiralFormerForCausalLM", (type(model),), {})
    return model


CAUSAL = {
    "plain": lambda model: model,
    "of FSDP": as_fsdp_wraps,
    "with LoRA": lambda model: get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")),
}


def smoothed_loss(model, folder, data: dict) -> float:
    arguments = TrainingArguments(str(folder), label_smoothing_factor=0.2, **QUIET)
    return Trainer(model, arguments).compute_loss(model, dict(data)).item()


@pytest.mark.parametrize("kind", [*CAUSAL, "of a class of one's own"])
def test_label_smoothing_shifts_the_labels_of_a_language_model(kind, tmp_path):
    model = make_head(Mine if kind not in CAUSAL else SpiralFormerForCausalLM)
    model = CAUSAL.get(kind, CAUSAL["plain"])(model).double().eval()
    labels = torch.stack([ignored_after(row, 5 + i) for i, row in enumerate(TOKENS)])
    found = smoothed_loss(model, tmp_path, {"input_ids": TOKENS, "labels": labels})
    logits = model(TOKENS).logits
    assert found == pytest.approx(smoothed(logits[:, :-1], labels[:, 1:], 0.2), abs=1e-6)
    assert abs(found - smoothed(logits, labels, 0.2)) > 0.01


@pytest.mark.parametrize("model_class", [SpiralFormerForSequenceClassification, SpiralFormerForTokenClassification])
def test_label_smoothing_leaves_the_labels_of_a_head_where_they_are(model_class, tmp_path):
    model = make_head(model_class).eval()
    labels = TOKENS % 3 if "Token" in model_class.__name__ else TOKENS[:, 0] % 3
    found = smoothed_loss(model, tmp_path, {"input_ids": TOKENS, "labels": labels})
    assert found == pytest.approx(smoothed(model(TOKENS).logits, labels, 0.2), abs=1e-6)


# -- names in the libraries' lists ------------------------------------------------------------------------------------


def test_the_lists_of_the_library_hold_every_class():
    for names, model_class in {
        "MODEL_MAPPING_NAMES": SpiralFormerModel,
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": SpiralFormerForCausalLM,
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": SpiralFormerForQuestionAnswering,
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": SpiralFormerForSequenceClassification,
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": SpiralFormerForTokenClassification,
    }.items():
        assert getattr(modeling_auto, names)["spiralformer"] == model_class.__name__


def test_a_pipeline_of_a_model_finds_its_task_supported(caplog, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained("tokenization")
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model = make_head(SpiralFormerForTokenClassification, vocab_size=len(tokenizer)).eval()
    found = pipeline("token-classification", model=model, tokenizer=tokenizer)("def add(a, b):")
    assert found and "not supported" not in caplog.text


@pytest.mark.parametrize("config_class", [LoraConfig, AdaLoraConfig, IA3Config])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_without_targets_take_those_of_their_family(config_class, family):
    given = {"total_step": 10} if config_class is AdaLoraConfig else {}
    model = make_head(SpiralFormerForCausalLM, layer_family=family)
    model = get_peft_model(model, config_class(task_type="CAUSAL_LM", **given))
    adapted = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") or hasattr(module, "ia3_l")
    }
    expected = {"query_key_value"} if family == "gpt_neox" else {"q_proj", "v_proj"}
    if config_class is IA3Config:  # the library's lists for Llama and Qwen3 differ: here they are one
        expected |= {"dense_4h_to_h"} if family == "gpt_neox" else {"k_proj", "down_proj"}
    assert adapted == expected


def test_every_list_of_targets_that_holds_a_family_holds_us():
    make_head(SpiralFormerForCausalLM)
    lists = {name: targets for name, targets in vars(constants).items() if isinstance(targets, dict)}
    for family in FAMILIES:
        known = [targets for targets in lists.values() if isinstance(targets.get(family), list)]
        assert len(known) > 20
        assert all(set(targets[family]) <= set(targets["spiralformer"]) for targets in known)


def test_label_smoothing_with_a_learned_prompt_ends_in_an_error(tmp_path):
    """PEFT puts the prompt in front of the logits, which Trainer's smoothing of any model does not expect."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(make_head(SpiralFormerForCausalLM), prompt)
    with pytest.raises(RuntimeError, match="size"):
        smoothed_loss(model, tmp_path, {"input_ids": TOKENS, "labels": TOKENS})


# -- which token is the last --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("ids_of_padding", [0, 7], ids=["pad id", "another"])
@pytest.mark.parametrize("embedded", [False, True])
def test_the_mask_says_where_a_row_ends(side, ids_of_padding, embedded):
    model = make_head(SpiralFormerForSequenceClassification).eval()
    rows = [
        TOKENS[0, :5],
        TOKENS[1, :9],
        TOKENS[2, :12].index_fill(0, torch.tensor([5, 11]), 0),
    ]  # pad ids that are text
    with torch.no_grad():
        alone = [model(row[None], attention_mask=torch.ones(1, len(row))).logits for row in rows]
        ids, mask = pad_rows(rows, side)
        ids = ids.masked_fill(mask == 0, ids_of_padding)
        given = {"inputs_embeds": model.model.embed_tokens(ids)} if embedded else {"input_ids": ids}
        assert (model(**given, attention_mask=mask).logits - torch.cat(alone)).abs().max() < 1e-9


def test_a_text_that_goes_on_is_read_at_its_newest_token():
    model = make_head(SpiralFormerForSequenceClassification).eval()
    ids, mask = pad_rows([TOKENS[0, :5], TOKENS[1, :12]], "left")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache)
        logits = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
        assert (logits - model(ids, attention_mask=mask).logits).abs().max() < 1e-9


def test_rows_that_nothing_tells_the_end_of_are_refused():
    model = make_head(SpiralFormerForSequenceClassification, pad_token_id=None).eval()
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="`attention_mask` must be given with 2 rows where `pad_token_id` is None"):
        model(TOKENS[:2], past_key_values=cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(model(TOKENS[:1]).logits, model(TOKENS[:1], attention_mask=torch.ones(1, LENGTH)).logits)
