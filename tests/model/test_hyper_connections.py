"""Hyper-connections (Hyperloop): the streams against their equations, their parameters and how they start."""

import json
import logging

import pytest
import torch
from reference import reference_logits
from support import random_ids, seeded, small_config, small_model

from modeling_spiralformer import SpiralFormerConfig, SpiralFormerForCausalLM
from modeling_spiralformer.topology_spiralformer import SpiralFormerConnection, SpiralFormerHyperConnections

STREAMS = {"topology": "hyper_connections"}
STARTS = {"blend": (0.5, 0.5), "replace": (0.01, 0.99), "zero": (0.5, 1.0)}


@torch.no_grad()
def logits(model, ids) -> torch.Tensor:
    return model(ids, use_cache=False).logits


# -- the function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("streams", range(2, 9))
def test_any_number_of_streams_at_any_start_is_the_reference(streams, start):
    """With the weights of a new model, whose gates differ by the start alone."""
    options = {"chunk_sizes": [3, 1, 1], "num_streams": streams, "gate_start": start, "initializer_range": 0.15}
    torch.manual_seed(streams)
    model = SpiralFormerForCausalLM(small_config(**STREAMS, **options)).double().eval()
    ids = random_ids(1, 17)
    expected = reference_logits(model.config, model.state_dict(), ids[0])
    assert (logits(model, ids)[0] - expected).abs().max() < 1e-9


@torch.no_grad()
def test_a_new_model_joins_states_as_its_start_says():
    """Reads the mean, or the sum of half of each; what is kept and written are the shares of the start."""
    v, update = torch.randn(2, 1, 5, 16, generator=seeded(0))
    for start, (keep, write) in STARTS.items():
        config = small_config(**STREAMS, chunk_sizes=[2, 1], num_streams=4, gate_start=start)
        topology = SpiralFormerForCausalLM(config).model.topology
        for connection in topology.connections:  # exactly, without the small numbers that the streams add
            for gate in (connection.read, connection.keep, connection.write):
                gate.scale.zero_()
        first, carrier = topology(v, None)
        factor = 2.0 if start == "zero" else 1.0
        assert torch.allclose(first, factor * v, atol=1e-5), start
        second, carrier = topology(update, first, carrier)
        assert torch.allclose(second, factor * (keep * v + write * update), atol=1e-5), start
        last, _ = topology(update, second, carrier)
        stream = keep * (keep * v + write * update) + write * update
        assert torch.allclose(last, stream, atol=1e-5), start


@torch.no_grad()
def test_a_token_that_no_chunk_has_reached_gets_the_loop_vector():
    """Its update is 0, and its streams are r Y + q e."""
    model = small_model(**STREAMS, chunk_sizes=[8, 1], num_streams=3).model
    seen = []
    model.topology.register_forward_hook(lambda module, inputs, outputs: seen.append((inputs, outputs)))
    model(random_ids(1, 20), use_cache=False)
    (update, _, before), (_, after) = seen[1]
    assert update[0, :3].eq(0).all() and update[0, 11].ne(0).all()  # g - w - 1 + s: the first that reads
    keep, write, loop_vector = before.writing
    expected = keep * before.content + write * loop_vector
    assert torch.equal(loop_vector, model.topology.connections[0].loop_vector)
    assert (after.content - expected)[0, :3].abs().max() < 1e-12
    assert model.topology.connections[0].loop_vector.abs().max() > 0.1


# -- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams, width, iterations", [(4, 16, 3), (2, 32, 1), (8, 16, 2)])
def test_parameters_for_each_iteration(streams, width, iterations):
    """3 n^2 D + 3 n + 3 + D + n D, which the paper's sizes are counted with, and none besides."""
    options = {"num_streams": streams, "hidden_size": width, "chunk_sizes": [1] * iterations}
    with_streams = SpiralFormerForCausalLM(small_config(**STREAMS, **options)).num_parameters()
    looped = SpiralFormerForCausalLM(
        small_config(topology="base", hidden_size=width, chunk_sizes=[1] * iterations)
    ).num_parameters()
    each = 3 * streams**2 * width + 3 * streams + 3 + width + streams * width
    assert with_streams - looped == iterations * each


def test_a_new_model_starts_as_the_table_of_the_docs_says():
    torch.manual_seed(0)
    model = SpiralFormerForCausalLM(small_config(**STREAMS, hidden_size=64, initializer_range=0.03))
    for connection in model.model.topology.connections:
        assert connection.loop_vector.eq(0).all() and connection.norm.weight.eq(1).all()
        for gate, share in ((connection.read, 0.25), (connection.keep, 0.5), (connection.write, 0.25)):
            assert gate.scale.item() == pytest.approx(0.01)
            assert gate.bias.sigmoid().tolist() == pytest.approx([share] * 4)
            assert gate.projection.weight.std().item() == pytest.approx(0.03, rel=0.1)


def test_a_checkpoint_without_gates_gets_those_of_its_start(tmp_path, caplog):
    """From a looped model: what is missing starts as in a new model, whatever was in memory."""
    small_model(dtype=torch.float32, topology="base").save_pretrained(tmp_path)
    model = SpiralFormerForCausalLM.from_pretrained(tmp_path, **STREAMS, num_streams=3, gate_start="replace")
    for connection in model.model.topology.connections:
        assert connection.keep.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
        assert connection.write.bias.sigmoid().tolist() == pytest.approx([0.495] * 3)
        assert connection.loop_vector.eq(0).all() and connection.read.scale.item() == pytest.approx(0.01)


