"""Packed rows: documents that follow each other in a row are what each of them is alone."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from documents import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support import model_options, new_cache, random_ids, small_model
from test_modeling import variety
from transformers import DataCollatorWithFlattening
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from modeling_spiralformer import level_spiralformer
from modeling_spiralformer.chunking_spiralformer import ChunkGrid

# Rows of one length, cut in other places: documents of one token, shorter than a chunk, of whole chunks, of one row.
LENGTHS = ([1, 9, 4, 8, 2, 1, 1], [26], [3, 3, 16, 4])
BOUNDARIES = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@st.composite
def cuts(draw) -> list[list[int]]:
    """Lengths of the documents of one to three rows of one length."""
    total = draw(st.integers(2, 45))
    starts = st.lists(st.integers(1, total - 1), unique=True, max_size=10)
    rows = [[0, *sorted(draw(starts)), total] for _ in range(draw(st.integers(1, 3)))]
    return [[end - start for start, end in zip(row, row[1:], strict=False)] for row in rows]


def pack(lengths, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
    """Ids and position ids `(B, L)`, and the ids of each row's documents."""
    ids = random_ids(len(lengths), sum(lengths[0]), seed)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return ids, position_ids, [list(row.split(cut)) for row, cut in zip(ids, lengths, strict=True)]


def labels_of(ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """What collators make of packed rows: no document's first token is predicted."""
    return ids.masked_fill(position_ids == 0, -100)


@torch.no_grad()
def difference(model, lengths, seed: int = 0) -> float:
    """The largest difference between the logits of packed rows and those of the documents alone."""
    ids, position_ids, documents = pack(lengths, seed)
    packed = model(ids, position_ids=position_ids).logits
    alone = [torch.cat([model(text[None], use_cache=False).logits[0] for text in row]) for row in documents]
    return (packed - torch.stack(alone)).abs().max().item()


# -- the same function --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(options=model_options(), lengths=cuts(), seed=st.integers(0, 1000))
def test_packed_documents_are_documents_alone(options, lengths, seed):
    model = small_model(seed, **options)
    assert difference(model, lengths, seed) < 1e-9
    model.set_attn_implementation("eager")
    assert difference(model, lengths, seed) < 1e-6


@variety
def test_documents_of_every_length_in_every_place(options):
    model = small_model(**options)
    assert difference(model, LENGTHS) < 1e-9
    for first in range(1, 25):
        assert difference(model, [[first, 25 - first]]) < 1e-9, first


@pytest.mark.parametrize("lengths", [[[1] * 6], [[2, 1, 2], [1, 2, 2]], [[2, 2, 1], [5]]])
def test_documents_too_short_for_a_chunk(lengths):
    model = small_model(chunk_sizes=[16, 3], chunk_offsets=[0, 0])
    assert difference(model, lengths) < 1e-9


def test_one_row_of_positions_serves_every_row():
    model = small_model()
    ids, position_ids, _ = pack([[5, 1, 8]] * 3)
    with torch.no_grad():
        assert torch.equal(
            model(ids, position_ids=position_ids[:1]).logits, model(ids, position_ids=position_ids).logits
        )


def test_a_document_does_not_see_what_stands_before_it():
    """Not by a rounding error, and not where the text before is made of huge numbers."""
    model = small_model()
    _, position_ids, _ = pack([[11, 14]])
    embeddings = torch.randn(1, 25, 16, dtype=torch.float64, requires_grad=True)
    logits = model(inputs_embeds=embeddings, position_ids=position_ids).logits
    (gradient,) = torch.autograd.grad(logits[0, 11:].square().sum(), embeddings)
    assert gradient[0, :11].eq(0).all() and gradient[0, 11:].ne(0).all()


# -- training -----------------------------------------------------------------------------------------------------


@variety
@pytest.mark.parametrize("lengths", [LENGTHS, [[1, 1, 2]]], ids=["long", "short"])
def test_gradients_are_those_of_the_documents(options, lengths):
    packed = small_model(**options).train()
    alone, replayed = copy.deepcopy(packed), copy.deepcopy(packed)
    replayed.gradient_checkpointing_enable()
    ids, position_ids, documents = pack(lengths)
    labels = labels_of(ids, position_ids)
    texts = [text for row in documents for text in row if len(text) > 1]
    count = sum(len(text) - 1 for text in texts)
    for text in texts:
        alone(text[None], labels=text[None], num_items_in_batch=count).loss.backward()
    for model in (packed, replayed):
        outputs = model(ids, position_ids=position_ids, labels=labels)
        assert outputs.past_key_values is None
        outputs.loss.backward()
    for (name, expected), one, two in zip(
        alone.named_parameters(), packed.parameters(), replayed.parameters(), strict=True
    ):
        assert torch.allclose(one.grad, expected.grad, atol=1e-12), name
        assert torch.allclose(two.grad, one.grad, atol=1e-12), name


def flattening(texts, **options) -> dict:
    return DataCollatorWithFlattening(**options)([{"input_ids": text} for text in texts])


def padding_free(texts, **options) -> dict:
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, **options)
    return collator([{"input_ids": text} for text in texts])


