"""Every tuner and LoRA option of the installed PEFT: one function cached and not, or an error before any number."""

import copy
import dataclasses
import os
import re
import subprocess
import sys
import typing

import peft
import pytest
import torch
from adapter_cases import (
    LAYERS,
    LORA,
    OF_FAMILIES,
    PROMPTS,
    REFUSED,
    TOKEN_LAYERS,
    TUNERS,
    Case,
    activated,
    lora,
    text,
    x_lora,
)
from documents import ROOT
from peft import PeftModel
from support import large_weights, pad_rows, random_ids, seeded, small_config, small_model
from transformers import DynamicCache, StaticCache

from modeling_spiralformer import SpiralFormerForCausalLM

LENGTHS = (14, 3, 9)
TEXTS = [random_ids(1, length, length)[0] for length in LENGTHS]
IDS, MASK = pad_rows(TEXTS, "left")
REAL = MASK.bool()
WORKS = {**LORA, **TUNERS}


def base_model(dtype: torch.dtype = torch.float32, **options):
    return small_model(dtype=dtype, num_core_layers=1, **options)


def adapted(case: Case, **options) -> PeftModel:
    """A small model in evaluation mode with the tuner of `case`, what it trains moved away from its start."""
    torch.manual_seed(0)
    if case.config is not None and getattr(case.config, "ensure_weight_tying", False):
        options["tie_word_embeddings"] = True
    model = case.wrap(base_model(**case.model, **options))
    generator = seeded(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:  # the rank as a number, of AdaLoRA
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.to(case.dtype).eval()


@torch.no_grad()
def logits_of(model, case: Case) -> torch.Tensor:
    return model(IDS, attention_mask=MASK, **case.given).logits


@torch.no_grad()
def cached_logits(model, case: Case) -> torch.Tensor:
    """A prefill, a call of several tokens, and single steps."""
    cache, cuts = DynamicCache(config=base_model(**case.model).config), [0, 4, 7, *range(8, 15)]
    steps = [
        model(IDS[:, start:end], attention_mask=MASK[:, :end], past_key_values=cache, **case.given).logits
        for start, end in zip(cuts, cuts[1:], strict=False)
    ]
    return torch.cat(steps, dim=1)


@torch.no_grad()
def logits_alone(model, case: Case) -> torch.Tensor:
    """The logits of each row without padding, where they stand in the batch."""
    logits = torch.zeros(*IDS.shape, 61, dtype=torch.float64)
    for row, ids in enumerate(TEXTS):
        given = {name: values[row : row + 1] for name, values in case.given.items()}
        logits[row, REAL[row]] = model(ids[None], **given).logits[0].double()
    return logits


def gradients(model, case: Case) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    labels = IDS.masked_fill(~REAL, -100)
    model.train()(IDS, attention_mask=MASK, labels=labels, use_cache=False, **case.given).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_same(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    difference = (found.double() - expected.double())[REAL].abs().max()
    assert difference < case.tolerance, difference


@pytest.mark.parametrize("name", [*WORKS, *OF_FAMILIES])
def test_one_function_however_it_is_run(name, tmp_path):
    case = (WORKS | OF_FAMILIES)[name]
    model = adapted(case)
    expected = logits_of(model, case)
    with torch.no_grad():
        plain = base_model(torch.float64, **case.model)(IDS, attention_mask=MASK).logits
    assert (expected - plain)[REAL].abs().max() > 1e-4
    assert_same(cached_logits(model, case), expected, case)
    assert_same(logits_alone(model, case), expected, case)
    if case.reloads:
        model.save_pretrained(tmp_path)
        options = {"tie_word_embeddings": True} if name == "`ensure_weight_tying`" else {}
        loaded = PeftModel.from_pretrained(base_model(**case.model, **options), tmp_path).to(case.dtype).eval()
        assert_same(logits_of(loaded, case), expected, case)
    if case.merges:
        assert_same(logits_of(model.merge_and_unload(), case), expected, case)


@pytest.mark.parametrize(
    "name", [name for name in (*WORKS, *OF_FAMILIES) if name != "`arrow_config`"]
)  # trains nothing
def test_gradients_reach_it_with_and_without_checkpointing(name):
    case = (WORKS | OF_FAMILIES)[name]
    found = gradients(adapted(case), case)
    assert found and all(gradient is not None and gradient.isfinite().all() for gradient in found.values())
    core = {key: gradient for key, gradient in found.items() if ".core." in key and gradient.numel()}
    assert all(gradient.abs().max() > 0 for gradient in core.values())
    assert core or name in ("`trainable_token_indices`", "trainable tokens", "UniLoRA", "VB-LoRA", "TinyLoRA")
    if not case.replays:
        return
    replayed = adapted(case)
    replayed.gradient_checkpointing_enable()
    for key, gradient in gradients(replayed, case).items():
        torch.testing.assert_close(gradient, found[key], atol=case.tolerance, rtol=case.tolerance)


def test_layers_are_numbered_from_zero_in_prelude_core_and_coda():
    def chosen(**options):
        model = lora(["query_key_value"], **options).wrap(base_model())
        found = (name for name, module in model.named_modules() if hasattr(module, "lora_A"))
        return [name.removeprefix("base_model.model.model.") for name in found]

    blocks = [f"{block}.0.attention.query_key_value" for block in ("prelude", "core", "coda")]
    assert chosen(layers_to_transform=[0]) == blocks
    assert chosen(layers_to_transform=[0], layers_pattern="core") == blocks[1:2]
    with pytest.raises(ValueError, match="not found in the base model"):
        chosen(layers_to_transform=[1])


def test_eva_starts_at_the_main_directions_of_the_latents_of_all_iterations():
    model = LORA["`eva`"].wrap(base_model())
    name, seen = "base_model.model.model.core.0.attention.query_key_value", []
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for seed in range(4):
            model(**text(4, seed))
    latents = torch.cat(seen)
    assert len(seen) == 4 * 3  # batches, iterations
    directions = torch.linalg.svd(latents - latents.mean(dim=0)).Vh
    weight = layer.lora_A["default"].weight
    share = (weight @ directions[: len(weight)].T).norm(dim=-1) / weight.norm(dim=-1)
    assert len(weight) and share.min() > 0.9


@pytest.mark.parametrize("name", ["`pissa_niter_4`", "`corda`", "`lora_ga`"])
def test_a_start_that_changed_the_weights_is_saved_as_plain_adapters(name, tmp_path):
    torch.manual_seed(0)
    case = LORA[name]
    model = case.wrap(base_model()).eval()
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.15)
    expected = logits_of(model, case)
    model.peft_config["default"].init_lora_weights = case.config.init_lora_weights
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "end").eval()
    torch.testing.assert_close(logits_of(loaded, case)[REAL], expected[REAL], atol=1e-5, rtol=0)


