"""Checkpoints of every kind of model, engines that serve them, and what transformers gives for each request alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from support import random_ids, small_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from modeling_spiralformer import SpiralFormerForCausalLM

NEW = 24  # tokens that each request asks for
SEATS, STEP, BLOCKS = 5, 23, 7  # requests at once, tokens of one step, blocks of the cache (one of them vLLM's own)
HEADS = {"head_dim": 32}  # the smallest that vLLM's attention takes on a CPU
# Every family of layers, topology, scaling and rotary type, odd offsets and shifts; and the smallest block that fits.
MODELS: dict[str, tuple[int, dict]] = {
    "neox-mesh": (128, {"chunk_sizes": [8, 4, 2, 1], "num_prelude_layers": 2}),
    "llama-anchor": (
        192,
        HEADS
        | {"layer_family": "llama", "topology": "anchor", "attention_bias": True, "mlp_bias": True}
        | {"chunk_sizes": [4, 3, 1], "chunk_offsets": [3, 0, 0], "causal_shifts": [9, 2, 3]}
        | {"down_scaling": "mean", "up_scaling": "broadcast"}
        | {"rope_parameters": {"rope_type": "llama3", "factor": 4, "original_max_position_embeddings": 32}}
        | {"hidden_act": "gelu"},
    ),
    "qwen3-streams": (
        256,
        HEADS
        | {"layer_family": "qwen3", "topology": "hyper_connections", "chunk_sizes": [16, 8, 4, 2]}
        | {"tie_word_embeddings": True, "scale_embeddings": False, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64}},
    ),
    "neox-unshared": (
        64,
        {"chunk_sizes": [4, 1], "share_core": False, "topology": "residual", "use_parallel_residual": False}
        | {"norm": "rms_norm", "down_scaling": "mean", "attention_bias": False}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
    ),
    "llama-base": (
        32,
        HEADS
        | {"layer_family": "llama", "topology": "base", "chunk_sizes": [2, 1], "causal_shifts": [1, 1]}
        | {"norm": "layer_norm", "num_key_value_heads": 1, "num_coda_layers": 0, "up_scaling": "broadcast"},
    ),
    "qwen3-mesh": (
        96,
        HEADS
        | {"layer_family": "qwen3", "chunk_sizes": [1, 3], "chunk_offsets": [0, 2], "causal_shifts": [0, 5]}
        | {"num_prelude_layers": 0, "num_memory_slots": 3},
    ),
    "llama-plain": (32, HEADS | {"layer_family": "llama", "chunk_sizes": [], "num_core_layers": 0}),
}
MODELS["llama-anchor"][1]["rope_parameters"] |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def make_model(**options) -> SpiralFormerForCausalLM:
    """In float32, its weights of std 0.15, those of norms around 1: greedy texts are of several tokens."""
    model = small_model(dtype=torch.float32, **{"hidden_size": 64, "intermediate_size": 96} | options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    model.generation_config.eos_token_id = None  # vLLM is told to ignore it
    return model


@contextlib.contextmanager
def engine(folder: Path, **options) -> Iterator[LLM]:
    """One that serves a checkpoint in this process, several requests at once and no prompt in one step."""
    settings = {
        "dtype": "float32",
        "max_model_len": min(512, (BLOCKS - 1) * options.get("block_size", 128)),
        "max_num_seqs": SEATS,
        "max_num_batched_tokens": STEP,
        "num_gpu_blocks_override": BLOCKS,
        "kv_cache_memory_bytes": 2**26,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


class Text(NamedTuple):
    """The new tokens of a request, and the log-probability of each."""

    tokens: list[int]
    scores: torch.Tensor


def prompt(length: int, seed: int | None = None) -> list[int]:
    return random_ids(1, length, seed=length if seed is None else seed)[0].tolist()


def served(llm: LLM, prompts: list[list[int]], count: int = NEW) -> list[Text]:
    """What the engine gives for all of them at once."""
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    texts = []
    for (output,) in (request.outputs for request in outputs):
        chosen = [scores[token].logprob for token, scores in zip(output.token_ids, output.logprobs, strict=True)]
        texts.append(Text(list(output.token_ids), torch.tensor(chosen)))
    return texts


def alone(model: SpiralFormerForCausalLM, ids: list[int], count: int = NEW) -> Text:
    """What transformers gives for one request."""
    row = torch.tensor([ids])
    output = model.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(ids) :]
    scores = torch.cat(output.logits).float().log_softmax(-1)
    return Text(tokens.tolist(), scores.gather(1, tokens[:, None])[:, 0])


def metric(llm: LLM, name: str) -> int:
    """A counter of the engine, since it started."""
    (found,) = (item.value for item in llm.get_metrics() if item.name == f"vllm:{name}")
    return found
