"""The run of a million tokens, shortened: past `max_position_embeddings`, exact, and it would see a fault."""

import itertools

import long_run
import pytest
from support import small_model


def test_texts_go_past_the_longest_that_a_model_claims():
    found = long_run.run(1, columns=long_run.LONGEST + 37)
    assert found["texts"] == 2 and found["tokens"] == 2 * long_run.ROWS * (long_run.LONGEST + 37)
    assert found["worst difference"] < long_run.TOLERANCE


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_that_is_off_is_seen(static):
    model = small_model(chunk_sizes=[4, 1], num_core_layers=1)
    assert long_run.decode_text(model, 0, 60, static) < long_run.TOLERANCE
    calls = itertools.count()

    def change(module, args, kwargs):
        """Before the tenth step one key of the first layer is another."""
        if next(calls) == 10:
            kwargs["past_key_values"].layers[0].keys[:, :, 43] += 1  # a column that is real in every row

    model.register_forward_pre_hook(change, with_kwargs=True)
    assert long_run.decode_text(model, 0, 60, static) > 1e-6


@pytest.mark.parametrize(("figures", "message"), [({"worst difference": 1e-3}, "off by"), ({"most": 90}, "grown by")])
def test_the_command_fails_where_it_should(figures, message, monkeypatch, capsys):
    most = figures.pop("most", 1) * 2**20
    found = {"worst difference": 0.0, "memory after the first two texts": 0, "most memory after that": most} | figures
    monkeypatch.setattr(long_run, "run", lambda tokens: found)
    with pytest.raises(SystemExit, match=message):
        long_run.main([])
    monkeypatch.setattr(long_run, "run", lambda tokens: found | {"worst difference": 0.0, "most memory after that": 0})
    long_run.main(["--tokens", "5"])