def test_a_static_decode_step_compiles_with_adapters():
    torch._dynamo.reset()
    options = {"chunk_sizes": [2, 1], "num_prelude_layers": 1, "num_coda_layers": 0}
    model, ids = adapted(lora(init_lora_weights=False), **options), random_ids(2, 9)
    cache = StaticCache(config=base_model(**options).config, max_cache_len=12)
    step = torch.compile(model.get_base_model().forward, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model(ids[:, :6], past_key_values=cache)
        for column in range(6, 9):
            logits = step(ids[:, column : column + 1].clone(), past_key_values=cache).logits
            assert torch.allclose(logits[:, 0], expected[:, column], atol=1e-9)


# -- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_wrong_is_refused_by_name(name):
    case, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        model = case.wrap(base_model())
        ids = torch.full((1, 9), 7)  # which invokes activated LoRA
        with torch.no_grad():
            model(ids)


@pytest.mark.parametrize("name", ["activated LoRA on the core", "Lily"])
def test_without_the_adapter_the_model_runs(name):
    model = REFUSED[name][0].wrap(base_model()).eval()
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, base_model()(IDS).logits)


def test_dora_on_weights_that_start_at_0_is_refused():
    """Those of a new model's scorers and allocators; without them it trains."""
    config = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "use_dora": True}
    model = peft.get_peft_model(SpiralFormerForCausalLM(small_config()), peft.LoraConfig(**config))
    with pytest.raises(ValueError, match=r"DoRA \(`use_dora`\) .* exclude_modules="):
        model(IDS)
    with model.disable_adapter():
        assert model(IDS).logits.isfinite().all()
    model.add_adapter("plain", peft.LoraConfig(**config | {"use_dora": False}))
    model.set_adapter("plain")
    assert model(IDS).logits.isfinite().all()
    without = r".*\.(scorer|allocator|topology\..*)"  # as the error says
    model = peft.get_peft_model(
        SpiralFormerForCausalLM(small_config()), peft.LoraConfig(**config, exclude_modules=without)
    )
    model(IDS, labels=IDS).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "magnitude" in name]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_code_that_came_with_a_checkpoint_refuses_too(tmp_path):
    """In a process of its own: code that is loaded twice registers the cache's layers twice."""
    base_model().save_pretrained(tmp_path)
    code = """
import sys, torch
from adapter_cases import REFUSED
from transformers.dynamic_module_utils import get_class_from_dynamic_module
remote = get_class_from_dynamic_module("modeling_spiralformer.SpiralFormerForCausalLM", sys.argv[1])
assert remote.__module__.startswith("transformers_modules.")
REFUSED["activated LoRA on the core"][0].wrap(remote.from_pretrained(sys.argv[1]))(torch.full((1, 9), 7))
"""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "helpers")))
    command, environment = [sys.executable, "-c", code, tmp_path], {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    words = REFUSED["activated LoRA on the core"][1]
    assert re.search(f"ValueError: .*{words}", child.stderr), child.stderr


def test_a_hook_of_the_user_is_no_adapter():
    """Rows that fill nothing stay out of the core: a hook that takes keywords does not ask for them."""
    model, ids = base_model(), random_ids(2, 12)
    mask, rows = torch.ones_like(ids), []
    mask[1, :1] = 0
    model.model.core[0].register_forward_pre_hook(lambda m, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        rows.clear()
        model(ids[:, -1:], attention_mask=mask, past_key_values=cache)
    assert 1 in rows, rows


# -- adapters that count tokens, on prelude and coda ----------------------------------------------------------------


def test_activated_lora_leaves_what_came_before_its_invocation():
    case = activated(TOKEN_LAYERS)
    model, ids = adapted(case), random_ids(2, 24, 5).clamp(min=8)
    ids[0, 10] = ids[1, 4] = 7
    with torch.no_grad():
        found, plain = model(ids).logits, base_model(torch.float64)(ids).logits
        for row, start in ((0, 10), (1, 4)):
            assert torch.allclose(found[row, :start], plain[row, :start], atol=1e-9)
            assert (found[row, start:] - plain[row, start:]).abs().max(-1).values.min() > 1e-3
        # From the invocation on, with a cache: generate() looks for it in the prompt.
        text = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, suppress_tokens=[2, 7])
        logits = model(text).logits
    logits[..., [2, 7]] = -torch.inf
    assert torch.equal(logits[:, 23:-1].argmax(-1), text[:, 24:])


def test_activated_lora_on_token_layers_trains_with_checkpointing():
    found = [{}, {}]
    for replayed, gradient in enumerate(found):
        model = adapted(activated(TOKEN_LAYERS)).train()
        if replayed:
            model.gradient_checkpointing_enable()
        ids = random_ids(2, 24, 5)
        ids[:, 10] = 7
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradient.update({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[1][name], gradient)


def test_plain_adapters_on_the_core_go_beside_activated_ones_elsewhere():
    case, names = activated(TOKEN_LAYERS), ["default", "plain", "__base__"]
    model, ids = adapted(case), random_ids(3, 14).clamp(min=8)
    model.add_adapter("plain", copy.deepcopy(lora(LAYERS, init_lora_weights=False).config))
    model.double()
    ids[:, 5] = 7
    with torch.no_grad():
        found = model(ids, adapter_names=names).logits
        activated_alone = model(ids[:1]).logits
        model.set_adapter("plain")
        plain_alone = model(ids[1:2]).logits
    assert torch.allclose(found[:2], torch.cat([activated_alone, plain_alone]), atol=1e-9)


def test_x_lora_weighs_the_tokens_of_prelude_and_coda(tmp_path):
    case = x_lora(TOKEN_LAYERS)
    model = adapted(case)
    expected = logits_of(model, case)
    assert_same(logits_alone(model, case), expected, case)
    with torch.no_grad():
        assert (expected - base_model(torch.float64)(IDS, attention_mask=MASK).logits)[REAL].abs().max() > 1e-3
        prefix = model(IDS[:, :9], attention_mask=MASK[:, :9]).logits
    assert torch.allclose(prefix[REAL[:, :9]], expected[:, :9][REAL[:, :9]], atol=1e-9)
    assert all(gradient.abs().max() > 0 for gradient in gradients(model, case).values())


# -- adapters that count rows ---------------------------------------------------------------------------------------

BY_ROW = {
    "LoRA": lora(LAYERS),
    "scorers and routers": lora(),
    "`modules_to_save`": lora(LAYERS, modules_to_save=["lm_head"]),
    "`trainable_token_indices`": lora(LAYERS, trainable_token_indices=[5, 6]),
    "GLoRA": TUNERS["GLoRA"],
    "RoAd": TUNERS["RoAd"],
}


def two_adapters(case: Case) -> PeftModel:
    model = adapted(case)
    model.add_adapter("other", copy.deepcopy(case.config))
    other = [parameter for name, parameter in model.named_parameters() if "other" in name]
    large_weights(torch.nn.ParameterList(other), seed=5)
    return model.double().eval()


@pytest.mark.parametrize("name", BY_ROW)
def test_each_row_has_its_own_adapter(name):
    names = ["default", "other", "__base__"]
    case = dataclasses.replace(BY_ROW[name], given={"adapter_names": names})
    model = two_adapters(case)
    expected = logits_of(model, case)
    assert_same(cached_logits(model, case), expected, case)
    for row, (adapter, ids) in enumerate(zip(names, TEXTS, strict=True)):
        with torch.no_grad():
            if adapter == "__base__":
                alone = base_model(torch.float64)(ids[None]).logits[0]
            else:
                model.set_adapter(adapter)
                alone = model(ids[None]).logits[0]
        assert torch.allclose(expected[row, REAL[row]], alone, atol=1e-9), adapter


STATIC = {"cache_implementation": "static", "disable_compile": True}


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, STATIC])
def test_each_row_generates_with_its_own_adapter(options):
    model = two_adapters(BY_ROW["scorers and routers"])
    names = ["default", "other", "__base__"]
    run = {"input_ids": IDS, "attention_mask": MASK, "adapter_names": names, "max_new_tokens": 9, "do_sample": False}
    uncached = {name: value for name, value in options.items() if name == "num_beams"}
    assert torch.equal(model.generate(**run, **options), model.generate(**run, **uncached, use_cache=False))


