"""Many requests at once: continuous batching against left-padded batches of `generate()`, and against the plain stack.

Every round serves the same requests with each in turn; ratios are made within a round.
"""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from workshop.benchmarks.models import BenchmarkModel, ModelSize, models_of, plain_name
from workshop.benchmarks.results import Ratio
from workshop.costs import layer_equivalents, promised_bytes
from workshop.provenance import load, machine
from workshop.tables import markdown_table

SPIRAL = "spiralformer-b"
PAGE = 64  # tokens of a block


@dataclass(frozen=True)
class Workload:
    """Requests whose lengths are drawn evenly on a logarithmic scale, in the order in which they come."""

    requests: int = 64
    prompts: tuple[int, int] = (16, 512)
    new: tuple[int, int] = (16, 256)
    padded: int = 8  # rows of a left-padded batch
    step_tokens: int = 512  # most tokens of a step of continuous batching

    def draw(self, vocabulary: int, seed: int = 0) -> list[tuple[list[int], int]]:
        """Each request's prompt, and how many new tokens it asks for."""
        chosen = random.Random(seed)

        def length(low: int, high: int) -> int:
            return round(math.exp(chosen.uniform(math.log(low), math.log(high))))

        lengths = [(length(*self.prompts), length(*self.new)) for _ in range(self.requests)]
        return [([chosen.randrange(3, vocabulary) for _ in range(prompt)], new) for prompt, new in lengths]


@dataclass
class Way:
    """A way to serve requests, each a prompt and a count of new tokens, with a model."""

    model: PreTrainedModel
    workload: Workload
    requests: list[tuple[list[int], int]]


