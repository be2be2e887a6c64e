"""Packed rows in a compiled forward: it looks at no position, breaks no graph, and has the eager numbers."""

import pytest
import torch
from support import random_ids, small_model
from test_packing import COLLATORS, labels_of, pack, texts_of
from test_tracing import plain_and_compiled, train
from torch._dynamo.utils import counters
from transformers import DataCollatorWithFlattening

from modeling_spiralformer.chunking_spiralformer import ChunkGrid

# Two rows of 26 tokens, cut in other places: texts of one token, of one row, and of each length from 2 to 7. Some are
# the shortest that read two chunks: no row fills more of them.
ROWS = [[[26], [1] * 26], *([[length] * (26 // length) + [1] * (26 % length)] * 2 for length in range(2, 8))]
OPTIONS = {
    "mesh": {"chunk_sizes": [4, 2, 1]},
    "greatest offsets": {
        "chunk_sizes": [5, 3],
        "chunk_offsets": [4, 2],
        "causal_shifts": [6, 2],
        "topology": "anchor",
    },
    "streams, llama": {"chunk_sizes": [6, 1], "topology": "hyper_connections", "layer_family": "llama"},
    "no loop": {"chunk_sizes": [], "num_core_layers": 0},
}
variety = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def compiled(model, **how):
    return torch.compile(model, backend="eager", **how)


def gradients(call, model, **batch) -> list[torch.Tensor]:
    """The loss and the gradient of every parameter."""
    model.zero_grad()
    loss = call(**batch, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters())]


def packed(lengths) -> dict[str, torch.Tensor]:
    ids, position_ids, _ = pack(lengths)
    return {"input_ids": ids, "position_ids": position_ids, "labels": labels_of(ids, position_ids)}


@variety
def test_one_graph_serves_every_cut(options):
    model = small_model(**options).train()
    call = compiled(model, fullgraph=True)
    for lengths in ROWS:
        batch = packed(lengths)
        for got, expected in zip(gradients(call, model, **batch), gradients(model, model, **batch), strict=True):
            assert torch.allclose(got, expected, atol=1e-11), lengths
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["flattening, all keys", "padding-free, padded"])
def test_batches_of_real_collators(name):
    model = small_model(chunk_sizes=[4, 1]).train()
    call = compiled(model, fullgraph=True)
    for lengths in ([9, 4, 17, 1, 3, 2], [5, 2, 22, 8], [2, 2, 2]):
        batch = COLLATORS[name](texts_of(lengths))
        for got, expected in zip(gradients(call, model, **batch), gradients(model, model, **batch), strict=True):
            assert torch.allclose(got, expected, atol=1e-11), lengths


def test_every_latent_is_needed(monkeypatch):
    """With one less the densest texts are cut: each of 6 tokens reads two chunks of 4."""
    count = ChunkGrid._packed_count
    model, batch = small_model(chunk_sizes=[4]), packed([[6] * 4])
    expected = model(**batch).logits
    monkeypatch.setattr(ChunkGrid, "_packed_count", lambda self, texts: count(self, texts) - (texts.on_host is None))
    got = compiled(model)(**batch, use_cache=False).logits
    assert (got - expected).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("position_ids", "boundaries", "message"),
    [
        ([0, 1, 2, 4, 5, 6], {}, "must count 0, 1, 2"),
        ([3, 4, 5, 6, 7, 8], {}, "must count 0, 1, 2"),
        ([0, 1, 2, 0, 1, 2], {"cu_seq_lens_q": torch.tensor([0, 2, 6])}, "`cu_seq_lens_q` must start a text only"),
        ([0, 1, 2, 0, 1, 2], {"seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1]])}, "`seq_idx` must start a text only"),
    ],
    ids=["a gap", "a late start", "another start", "another index"],
)
def test_the_device_refuses(position_ids, boundaries, message):
    call = compiled(small_model(), fullgraph=True)
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        call(random_ids(1, 6), position_ids=torch.tensor([position_ids]), use_cache=False, **boundaries)


@pytest.mark.parametrize("real", [[1] * 6, [0, 1, 1, 1, 1, 1]], ids=["ones", "padding"])
def test_beside_a_mask_no_row_is_packed(real):
    model, ids, mask = small_model(), random_ids(1, 6), torch.tensor([real])
    position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    call = compiled(model, fullgraph=True)
    with torch.no_grad():
        got = call(ids, mask, position_ids=position_ids, use_cache=False).logits
        expected = model(ids, mask, use_cache=False).logits
        assert (got - expected)[mask.bool()].abs().max() < 1e-11
        with pytest.raises(RuntimeError, match="`position_ids` must count the tokens of each row"):
            call(ids, mask, position_ids=torch.tensor([[0, 0, 1, 0, 1, 2]]), use_cache=False)


def test_whole_rows_with_positions_still_get_a_cache():
    model, ids = small_model(chunk_sizes=[2]), random_ids(2, 9)
    with torch.no_grad():
        outputs = compiled(model)(ids[:, :8], position_ids=torch.arange(8)[None], use_cache=True)
        after = model(ids[:, 8:], past_key_values=outputs.past_key_values).logits
        assert (after - model(ids, use_cache=False).logits[:, 8:]).abs().max() < 1e-9


def trained(folder, **options) -> torch.nn.Module:
    """A model after four steps of Trainer on packed rows, of other lengths and counts of texts in each."""
    model = small_model()
    rows = [{"input_ids": text} for text in texts_of([7, 1, 12, 4, 9, 9, 3, 2, 14, 5, 6, 8])]
    train(model, rows, folder, 3, 4, DataCollatorWithFlattening(return_flash_attn_kwargs=True), **options)
    return model


def test_trainer_compiles_packed_rows_without_a_break(tmp_path):
    plain, other = plain_and_compiled(trained, tmp_path)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2  # of the first length, and of every other
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)