def test_the_core_runs_every_row_only_where_one_fills_a_chunk():
    model, rows = two_adapters(BY_ROW["LoRA"]), []
    core = model.base_model.model.model.core[0]
    core.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    cached_logits(model, Case(model, given={"adapter_names": ["default", "other", "__base__"]}))
    assert set(rows) == {3}
    by_row = len(rows)
    rows.clear()
    cached_logits(model, Case(model))
    assert len(rows) == by_row and min(rows) < 3


def test_rows_have_tasks_where_no_chunk_fills():
    case = TUNERS["Poly"]
    model = adapted(case).train()
    ids = random_ids(3, 1)
    loss = model(ids, use_cache=False, **case.given).logits.sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# -- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_are_embeddings_in_front(name, tmp_path):
    case = PROMPTS[name]
    model = adapted(case)
    base = model.get_base_model()
    ids, mask = pad_rows(TEXTS, "right")
    with torch.no_grad():
        found = model(ids, attention_mask=mask, **case.given).logits
        prompts = model.get_prompt(3, **case.given)
        for row, (prompt, logits) in enumerate(zip(prompts, found, strict=True)):
            embeddings = torch.cat([prompt, base.get_input_embeddings()(TEXTS[row])])
            expected = base(inputs_embeds=embeddings[None]).logits[0]
            assert torch.allclose(logits[: len(expected)], expected, atol=1e-9)
    given = {key: value[:1] for key, value in case.given.items()}
    one = {"input_ids": ids[:1], "max_new_tokens": 12, "do_sample": False, **given}
    generated = model.generate(**one)
    assert torch.equal(generated, model.generate(**one, use_cache=False))
    embeddings = torch.cat([prompts[0], base.get_input_embeddings()(ids[0])])[None]
    assert torch.equal(generated[:, 14:], base.generate(inputs_embeds=embeddings, max_new_tokens=12, do_sample=False))
    with pytest.raises(ValueError, match="attention_mask"):
        model(IDS, attention_mask=MASK, **case.given)  # the prompt stands before left padding
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, attention_mask=mask, **case.given).logits, found, atol=1e-7, rtol=0)
    loss = model.train()(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **case.given).loss
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


