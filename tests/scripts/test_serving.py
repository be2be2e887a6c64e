"""Pipelines give what the model gives alone; `transformers serve` answers over HTTP; other engines are kept away."""

import asyncio
import contextlib
import functools
import json
import re
import shlex
import threading
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
import transformers
from batched_requests import alone, make_model, settings
from datasets import Dataset
from documents import ROOT, blocks, commands
from fastapi import HTTPException
from http_server import ask, save_served, serving
from packaging import version
from support import large_weights, make_exact, random_ids, small_config, small_model
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithPadding,
    GenerationConfig,
    TextIteratorStreamer,
    TextStreamer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import serve
from modeling_spiralformer import SpiralFormerForCausalLM, SpiralFormerForSequenceClassification, SpiralFormerModel
from workshop.serving import RequestBatching

PROMPTS = ["def read(path):", "x", "class Tree:\n    def __init__(self, left, right", "import os, sys", "é = 3"]
NEW = 11
# The page's own chat template.
(TEMPLATE,) = (text.strip() for text, _ in blocks("docs/serving.md", "jinja"))
CHAT = [
    {"role": "user", "content": "write a loop"},
    {"role": "assistant", "content": "for"},
    {"role": "user", "content": "!"},
]


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@functools.cache
def text_model(family: str) -> SpiralFormerForCausalLM:
    """float64, weights of std 0.15; greedy texts of several different tokens."""
    return small_model(5, vocab_size=4096, hidden_size=32, layer_family=family)


@pytest.fixture
def model():
    return text_model("gpt_neox")


def greedy(model, tokenizer, prompt: str, count: int = NEW) -> str:
    """A text continued token by token, every token from a forward over the whole text without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + count and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


# -- pipelines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "family"), [(1, "gpt_neox"), (2, "gpt_neox"), (5, "gpt_neox"), (5, "llama"), (5, "qwen3")]
)
def test_text_generation_in_ragged_batches(tokenizer, batch_size, family):
    model = text_model(family)
    expected = [greedy(model, tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generator(PROMPTS, batch_size=batch_size, max_new_tokens=NEW, do_sample=False, return_full_text=False)
    assert [text["generated_text"] for (text,) in found] == expected


def test_text_generation_with_a_chat_template(model, tokenizer):
    chats = [CHAT, CHAT[:1]]
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    assert prompts[1] == "user: write a loop<|eos|>assistant: "
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generator(chats, batch_size=2, max_new_tokens=NEW, do_sample=False)
    for chat, prompt, (answer,) in zip(chats, prompts, found, strict=True):
        reply = {"role": "assistant", "content": greedy(model, tokenizer, prompt)}
        assert answer["generated_text"] == [*chat, reply]


def test_streamers_hand_out_the_text_of_generate(model, tokenizer, capsys):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    expected = greedy(model, tokenizer, PROMPTS[0])
    options = {**inputs, "max_new_tokens": NEW, "do_sample": False}
    model.generate(**options, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out == expected + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = threading.Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 1


def test_a_pipeline_streams(model, tokenizer, capsys):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generator(PROMPTS[2], max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out == greedy(model, tokenizer, PROMPTS[2]) + "\n"


SIDES = [("left", "gpt_neox"), ("right", "gpt_neox"), ("left", "llama"), ("right", "qwen3")]


@pytest.mark.parametrize(("side", "family"), SIDES)
def test_features_in_ragged_batches(tokenizer, side, family):
    model, tokenizer.padding_side = text_model(family), side
    extractor = pipeline("feature-extraction", model=model.model, tokenizer=tokenizer)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert len(set(lengths)) > 3
    together = extractor(PROMPTS, batch_size=len(PROMPTS), return_tensors=True)
    for prompt, length, features in zip(PROMPTS, lengths, together, strict=True):
        with torch.no_grad():
            alone = model.model(**tokenizer(prompt, return_tensors="pt")).last_hidden_state
        real = features[:, -length:] if side == "left" else features[:, :length]
        assert features.shape[1] == max(lengths) and torch.allclose(real, alone, atol=1e-9, rtol=0)


def toy_task() -> tuple[list[str], list[str]]:
    """Texts of different lengths, whose label is the word that stands in them somewhere."""
    texts, labels = [], []
    for index in range(48):
        word, label = (("import", "module"), ("class", "type"), ("return", "value"))[index % 3]
        texts.append("x = 1; " * (index % 5) + f"{word} name" + ", y" * (index % 4))
        labels.append(label)
    return texts, labels


def test_text_classification_after_fine_tuning(tokenizer, tmp_path):
    set_seed(0)
    texts, labels = toy_task()
    names = sorted(set(labels))
    config = small_config(vocab_size=4096, hidden_size=32, intermediate_size=64, classifier_dropout=0.0)
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    model = SpiralFormerForSequenceClassification(config)
    data = Dataset.from_dict({"text": texts, "label": [names.index(label) for label in labels]})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=60, per_device_train_batch_size=16, learning_rate=3e-3, report_to="none"
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data.map(lambda row: tokenizer(row["text"]), remove_columns="text"),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    before = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer)(texts)
    assert [answer["label"] for answer in before] != labels
    trainer.train()
    trainer.save_model()
    tokenizer.save_pretrained(tmp_path)
    classifier = pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path))
    assert type(classifier.model) is SpiralFormerForSequenceClassification
    assert [answer["label"] for answer in classifier(texts, batch_size=7)] == labels


@pytest.mark.parametrize(("side", "family"), SIDES)
def test_classes_in_ragged_batches(tokenizer, side, family):
    tokenizer.padding_side = side
    config = small_config(vocab_size=4096, num_labels=3, layer_family=family)
    model = make_exact(large_weights(SpiralFormerForSequenceClassification(config))).eval()
    classifier = pipeline("text-classification", model=model, tokenizer=tokenizer)
    options = {"top_k": None, "function_to_apply": "none"}
    together, alone = classifier(PROMPTS, batch_size=len(PROMPTS), **options), classifier(PROMPTS, **options)
    with torch.no_grad():
        logits = [model(**tokenizer(prompt, return_tensors="pt")).logits[0] for prompt in PROMPTS]
    for scores, single, expected in zip(together, alone, logits, strict=True):
        for found in (scores, single):
            by_label = {answer["label"]: answer["score"] for answer in found}
            # The pipeline rounds to float32.
            assert [by_label[f"LABEL_{index}"] for index in range(3)] == expected.float().tolist()


# -- transformers serve -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["one by one", "continuous batching"])
def served(request, tmp_path_factory):
    """A folder with the checkpoint `my_model`, and the address of a server that the page's command starts there."""
    together = request.param == "continuous batching"
    if together and not find_spec("transformers.generation.continuous_batching.cache_allocators"):
        pytest.skip("needs transformers 5.23 or later")
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    save_served(folder, TEMPLATE)
    starts = [line for line in commands("docs/serving.md") if line.startswith("python scripts/serve.py")]
    (start,) = (line for line in starts if ("--continuous-batching" in line) == together)
    assert shlex.split(start)[2] == "my_model"
    with serving(folder, start) as (address, _):
        yield folder, address