COLLATORS = {
    "flattening": flattening,
    "flattening, all keys": lambda texts: flattening(texts, return_flash_attn_kwargs=True, return_seq_idx=True),
    "padding-free": padding_free,
    "padding-free, padded": lambda texts: padding_free(texts, pad_to_multiple_of=16),  # its pads have position 0
}


def loss_alone(model, texts) -> torch.Tensor:
    """The mean loss per predicted token of texts (lists of ids), one forward each."""
    texts = [text for text in texts if len(text) > 1]  # one token alone predicts nothing
    with torch.no_grad():
        losses = [model(torch.tensor([text]), labels=torch.tensor([text])).loss * (len(text) - 1) for text in texts]
    return sum(losses) / sum(len(text) - 1 for text in texts)


def texts_of(lengths, seed: int = 0) -> list[list[int]]:
    return [text.tolist() for text in random_ids(1, sum(lengths), seed)[0].split(lengths)]


@pytest.mark.parametrize("collate", COLLATORS.values(), ids=COLLATORS.keys())
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_batches_of_real_collators(collate, implementation):
    texts = texts_of([9, 4, 17, 1, 3, 2])
    model = small_model(implementation=implementation)
    batch = collate(texts)
    with torch.no_grad():
        loss = model(**batch).loss
    assert abs(loss - loss_alone(model, texts)) < (1e-9 if implementation == "sdpa" else 1e-6)


PACKED, PADDING_FREE = {"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}


@pytest.mark.parametrize(
    ("settings", "family"),
    [(PACKED, "gpt_neox"), (PADDING_FREE, "gpt_neox"), (PACKED, "llama"), (PADDING_FREE, "qwen3")],
)
def test_sft_trainer(settings, family, tmp_path):
    from transformers import AutoTokenizer

    texts = texts_of([9, 4, 17, 13, 2, 21])
    model = small_model(dtype=torch.float32, layer_family=family).train()
    expected = loss_alone(model, texts)
    arguments = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=6,
        max_steps=1,
        learning_rate=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=True,
        dataset_num_proc=None,
        **settings,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": texts}),
        processing_class=AutoTokenizer.from_pretrained(ROOT / "tokenization"),
    )
    (batch,) = trainer.get_train_dataloader()
    assert batch["position_ids"].eq(0).sum() == len(texts) and batch["input_ids"].shape == (1, 66)
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - expected) < 1e-4


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ([0, 1, 2, 1, 2, 3], r"count 0, 1, 2.* row 0 has \[2, 1\] up to column 3"),
        ([5, 6, 7, 0, 1, 2], r"row 0 has \[5\] up to column 0"),
        ([0, 1, 2, 0, 1, 3], r"row 0 has \[1, 3\] up to column 5"),
        ([0, 1, 0, 1, 0, -1], r"row 0 has \[0, -1\] up to column 5"),
        ([5, 4, 3, 2, 1, 0], r"row 0 has \[5\]"),
        ([1, 2, 1, 2, 1, 2], r"row 0 has \[1\]"),
    ],
)
def test_documents_that_do_not_count_from_zero_are_refused(positions, message):
    with pytest.raises(ValueError, match=message):
        small_model()(random_ids(1, 6), position_ids=torch.tensor([positions]))