# -- the table ------------------------------------------------------------------------------------------------------

SHOWN_ALONE = {  # by a test of their own
    "one adapter per row",
    "activated LoRA on prelude and coda",
    "X-LoRA on prelude and coda",
}
WITHOUT_ROW = {  # where weights are, how they are stored and what scales them; other kinds of layers
    *("fan_in_fan_out", "runtime_config", "megatron_config", "megatron_core", "use_qalora", "qalora_group_size"),
    "arrow_config",  # whose configuration PEFT makes
}


def all_configurations() -> list[peft.PeftConfig]:
    cases = [*WORKS.values(), *PROMPTS.values(), *(case for case, _ in REFUSED.values()), activated(TOKEN_LAYERS)]
    return [case.config for case in cases if case.config is not None]


def test_every_tuner_and_option_of_peft_has_a_row():
    found = {config.peft_type for config in all_configurations()}
    assert set(peft.PeftType) - found == {peft.PeftType.XLORA, peft.PeftType.SHADOW}  # built by functions of their own
    options = {}
    for option in dataclasses.fields(peft.LoraConfig):
        default = option.default_factory() if callable(option.default_factory) else option.default
        values = [getattr(config, option.name) for config in all_configurations() if type(config) is peft.LoraConfig]
        options[option.name] = any(value not in (default, None) for value in values)
    of_any_tuner = {option.name for option in dataclasses.fields(peft.PeftConfig)}
    assert {name for name, changed in options.items() if not changed} - of_any_tuner == WITHOUT_ROW
    kinds = typing.get_args(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"])
    starts = {start.split("[")[0] for kind in kinds for start in typing.get_args(kind)}
    assert all(any(row.startswith(f"`{start}") for row in (*WORKS, *REFUSED)) for start in starts) and len(starts) > 5


def test_the_table_of_the_page_has_these_rows():
    section = (ROOT / "docs/finetuning.md").read_text(encoding="utf-8").partition("## PEFT, one by one")[2]
    found = {"works": set(), "refused": set()}
    for line in section.partition("\n## ")[0].splitlines():
        if line.startswith("|") and "---" not in line and "tuner or option" not in line:
            names, outcome, _, test = [cell.strip() for cell in line.strip("|").split("|")]
            found[outcome] |= set(names.split(", "))
            assert callable(globals()[test.strip("`")]), test
    assert found == {"works": {*WORKS, *PROMPTS, *SHOWN_ALONE}, "refused": set(REFUSED)}