@dataclass
class Batched(Way):
    """`generate_batch` by its manager, which gives every request its own count of new tokens."""

    block_bytes: float = 0.0  # of a block of PAGE tokens, once requests were served

    def __call__(self) -> list[list[int]]:
        """The new tokens of each request."""
        longest = max(new for _, new in self.requests)
        decoding = GenerationConfig(max_new_tokens=longest, do_sample=False, eos_token_id=-1, pad_token_id=0)
        pages = sum(-(-(len(prompt) + new) // PAGE) for prompt, new in self.requests)
        batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages,
            max_batch_tokens=self.workload.step_tokens,
            max_requests_per_batch=len(self.requests),
        )
        manager = self.model.init_continuous_batching(decoding, batching)
        manager.start()
        texts: dict[str, list[int]] = {}
        try:
            for number, (prompt, new) in enumerate(self.requests):
                manager.add_request(prompt, str(number), max_new_tokens=new)
            while len(texts) < len(self.requests):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("The thread of continuous batching ended before its requests.")
                if result is not None:
                    if result.error is not None:
                        raise RuntimeError(f"Request {result.request_id} failed: {result.error}")
                    texts[result.request_id] = result.generated_tokens
            (allocator,) = manager.batch_processor.cache.cache_allocators.values()
            self.block_bytes = allocator.bytes_per_block
        finally:
            manager.stop(block=True)
        return [texts[str(number)] for number in range(len(self.requests))]


class Padded(Way):
    """`generate()` on left-padded batches in the order of the requests; a batch ends with its longest text."""

    def __call__(self) -> list[list[int]]:
        """The new tokens of each request, cut to what it asked for."""
        texts = []
        for start in range(0, len(self.requests), self.workload.padded):
            rows = self.requests[start : start + self.workload.padded]
            width, longest = max(len(prompt) for prompt, _ in rows), max(new for _, new in rows)
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in rows], device=self.model.device)
            mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in rows], device=self.model.device)
            how = {"max_new_tokens": longest, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            out = self.model.generate(ids, attention_mask=mask, **how)[:, width:].tolist()
            texts += [text[:new] for text, (_, new) in zip(out, rows, strict=True)]
        return texts


def measure_batching(
    family: str, size: ModelSize, workload: Workload, device: torch.device, repeats: int, threads: int
) -> dict:
    """Seconds of each way in each round, after a round that is not counted; whether all ways gave the same texts."""
    torch.set_num_threads(threads)
    models = {name: models_of(family)[name] for name in (SPIRAL, plain_name(family))}
    built = {name: build(model, size, device) for name, model in models.items()}
    requests = workload.draw(size.vocabulary)
    spiral, plain = built.values()
    batched = Batched(spiral, workload, requests)
    ways: dict[str, Callable] = {"batched": batched, "padded": Padded(spiral, workload, requests)}
    ways["plain batched"] = Batched(plain, workload, requests)
    results = {"machine": machine(device), "family": family, "size": asdict(size), "workload": asdict(workload)}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    texts = {}
    with tqdm(total=(repeats + 1) * len(ways), desc="serving") as progress:
        for counted in range(repeats + 1):
            for name, way in ways.items():
                took, texts[name] = clocked(way)
                seconds[name] += [took] if counted else []
                progress.update()
    return results | {
        "tokens": {"prompts": sum(len(prompt) for prompt, _ in requests), "new": sum(new for _, new in requests)},
        "layer_equivalents": {name: layer_equivalents(model.config) for name, model in built.items()},
        "seconds": seconds,
        "equal_texts": sum(a == b for a, b in zip(texts["batched"], texts["padded"], strict=True)),
        "block_bytes": {"held": batched.block_bytes, "keys and values": PAGE * promised_bytes(spiral.config, 4)},
        "load_at_end": load(),
    }


def build(model: BenchmarkModel, size: ModelSize, device: torch.device) -> PreTrainedModel:
    """The model in float32, which knows no end."""
    built = model.build(size, device, torch.float32)
    built.generation_config.eos_token_id = None
    return built


def clocked(way: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    """Wall time of one way through all requests, and their texts."""
    started = time.perf_counter()
    texts = way()
    return time.perf_counter() - started, texts


def report_batching(results: dict) -> str:
    """The tables as Markdown."""
    seconds, tokens, workload = results["seconds"], results["tokens"], results["workload"]
    plain = plain_name(results["family"])
    names = {
        "batched": f"{SPIRAL}, `generate_batch`",
        "padded": f"{SPIRAL}, `generate()` on left-padded batches of {workload['padded']}",
        "plain batched": f"{plain}, `generate_batch`",
    }
    rows = []
    for way, name in names.items():
        median = statistics.median(seconds[way])
        rate = [f"{workload['requests'] / median:.2f}", f"{tokens['new'] / median:.0f}"]
        rows.append([name, f"{median:.1f}", *rate, str(Ratio.of(seconds[way], seconds["batched"]))])
    costs = results["layer_equivalents"]
    ratio = costs[SPIRAL] / costs[plain]
    over = Ratio.of(seconds["batched"], seconds["plain batched"], ratio)
    held, promised = results["block_bytes"]["held"], results["block_bytes"]["keys and values"]
    header = ["what", "seconds, median", "requests a second", "new tokens a second", "time over the first"]
    where, width = results["machine"], results["size"]["width"]
    return "\n".join(
        [
            f"{workload['requests']} requests of {'-'.join(map(str, workload['prompts']))} prompt tokens and "
            f"{'-'.join(map(str, workload['new']))} new ones, {tokens['prompts']} and {tokens['new']} in all; width "
            f"{width}, threads {where['threads']}, transformers {where['transformers']}, {where['date']}, commit "
            f"{where['commit'][:7]}.",
            "",
            markdown_table(header, rows),
            "",
            f"- Time over {plain} in `generate_batch`, over the ratio of layer-equivalents ({ratio:.3f}): {over}.",
            f"- Texts equal to those of `generate()`: {results['equal_texts']} of {workload['requests']}.",
            f"- Bytes of a block of {PAGE} tokens: {held:.0f}, of which keys and values by the formula "
            f"{promised:.0f}: {held / promised:.3f}.",
        ]
    )