def test_the_row_at_fault_is_named():
    positions = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1], [2, 3, 4, 5]])
    with pytest.raises(ValueError, match="row 2"):
        small_model()(random_ids(3, 4), position_ids=positions)


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_packed_rows_with_a_cache_are_refused(static, begun):
    model, ids = small_model(), random_ids(1, 12)
    cache = new_cache(model, static, 20)
    with torch.no_grad():
        if begun:
            model(ids[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match="`past_key_values`.* must be None"):
            model(ids[:, 6:], past_key_values=cache, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        after = model(ids[:, 6:], past_key_values=cache).logits
        expected = model(ids if begun else ids[:, 6:], use_cache=False).logits[:, -6:]
    assert (after - expected).abs().max() < 1e-9


def test_padding_comes_as_documents_and_not_as_a_mask():
    model, ids = small_model(), random_ids(1, 6)
    positions = torch.tensor([[0, 1, 2, 0, 0, 0]])
    with pytest.raises(ValueError, match="`attention_mask` must be all ones"):
        model(ids, position_ids=positions, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, position_ids=positions, attention_mask=torch.ones(1, 7))
    with torch.no_grad():
        ones = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
        assert torch.equal(ones, model(ids, position_ids=positions).logits)


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"])
def test_boundaries_without_position_ids_are_refused(key):
    batch = flattening(texts_of([3, 4]), return_flash_attn_kwargs=True, return_seq_idx=True)
    assert batch.keys() == {"input_ids", "labels", "position_ids"} | BOUNDARIES
    with pytest.raises(ValueError, match=f"`position_ids` .* `{key}`"):
        small_model()(batch["input_ids"], **{key: batch[key]})


# -- these tests can fail -----------------------------------------------------------------------------------------


def shifted_grid(method: str, change):
    original = getattr(ChunkGrid, method)
    return lambda self, *given: change(original(self, *given))


DELIBERATE_BUGS = {
    "latents attend across documents": ("packed_filling", lambda f: replace(f, packed=False)),
    "latent positions go on": (
        "packed_filling",
        lambda f: replace(f, position_ids=torch.arange(f.count).expand_as(f.position_ids)),
    ),
    "a first chunk reaches back into the document before": ("packed_filling", lambda f: replace(f, present=None)),
    "chunks are one token late": (
        "packed_filling",
        lambda f: replace(f, member_columns=(f.member_columns - 1).clamp(min=0)),
    ),
    "a token reads what the document before left": ("packed_reads", lambda r: (r[0], torch.ones_like(r[1]))),
    "a token reads the place beside its own": ("packed_reads", lambda r: (r[0] + 1, r[1])),
}


@pytest.mark.parametrize(("method", "change"), DELIBERATE_BUGS.values(), ids=DELIBERATE_BUGS.keys())
def test_the_comparison_catches(method, change, monkeypatch):
    model = small_model()
    assert difference(model, LENGTHS) < 1e-9
    monkeypatch.setattr(ChunkGrid, method, shifted_grid(method, change))
    assert difference(model, LENGTHS) > 1e-6


def test_the_comparison_catches_a_level_that_does_not_know_of_documents(monkeypatch):
    monkeypatch.setattr(
        "modeling_spiralformer.modeling_spiralformer.PackedState",
        lambda grid, rows, texts: level_spiralformer.ResolutionState(grid, rows, cached=False),
    )
    assert difference(small_model(), LENGTHS) > 1e-6


def test_the_comparison_catches_token_layers_that_attend_across_documents(monkeypatch):
    from modeling_spiralformer.modeling_spiralformer import SpiralFormerModel

    original = SpiralFormerModel._token_mask
    monkeypatch.setattr(
        SpiralFormerModel, "_token_mask", lambda self, batch, *rest: original(self, replace(batch, texts=None), *rest)
    )
    assert difference(small_model(), LENGTHS) > 1e-6