@pytest.mark.processes
def test_the_server_answers(served):
    folder, address = served
    model = AutoModelForCausalLM.from_pretrained(folder / "my_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my_model")
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = greedy(model, tokenizer, prompt)
    assert len(set(tokenizer(expected)["input_ids"])) > 5
    body = {"model": "my_model", "messages": CHAT, "max_tokens": NEW, "temperature": 0}

    assert json.loads(ask(address, "/health")) == {"status": "ok"}
    # The server lists what lies in the Hub's cache, and since 5.24 the model that it was started with.
    named = ["my_model"] if version.parse(transformers.__version__) >= version.parse("5.24") else []
    assert [model["id"] for model in json.loads(ask(address, "/v1/models"))["data"]] == named

    answer = json.loads(ask(address, "/v1/chat/completions", body))
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == expected and choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == len(tokenizer(prompt)["input_ids"])

    events = ask(address, "/v1/chat/completions", {**body, "stream": True}).split("\n\n")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if event]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == expected and len([piece for piece in pieces if piece]) > 1

    completion = json.loads(
        ask(address, "/v1/completions", {"prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0})
    )
    assert completion["choices"][0]["text"] == greedy(model, tokenizer, PROMPTS[0])


@pytest.mark.processes
def test_clients_at_once_get_what_each_gets_alone(served):
    """Twelve of them, of which every third leaves before its answer is whole."""
    folder, address = served
    model = AutoModelForCausalLM.from_pretrained(folder / "my_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my_model")
    answers = {}

    def client(number: int) -> None:
        body = {"prompt": PROMPTS[number % len(PROMPTS)] * (1 + number % 3), "max_tokens": NEW, "temperature": 0}
        if number % 3 == 2:
            data = json.dumps({**body, "max_tokens": 200, "stream": True}).encode()
            request = urllib.request.Request(address + "/v1/completions", data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as response:
                response.read(10)
            return
        answers[number] = body["prompt"], json.loads(ask(address, "/v1/completions", body))["choices"][0]["text"]

    clients = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(timeout=300)
    assert sorted(answers) == [number for number in range(12) if number % 3 != 2]
    for prompt, text in answers.values():
        assert text == greedy(model, tokenizer, prompt)
    assert json.loads(ask(address, "/health")) == {"status": "ok"}


@pytest.mark.processes
def test_each_request_has_its_own_settings(served):
    """A hot sample beside greedy texts, one of which ends at a string."""
    folder, address = served
    model = AutoModelForCausalLM.from_pretrained(folder / "my_model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my_model")
    expected = greedy(model, tokenizer, PROMPTS[0])
    sampled = json.dumps({"do_sample": True, "temperature": 50.0, "max_new_tokens": NEW})
    answers = {}

    def client(name: str, **settings) -> None:
        body = {"prompt": PROMPTS[0], "max_tokens": NEW, **settings}
        answers[name] = json.loads(ask(address, "/v1/completions", body))["choices"][0]["text"]

    likeliest = json.dumps({"do_sample": True, "temperature": 0.7, "top_k": 1, "max_new_tokens": NEW})
    stop = expected[len(expected) // 2 :][:3]
    requests = {
        "hot": {"generation_config": sampled},
        "likeliest": {"generation_config": likeliest},
        "greedy": {"temperature": 0},
        "stopped": {"temperature": 0, "stop": [stop, "never"]},
    }
    clients = [threading.Thread(target=client, args=(name,), kwargs=settings) for name, settings in requests.items()]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join(timeout=300)
    assert answers["greedy"] == answers["likeliest"] == expected and answers["hot"] != expected
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    how = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": [stop, "never"], "tokenizer": tokenizer}
    stopped = tokenizer.decode(model.generate(ids, **how)[0, ids.shape[1] :], skip_special_tokens=True)
    assert answers["stopped"] == stopped and len(stopped) < len(expected)


@pytest.mark.processes
def test_a_setting_that_batches_do_not_follow_is_a_clients_error(served):
    folder, address = served
    body = {"prompt": PROMPTS[0], "max_tokens": NEW, "frequency_penalty": 0.5}
    if "continuous" not in folder.name:
        ask(address, "/v1/completions", body)
        return
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(address, "/v1/completions", body)
    assert refused.value.code == 422 and "RepetitionPenaltyLogitsProcessor" in refused.value.read().decode()


# What the tests above ask over HTTP, asked of the batches themselves.
batches = pytest.mark.skipif(
    not find_spec("transformers.generation.continuous_batching.cache_allocators"),
    reason="needs transformers 5.23 or later",
)


@contextlib.contextmanager
def batching(model):
    """The server's batches, started by a request that is nothing like the others."""
    found = RequestBatching(cb_config=settings())
    first = {"do_sample": True, "temperature": 3.0, "suppress_tokens": [*range(3000)], "max_new_tokens": 2}
    found.init_cb(model, GenerationConfig(**first, eos_token_id=-1))
    try:
        yield found
    finally:
        found.stop()


def answered(found, model, tokenizer, ids: list[int], name: str = "x", **settings_of_request) -> list[int]:
    how = GenerationConfig(**{"max_new_tokens": NEW, "eos_token_id": -1, **settings_of_request})
    call = found.generate_non_streaming(model, tokenizer, {"input_ids": ids}, how, name)
    return asyncio.run(asyncio.wait_for(call, timeout=60))[2]


@batches
@pytest.mark.parametrize(
    "setting",
    [
        {"min_p": 0.9},
        {"suppress_tokens": [5]},
        {"num_return_sequences": 2, "do_sample": True},
        {"typical_p": 0.5},
        {"max_length": 30},
    ],
    ids=str,
)
def test_a_setting_that_all_requests_would_share_is_a_clients_error(setting, tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    (name, value) = next(iter(setting.items()))
    if name == "max_length":
        setting = {**setting, "max_new_tokens": None}
    with batching(model) as found:
        with pytest.raises(HTTPException, match=f"`{name}` must be .*but got {re.escape(repr(value))}") as refused:
            answered(found, model, tokenizer, [3, 4, 5], **setting)
        assert refused.value.status_code == 422
        ids = random_ids(1, 7, seed=7)[0].tolist()
        same = {"num_beams": 1, "typical_p": 1.0, "num_return_sequences": 1, "pad_token_id": 3}
        assert answered(found, model, tokenizer, ids, do_sample=False, **same) == alone(model, ids, NEW)[0]


@batches
def test_settings_of_the_model_that_batches_do_not_follow_are_named(tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    model.generation_config.repetition_penalty = 1.5
    with pytest.raises(HTTPException, match="RepetitionPenaltyLogitsProcessor") as refused, batching(model):
        pass
    assert refused.value.status_code == 422
    model.generation_config.update(repetition_penalty=None, max_length=3)  # a request has a count of its own
    with batching(model) as found:
        assert len(answered(found, model, tokenizer, [3, 4, 5], max_length=None)) == NEW


@batches
def test_a_greedy_request_draws_nothing_where_tokens_are_equally_likely(tokenizer):
    """As in bfloat16, where the best two often are."""
    model = make_model(vocab_size=len(tokenizer))
    ids = random_ids(1, 7, seed=7)[0].tolist()
    with torch.no_grad():
        for token in set(alone(model, ids, NEW)[0]):
            model.lm_head.weight[token - 7] = model.lm_head.weight[token]
    with batching(model) as found:
        texts = {str(answered(found, model, tokenizer, ids, do_sample=False)) for _ in range(5)}
    assert len(texts) == 1


@batches
def test_a_top_p_of_0_is_none_of_1(tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    ids = random_ids(1, 7, seed=7)[0].tolist()
    with batching(model) as found:
        sampled = {"do_sample": True, "temperature": 9.0, "top_k": 0}
        assert answered(found, model, tokenizer, ids, **sampled) != alone(model, ids, NEW)[0]
        assert answered(found, model, tokenizer, ids, **sampled, top_p=0.0) == alone(model, ids, NEW)[0]


@batches
def test_a_client_may_ask_again_with_the_same_id(tokenizer):
    model = make_model(vocab_size=len(tokenizer))
    texts = [random_ids(1, length, seed=length)[0].tolist() for length in (7, 12, 5)]

    async def ask_all(found):
        how = GenerationConfig(max_new_tokens=NEW, eos_token_id=-1)
        calls = [found.generate_non_streaming(model, tokenizer, {"input_ids": ids}, how, "x") for ids in texts]
        return await asyncio.wait_for(asyncio.gather(*calls), timeout=60)

    with batching(model) as found:
        answers = asyncio.run(ask_all(found))
    assert [answer[2] for answer in answers] == [alone(model, ids, NEW)[0] for ids in texts]


@pytest.mark.processes
def test_the_pages_request_is_answered(served):
    _, address = served
    (request,) = (line for line in commands("docs/serving.md") if line.startswith("curl"))
    words = shlex.split(request)
    url = next(word for word in words if word.startswith("http"))
    body = json.loads(words[words.index("-d") + 1])
    answer = json.loads(ask(address, url.removeprefix("http://localhost:8000"), body))
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_every_command_of_the_page_is_run():
    assert [line.split()[0] for line in commands("docs/serving.md")] == ["python", "curl", "python"]


@pytest.fixture
def library():
    """The library as the server sees it, put back afterwards."""
    names = serve.model_manager.transformers
    yield names
    names.__dict__.pop("SpiralFormerForCausalLM", None)


def test_the_class_is_put_where_the_server_looks(monkeypatch, library):
    calls = []
    monkeypatch.setattr(serve, "app", calls.append)
    serve.main(["my_model", "--port", "8000"])
    assert calls == [["serve", "my_model", "--port", "8000"]]
    assert library.SpiralFormerForCausalLM is serve.ServedModel
    assert issubclass(serve.ServedModel, SpiralFormerForCausalLM)


def test_the_library_alone_does_not_find_the_class(library):
    """What scripts/serve.py is for: once this fails, the script can go."""
    assert not hasattr(library, "SpiralFormerForCausalLM")


# -- other engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [SpiralFormerModel, SpiralFormerForCausalLM])
def test_engines_are_told_that_the_model_is_no_back_end(model_class):
    """vLLM and SGLang ask the class that the checkpoint's auto_map names."""
    assert model_class.is_backend_compatible() is False
    for flag in ("_supports_flash_attn", "_supports_attention_backend"):
        assert getattr(model_class, flag) is False
    model = model_class(small_config())
    assert not model.supports_pp_plan


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_attention_of_engines_is_refused(engine):
    """An engine registers its attention under its name, sets the name in the configuration and builds the model."""
    AttentionInterface.register(engine, sdpa_attention_forward)
    try:
        config = small_config()
        config._attn_implementation = engine
        for auto_class in (AutoModel, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=f"must not be that of a serving engine, but got '{engine}'"):
                auto_class.from_config(config)
        with pytest.raises(ValueError, match=f"must not be that of a serving engine, but got '{engine}'"):
            small_model().set_attn_implementation(engine)
    finally:
        del AttentionInterface._global_mapping[engine]


def test_a_chat_needs_a_template():
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tokenization")
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="chat_template is not set"):
        tokenizer.apply_chat_template(CHAT)
