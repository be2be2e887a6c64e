"""Tensor parallelism by the library: two processes, each with half of the heads, answer as one does."""

from pathlib import Path

import pytest
import tensor_parallel
import torch
from distributed_runs import in_processes
from support import make_exact, random_ids, small_config, small_model
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from modeling_spiralformer import SpiralFormerForCausalLM
from modeling_spiralformer.layers_spiralformer import FAMILIES


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the models are, and the views that two processes saved, `name, view`."""
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def in_two(folder) -> dict[str, dict]:
    """The answers of two processes by model."""
    runs = []
    for name in tensor_parallel.MODELS:
        tensor_parallel.make_model(name).save_pretrained(folder / name)
        how = {"tp_plan": "auto"} if name == "plain" else {"distributed_config": DistributedConfig(tp_size=2)}
        runs.append({"name": name, "folder": str(folder / name), "result": str(folder / f"{name}.pt"), "how": how})
    in_processes(2, runs, work=tensor_parallel.answer)
    return {name: torch.load(folder / f"{name}.pt") for name in tensor_parallel.MODELS}


@pytest.mark.processes
@pytest.mark.parametrize("name", tensor_parallel.MODELS)
def test_two_processes_answer_as_one(name, in_two):
    model = tensor_parallel.make_model(name)
    found, expected = in_two[name], tensor_parallel.all_answers(model, name)
    asked = {"greedy, tokens", "beams, logits", "gradient of model.embed_tokens.weight"}
    assert asked | {f"view, {what}" for what in asked if name in tensor_parallel.PARTS} < expected.keys()
    for what, value in expected.items():
        assert found[what].shape == value.shape, what
        bound = 1e-6 if value.dtype == torch.float32 else 1e-9  # `generate()` returns its logits in float32
        assert (found[what] - value).abs().max() < bound, what


@pytest.mark.processes
@pytest.mark.parametrize("name", tensor_parallel.PARTS)
@torch.no_grad()
def test_a_view_is_as_parallel_as_its_model_and_is_saved_whole(name, in_two, folder):
    assert in_two[name]["processes of the view"] == 2
    assert in_two[name]["tp_plan of the view"] == in_two[name]["tp_plan"]
    saved = make_exact(AutoModelForCausalLM.from_pretrained(folder / f"{name}, view"))
    view = tensor_parallel.make_model(name).with_schedule(tensor_parallel.PARTS[name])
    assert saved.config.chunk_sizes == tensor_parallel.PARTS[name]
    ids = random_ids(2, 17)
    assert (saved(ids).logits - view(ids).logits).abs().max() < 1e-9


@pytest.mark.processes
@pytest.mark.parametrize("name", tensor_parallel.MODELS)
def test_a_process_holds_half_of_every_layer(name, in_two):
    """What is no part of a plan is whole: norms, scorers, allocators and routers, which see whole states."""
    model = tensor_parallel.make_model(name)
    plan, held = in_two[name]["tp_plan"], in_two[name]["weights"]
    assert held.keys() == {parameter for parameter, _ in model.named_parameters()}
    for parameter, weight in model.named_parameters():
        module, _, kind = parameter.rpartition(".")
        style = plan.get(".".join("*" if part.isdecimal() else part for part in module.split(".")), "")
        is_halved = "colwise" in style or "embedding" in style or ("rowwise" in style and kind == "weight")
        halves = weight.numel() - weight.numel() // 2  # of an odd vocabulary the first process has one more
        assert held[parameter] == (weight.numel() if not is_halved else pytest.approx(halves, abs=32)), parameter
        of_layer = not module.startswith("model.topology") and any(
            part in module for part in ("proj", "dense", "query_key_value")
        )
        assert is_halved or kind == "bias" or not of_layer


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_names_every_matrix_of_a_layer_and_no_part_that_is_missing(family):
    model = small_model(layer_family=family, num_coda_layers=0)
    names = {name for name, _ in model.named_modules()}
    plan = {rule.replace("*", "0"): style for rule, style in model.tp_plan.items()}
    assert plan.keys() <= names and not any(".coda." in rule for rule in plan)
    matrices = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".0." in name
    }
    of_layers = {name for name in matrices if name.startswith(("model.prelude.0.", "model.core.0."))}
    assert of_layers <= plan.keys() and len(of_layers) >= 8


def test_a_plan_of_ones_own_is_that_of_the_views():
    model = small_model()
    model.tp_plan = {"lm_head": "colwise_gather_output"}
    assert model.with_schedule([1]).tp_plan == {"lm_head": "colwise_gather_output"}


def test_a_rule_of_ones_own_goes_along_and_is_not_saved(tmp_path):
    """The oldest release adds one for tied embeddings itself."""
    config = small_config(tie_word_embeddings=True)
    config.base_model_tp_plan = config.base_model_tp_plan | {"norm": "replicated_with_grad_allreduce"}
    config.num_coda_layers = 0
    plan = config.base_model_tp_plan
    assert plan["norm"] == "replicated_with_grad_allreduce" and "prelude.*.attention.dense" in plan
    assert not any(rule.startswith("coda") for rule in plan)
    assert SpiralFormerForCausalLM(config).model.tp_plan["norm"] == "replicated_with_grad_allreduce"
    config.save_pretrained(tmp_path)
    assert "tp_plan" not in (tmp_path / "config.json").read_text()


def test_heads_that_the_processes_cannot_share_are_refused():
    model = small_model(layer_family="llama", num_attention_heads=4, num_key_value_heads=1)
    model.config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(ValueError, match="`tp_size` must divide the 1 heads of keys, but got 2"):
        model(random_ids(1, 9), past_key_values=DynamicCache(config=model.config))