@pytest.mark.parametrize("chunk_sizes", [[3, 1], [4]], ids=str)
def test_every_parameter_learns_in_every_step(chunk_sizes):
    """Also of a text that is too short for a chunk; all but the loop vector and gates stay in the graph."""
    model = small_model(**STREAMS, chunk_sizes=chunk_sizes).train()
    ids = random_ids(2, 2)
    model(ids, labels=ids).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(c.loop_vector.grad.ne(0).any() for c in model.model.topology.connections)


# -- the configuration --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"topology": "base"}, {"chunk_sizes": [], "num_core_layers": 0}], ids=str)
def test_a_model_without_streams_does_not_save_their_fields(options, tmp_path, caplog):
    small_config(**options).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "num_streams" not in saved and "gate_start" not in saved and "num_memory_slots" in saved
    with caplog.at_level(logging.WARNING, "transformers"):
        assert SpiralFormerConfig.from_pretrained(tmp_path).num_streams is None
    assert caplog.messages == []


def test_a_model_with_streams_saves_their_fields_and_misses_them(tmp_path, caplog):
    small_config(**STREAMS, num_streams=5, gate_start="zero").save_pretrained(tmp_path)
    loaded = SpiralFormerConfig.from_pretrained(tmp_path)
    assert (loaded.num_streams, loaded.gate_start) == (5, "zero")
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["num_streams"], saved["gate_start"]
    assert SpiralFormerConfig.find_faults(saved) == [
        "`num_streams` is missing and takes its default.",
        "`gate_start` is missing and takes its default.",
    ]
    default = SpiralFormerConfig(**STREAMS)
    assert (default.resolved_num_streams, default.resolved_gate_start) == (4, "blend")


# -- the tests can fail -------------------------------------------------------------------------------------------


def read_before_write(self, new, state, carrier=None):
    """h_(t+1) is read from the streams as they were."""
    if carrier is None:
        return FORWARD(self, new, state)
    hidden, _ = self._read(carrier.content, carrier.iteration + 1)
    return hidden, FORWARD(self, new, state, carrier)[1]


def gates_of_what_was_written(self, new, state, carrier=None):
    """Keep and write look at the state that the iteration made."""
    if carrier is not None:
        made = state.unsqueeze(-2).expand_as(carrier.content)
        _, *writing = self.connections[carrier.iteration](made)
        carrier = carrier._replace(writing=tuple(writing))
    return FORWARD(self, new, state, carrier)


def gates_of_another_iteration(self, new, state, carrier=None):
    """Every iteration reads, keeps and writes by the gates of the first."""
    connections = self.connections
    self.connections = torch.nn.ModuleList([connections[0]] * len(connections))
    try:
        return FORWARD(self, new, state, carrier)
    finally:
        self.connections = connections


def streams_mixed_up(self, new, state, carrier=None):
    """A stream gets the gates of its neighbour."""
    if carrier is not None:
        keep, *others = carrier.writing
        carrier = carrier._replace(writing=(keep.roll(1, dims=-2), *others))
    return FORWARD(self, new, state, carrier)


def loop_vector_left_out(self, new, state, carrier=None):
    if carrier is not None:
        new = new - self.connections[carrier.iteration].loop_vector
    return FORWARD(self, new, state, carrier)


def loop_vector_of_reached_tokens_only(self, new, state, carrier=None):
    """Where the update is 0, e is left out."""
    if carrier is not None:
        reached = new.ne(0).any(dim=-1, keepdim=True)
        new = new - (~reached) * self.connections[carrier.iteration].loop_vector
    return FORWARD(self, new, state, carrier)


def mean_forgotten(self, new, state, carrier=None):
    """The coda gets the first stream."""
    hidden, carrier = FORWARD(self, new, state, carrier)
    return (hidden if carrier.writing else carrier.content[..., 0, :]), carrier


def write_is_not_doubled(self, streams):
    read, keep, write, loop_vector = GATES(self, streams)
    return read, keep, write / 2, loop_vector


def no_norm(self, streams):
    flat = streams.flatten(-2)
    read, keep, write = (gate(flat * self.norm.weight).unsqueeze(-1) for gate in (self.read, self.keep, self.write))
    return read, keep, 2 * write, self.loop_vector


FORWARD, GATES = SpiralFormerHyperConnections.forward, SpiralFormerConnection.forward
BUGS = {
    bug.__name__: (owner, bug)
    for owner, bugs in {
        SpiralFormerHyperConnections: (
            *(read_before_write, gates_of_what_was_written, gates_of_another_iteration, streams_mixed_up),
            *(loop_vector_left_out, loop_vector_of_reached_tokens_only, mean_forgotten),
        ),
        SpiralFormerConnection: (write_is_not_doubled, no_norm),
    }.items()
    for bug in bugs
}


@pytest.mark.parametrize(("owner", "bug"), BUGS.values(), ids=BUGS)
def test_a_deliberate_bug_is_caught(owner, bug, monkeypatch):
    model, ids = small_model(**STREAMS, chunk_sizes=[5, 1]), random_ids(1, 17)
    expected = reference_logits(model.config, model.state_dict(), ids[0])
    assert (logits(model, ids)[0] - expected).abs().max() < 1e-9
    monkeypatch.setattr(owner, "forward", bug)
    assert (logits(model, ids)[0] - expected).abs().max() > 1e-7
