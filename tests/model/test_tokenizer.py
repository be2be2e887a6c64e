"""The default tokenizer: loads without custom code, gives back every Unicode text, is what its script trains."""

import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import small_config
from transformers import AutoTokenizer

import train_tokenizer as train_tokenizer_command
from modeling_spiralformer import SpiralFormerForCausalLM
from workshop.tokenizers import save_tokenizer, train_tokenizer

TOKENIZER = AutoTokenizer.from_pretrained("tokenization")


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_every_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text or any(
        special in text for special in TOKENIZER.all_special_tokens
    )


@pytest.mark.parametrize(
    "text",
    [
        "\x00\x01\x7f\x80",
        " leading,  double  and trailing ",
        "\r\n\t\v\u2028",
        "e\u0301\u0323 versus \u00e9",
        "\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea",
        "\u05d0\u202e\u0627",
        "don't . , ! [CLS]",
        "".join(chr(plane * 0x10000 + 0xAB) for plane in range(17)),
    ],
)
def test_awkward_texts_come_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    decomposed = unicodedata.normalize("NFD", text)
    assert TOKENIZER.decode(TOKENIZER.encode(decomposed)) == decomposed


def test_special_tokens_are_distinct_and_agree_with_tiny():
    ids = (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert len(set(ids)) == 3 and len(TOKENIZER) == 4096
    tiny = small_config().from_pretrained("configuration/tiny")
    assert ids == (tiny.pad_token_id, tiny.bos_token_id, tiny.eos_token_id) and tiny.vocab_size == 4096
    assert TOKENIZER.encode("a") == TOKENIZER.encode("a", add_special_tokens=False)


def test_it_loads_from_a_saved_checkpoint_without_the_package(tmp_path):
    SpiralFormerForCausalLM(small_config()).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("def f():") == TOKENIZER.encode("def f():")
    # A saved model brings its code along; without this answer the library would ask whether to run it.
    load = f"AutoTokenizer.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)"
    code = f"from transformers import AutoTokenizer; print({load}.encode('ab'))"
    printed = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert printed.stdout.strip() == str(TOKENIZER.encode("ab"))


def test_training_is_deterministic_and_refuses_what_it_cannot_give(tmp_path):
    texts = [f"def function_{i}(value):\n    return value + {i}\n" for i in range(200)]
    for name in ("one", "two"):
        save_tokenizer(train_tokenizer(texts, 300), tmp_path / name, 64)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(texts, 100)
    with pytest.raises(ValueError, match="vocab_size"):
        train_tokenizer(["a"], 3000)


def test_a_tokenizer_declares_a_length_of_one_token_or_more():
    with pytest.raises(ValueError, match="`model_max_length` must be an integer >= 1, but got 0"):
        train_tokenizer_command.TokenizerArguments(model_max_length=0)


def test_a_tokenizer_of_a_file(tmp_path):
    text = "".join(f"def function_{i}(value):\n    return value + {i}\n" for i in range(200))
    (tmp_path / "text.txt").write_text(text)
    arguments = {"train_file": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "own"), "vocab_size": 300}
    train_tokenizer_command.main(train_tokenizer_command.TokenizerArguments(**arguments))
    save_tokenizer(train_tokenizer([text], 300), tmp_path / "expected", 1024)
    assert (tmp_path / "own/tokenizer.json").read_bytes() == (tmp_path / "expected/tokenizer.json").read_bytes()
