"""A learning rate of their own for the routers of MeSH: in the optimiser, over the schedule, in a resumed run."""

from pathlib import Path

import pytest
import torch
from short_runs import train_shortly, write_text

from modeling_spiralformer.topology_spiralformer import SpiralFormerMeSH

MODEL = "topology=mesh,hidden_size=16,intermediate_size=32,num_attention_heads=2,chunk_sizes=[4,1]"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def run(text: str, output: Path, overrides: str = MODEL, **changes):
    return train_shortly(text, output, overrides, **{"weight_decay": "0.5", **changes})


def routers_of(model) -> dict[str, torch.Tensor]:
    names = [name for name, module in model.named_modules() if isinstance(module, SpiralFormerMeSH)]
    return {name: value for name, value in model.named_parameters() if name.startswith(tuple(names))}


def test_routers_and_nothing_else_are_in_a_group_of_their_own(text, tmp_path):
    trainer = run(text, tmp_path, router_learning_rate_ratio="0.1", max_steps="1")
    *others, group = trainer.optimizer.optimizer.param_groups
    routers = routers_of(trainer.model)
    assert len(routers) == 2 * 3 * 2  # write and read of three cycles, weights and biases
    assert {id(parameter) for parameter in group["params"]} == {id(value) for value in routers.values()}
    assert group["weight_decay"] == 0.0 and max(other["weight_decay"] for other in others) == 0.5
    trained = [id(parameter) for one in (*others, group) for parameter in one["params"]]
    assert len(trained) == len(set(trained)) == sum(1 for _ in trainer.model.parameters())
    assert group["betas"] == others[0]["betas"] == (0.9, 0.95)


def test_the_ratio_holds_over_the_whole_schedule(text, tmp_path):
    trainer = run(text, tmp_path, router_learning_rate_ratio="0.25")
    schedules, bases = trainer.lr_scheduler.lr_lambdas, trainer.lr_scheduler.base_lrs
    for step in range(5):
        rate, *_, own = (schedule(step) * base for schedule, base in zip(schedules, bases, strict=True))
        assert own == pytest.approx(0.25 * rate), step


def test_a_ratio_of_0_leaves_the_routers_alone(text, tmp_path):
    trainer = run(text, tmp_path / "still", router_learning_rate_ratio="0")
    moved = run(text, tmp_path / "moved")
    assert trainer.model.model.topology.write[0].bias.abs().max() == 0
    assert moved.model.model.topology.write[0].bias.abs().max() > 1e-3
    scale = trainer.model.model.topology.write[0].weight.std().item()  # of the start: no weight decay
    assert scale == pytest.approx(trainer.model.config.initializer_range, rel=0.3)


def test_a_resumed_run_keeps_the_group(text, tmp_path):
    whole = run(text, tmp_path / "whole", router_learning_rate_ratio="0.1")
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(text, tmp_path / "resumed", router_learning_rate_ratio="0.1", resume_from_checkpoint=checkpoint)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_model_without_routers_and_a_wrong_ratio_are_refused(text, tmp_path):
    plain = MODEL.replace("mesh", "anchor")
    with pytest.raises(ValueError, match="`router_learning_rate_ratio` must be left out where no router .* got 0.1"):
        run(text, tmp_path, plain, router_learning_rate_ratio="0.1")
    for wrong in ("-0.1", "nan"):
        with pytest.raises(ValueError, match=f"`router_learning_rate_ratio` must be .* got {wrong}"):
            run(text, tmp_path, router_learning_rate_ratio=wrong)
