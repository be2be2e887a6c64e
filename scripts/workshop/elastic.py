"""Training with schedules drawn per batch: a `Trainer` whose steps run views of the model, and that evaluates each."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_spiralformer import SpiralFormerConfig
from modeling_spiralformer.elastic_spiralformer import choose_iterations
from workshop.router_rate import RouterRateTrainer
from workshop.training_arguments import read_schedule


def check_schedules(schedules: list[str] | None, config: PreTrainedConfig) -> None:
    """Raises ValueError, naming the option, for a schedule that is no part of the model's."""
    if schedules and not isinstance(config, SpiralFormerConfig):
        raise ValueError(
            f'`schedules` must be left out with a model of model_type "{config.model_type}", which has none, but got '
            f"{schedules}."
        )
    for schedule in schedules or []:
        try:
            choose_iterations(config, read_schedule(schedule))
        except ValueError as error:
            raise ValueError(
                f"`schedules` must each hold chunk sizes of the model's schedule {list(config.chunk_sizes)}, in that "
                f"order, but got {schedule!r}."
            ) from error


def name_of(chunk_sizes: list[int]) -> str:
    """How a schedule is called in the names of figures: "8-4" for [8, 4]."""
    return "-".join(map(str, chunk_sizes))


@contextlib.contextmanager
def running(model: PreTrainedModel, view: PreTrainedModel) -> Iterator[None]:
    """Within it `model`, and everything that wraps it, runs the schedule of its view."""
    model = getattr(model, "get_base_model", lambda: model)()  # of PEFT's, which wraps the model itself
    body = model.base_model
    setattr(model, model.base_model_prefix, view.base_model)
    try:
        yield
    finally:
        setattr(model, model.base_model_prefix, body)


class ElasticTrainer(RouterRateTrainer):
    """
    A `Trainer` that draws a schedule for each batch of each step, the same in all processes and after a resumption,
    and reports the figures of each schedule: eval_loss of the model's own, eval_8-4_loss and so on.

    Args:
        schedules: what is drawn from, each as likely as it stands there; None to train the model as it is.
    """

    def __init__(self, *args, schedules: list[str] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.views: list[PreTrainedModel] = []
        made: dict[tuple[int, ...], PreTrainedModel] = {}
        for schedule in schedules or []:
            chunk_sizes = tuple(read_schedule(schedule))
            if chunk_sizes not in made:
                made[chunk_sizes] = self._make_view(list(chunk_sizes))
            self.views.append(made[chunk_sizes])
        self.drawn: PreTrainedModel | None = None
        self.step, self.part = -1, 0

    def _make_view(self, chunk_sizes: list[int]) -> PreTrainedModel:
        """A view whose states depend on every parameter of the model: those it lacks get a gradient of zero.

        Data-parallel training waits for a gradient of every parameter in every step; an optimizer treats a parameter
        without one otherwise than one whose gradient is zero, so that a single process has to do the same.
        """
        view = self.model.with_schedule(chunk_sizes)
        held = set(view.parameters())
        left_out = [weight for weight in self.model.parameters() if weight not in held]

        def take_part(body: nn.Module, args: tuple, output):
            if body.emb_dropout.training and left_out:
                zeros = torch.stack([weight.flatten()[:0].sum() for weight in left_out])
                output.last_hidden_state = output.last_hidden_state + zeros.sum()
            return output

        view.base_model.register_forward_hook(take_part)
        return view

    def draw(self) -> PreTrainedModel:
        """The view for the next batch: by seed, step, and the number of the batch in the step."""
        step = self.state.global_step
        self.part = self.part + 1 if step == self.step else 0
        self.step = step
        generator = np.random.default_rng([self.args.seed, step, self.part])
        return self.views[generator.integers(len(self.views))]

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As the library's, with the schedule that is drawn for the batch."""
        if not self.views:
            return super().training_step(*args, **kwargs)
        self.drawn = self.draw()
        with running(self.accelerator.unwrap_model(self.model), self.drawn):
            return super().training_step(*args, **kwargs)

    def floating_point_ops(self, inputs: dict) -> int:
        """As for the model, for the schedule that was drawn."""
        model, self.model = self.model, self.drawn or self.model
        try:
            return super().floating_point_ops(inputs)
        finally:
            self.model = model

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As the library's, then once more for each schedule that is drawn and not the model's own."""
        given = {"eval_dataset": eval_dataset, "ignore_keys": ignore_keys}
        metrics = super().evaluate(**given, metric_key_prefix=metric_key_prefix)
        model = self.accelerator.unwrap_model(self.model)
        for view in dict.fromkeys(self.views):
            if view.config.chunk_sizes != model.config.chunk_sizes:
                prefix = f"{metric_key_prefix}_{name_of(view.config.chunk_sizes)}"
                with running(model, view):
                    metrics |= super().evaluate(**given, metric_key_prefix=prefix)
        return metrics
