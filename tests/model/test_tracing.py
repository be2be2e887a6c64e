"""Programs traced, exported or compiled from the forward, and what static caches refuse: right, or an error."""

import pytest
import torch
from support import pad_rows, random_ids, small_model
from torch._dynamo.utils import counters
from transformers import StaticCache, Trainer, TrainingArguments, default_data_collator

OPTIONS = [
    {"chunk_sizes": [5, 3, 1]},
    {"chunk_sizes": [8, 4, 2, 1], "topology": "anchor"},
    {"chunk_sizes": [3, 1], "topology": "hyper_connections"},
    {"chunk_sizes": [], "num_core_layers": 0},
    {"chunk_sizes": [5, 1], "layer_family": "llama"},
    {"chunk_sizes": [3], "layer_family": "qwen3"},
]
schedule = pytest.mark.parametrize(
    "options", OPTIONS, ids=["loop", "powers of two", "streams", "no loop", "llama", "qwen3"]
)


class Logits(torch.nn.Module):
    """The logits of a forward without a cache, as a function of tensors alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def batch(lengths: list[int], total: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_rows([random_ids(1, n, seed=n)[0] for n in lengths], "left", total=total)


# The library builds its masks with Python values of fixed shapes, as tracing does: it warns of each.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@schedule
@pytest.mark.parametrize("example", [[12, 12], [9, 12], [5, 3]], ids=["full rows", "one padded", "all padded"])
def test_a_traced_program_is_right_on_other_padding(options, example):
    model = small_model(**options)
    with torch.no_grad():
        program = torch.jit.trace(Logits(model), batch(example), check_trace=False)
        for lengths in ([12, 12], [5, 12], [7, 2], [1, 11]):
            ids, mask = batch(lengths)
            logits = program(ids, mask)
            for row, length in enumerate(lengths):
                alone = model(ids[row : row + 1, 12 - length :], use_cache=False).logits[0]
                assert (logits[row, 12 - length :] - alone).abs().max() < 1e-9, lengths


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@schedule
@pytest.mark.parametrize("total", [11, 13, 24])
def test_a_traced_program_is_right_on_another_length(options, total):
    model = small_model(**options)
    with torch.no_grad():
        program = torch.jit.trace(Logits(model), batch([9, 12]), check_trace=False)
        ids, mask = batch([9, 11], total=total)
        logits = program(ids, mask)
        for row, length in enumerate((9, 11)):
            alone = model(ids[row : row + 1, total - length :], use_cache=False).logits[0]
            assert (logits[row, total - length :] - alone).abs().max() < 1e-9


@schedule
@pytest.mark.parametrize("given", [{}, {"use_cache": True}], ids=["default", "use_cache"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_exported_forward_has_no_cache(options, given, masked):
    """A cache given as an input is refused by torch, which names its class."""
    model = small_model(dtype=torch.float32, **options)
    inputs = {"input_ids": random_ids(1, 16), **given}
    inputs |= {"attention_mask": torch.ones(1, 16, dtype=torch.long)} if masked else {}
    with pytest.raises(ValueError, match="`use_cache` must be False, and `past_key_values`.* None"):
        torch.export.export(model, (), inputs, strict=False)


def test_a_traced_forward_has_no_cache():
    model = small_model()
    with torch.no_grad(), pytest.raises(ValueError, match="`use_cache` must be False"):
        torch.jit.trace(model, (random_ids(1, 9),), check_trace=False)


# -- static caches --------------------------------------------------------------------------------------------------


@schedule
def test_a_static_cache_is_not_cropped(options):
    """Nothing has changed after the refusal; going back by nothing is no crop."""
    model, text = small_model(**options), random_ids(2, 13)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(text[:, :10], past_key_values=cache)
        with pytest.raises(ValueError, match="must not be cropped, but got -3"):
            cache.crop(-3)
        cache.crop(0)
        assert not getattr(cache, "is_croppable", False)
        after = model(text[:, 10:], past_key_values=cache).logits
        assert (after - model(text, use_cache=False).logits[:, 10:]).abs().max() < 1e-9


@schedule
def test_assisted_decoding_with_a_static_cache_is_refused(options):
    model = small_model(**options)
    with pytest.raises(ValueError, match="(?i)assisted (generate|decoding)"):
        model.generate(
            random_ids(1, 9),
            cache_implementation="static",
            prompt_lookup_num_tokens=3,
            max_new_tokens=9,
            do_sample=False,
        )


def test_a_static_cache_is_not_rewound_by_its_count():
    """As wrappers of the library do, which write the count of every layer before each text."""
    model = small_model()
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
    with pytest.raises(ValueError, match="must not be rewound by its `cumulative_length`"):
        for layer in cache.layers:
            layer.cumulative_length.fill_(0)


# -- training that is compiled ----------------------------------------------------------------------------------------


def train(model, rows: list[dict], folder, rows_a_step: int, steps: int, data_collator, **options):
    """So many steps of the library's Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=rows_a_step,
        learning_rate=1e-2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=data_collator).train()


def trained_by_trainer(folder, **options) -> torch.nn.Module:
    """A model after three steps on right-padded rows, another padding in each."""
    model = small_model(dtype=torch.float32, chunk_sizes=[4, 2])
    ids, mask = pad_rows([random_ids(1, n, seed=n)[0] for n in (12, 7, 9, 11, 5, 12)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    rows = [
        dict(zip(("input_ids", "attention_mask", "labels"), row, strict=True))
        for row in zip(ids, mask, labels, strict=True)
    ]
    train(model, rows, folder, 2, 3, default_data_collator, **options)
    return model


def plain_and_compiled(trained, folder) -> tuple[torch.nn.Module, torch.nn.Module]:
    """What `trained` returns without and with compilation, and in `counters` what the second compiled."""
    plain = trained(folder / "plain")
    torch._dynamo.reset()
    counters.clear()
    return plain, trained(folder / "compiled", torch_compile=True, torch_compile_backend="eager")


def test_trainer_compiles_padded_rows_into_one_graph(tmp_path):
    plain, compiled = plain_and_compiled(trained_by_trainer, tmp_path)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
