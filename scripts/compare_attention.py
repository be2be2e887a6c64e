"""Times the attention back ends on packed rows in turn, and says how far their logits are from each other.

    python scripts/compare_attention.py --rows 4 --length 2048 --text_length 200 --repeats 3

A row holds texts of about `text_length` tokens, told by position ids that begin again. sdpa reads the whole mask of a
row; flex attention leaves out the blocks of other texts. A forward without a cache is timed.
"""

import statistics
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel

from modeling_spiralformer.layers_spiralformer import FAMILIES
from workshop.benchmarks.models import BenchmarkModel, ModelSize
from workshop.benchmarks.workloads import seconds
from workshop.settings import check_counts
from workshop.tables import markdown_table

WIDTH, LAYERS, VOCABULARY = 256, 6, 4096
SCHEDULE = (4, 2, 1)
BACK_ENDS = ("sdpa", "flex_attention")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class AttentionArguments:
    """What to read, with which model, and where."""

    layer_family: str = field(
        default="gpt_neox", metadata={"help": "Whose layers the model has.", "choices": [*FAMILIES]}
    )
    rows: int = field(default=4, metadata={"help": "Packed rows of a forward."})
    length: int = field(default=2048, metadata={"help": "Tokens of a row."})
    text_length: int = field(default=200, metadata={"help": "Tokens of a text, a quarter more or less."})
    repeats: int = field(default=3, metadata={"help": "Rounds through all back ends; a warm-up comes before."})
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda where there is one."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights.", "choices": [*DTYPES]})

    def __post_init__(self):
        check_counts(self, "rows", "length", "text_length", "repeats")


def packed_positions(rows: int, length: int, text_length: int) -> torch.Tensor:
    """Position ids `(rows, length)`: texts from 0, their lengths drawn within a quarter of `text_length`."""
    spread = text_length // 4
    drawn = torch.randint(
        text_length - spread, text_length + spread + 1, (rows, length // max(1, text_length - spread) + 1)
    )
    return torch.stack([torch.cat([torch.arange(n) for n in lengths.tolist()])[:length] for lengths in drawn])


@torch.no_grad()
def compare(model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, repeats: int) -> dict:
    """Seconds of each round for each back end, and their logits."""
    times: dict[str, list[float]] = {name: [] for name in BACK_ENDS}
    logits = {}

    def forward() -> torch.Tensor:
        return model(input_ids, position_ids=position_ids, use_cache=False).logits

    for turn in tqdm(range(repeats + 1), desc="rounds, the first a warm-up"):
        for name in BACK_ENDS:
            model.set_attn_implementation(name)
            if turn:
                times[name].append(seconds(forward, model.device))
            else:
                logits[name] = forward()
    return {"seconds": times, "logits": logits}


def main(argv: list[str] | None = None) -> dict:
    (arguments,) = HfArgumentParser(AttentionArguments).parse_args_into_dataclasses(argv)
    torch.manual_seed(0)
    size = ModelSize(width=WIDTH, layers=LAYERS, vocabulary=VOCABULARY, longest=arguments.length)
    device = torch.device(arguments.device)
    model = BenchmarkModel("packed", arguments.layer_family, SCHEDULE).build(
        size, device, getattr(torch, arguments.dtype)
    )
    ids = torch.randint(3, VOCABULARY, (arguments.rows, arguments.length)).to(device)
    positions = packed_positions(arguments.rows, arguments.length, arguments.text_length).to(device)
    found = compare(model, ids, positions, arguments.repeats)
    base, reference = found["seconds"][BACK_ENDS[0]], found["logits"][BACK_ENDS[0]]
    lines = []
    for name in BACK_ENDS:
        ratio = statistics.median(taken / of for taken, of in zip(found["seconds"][name], base, strict=True))
        apart = (found["logits"][name] - reference).abs().max().item()
        lines.append([name, f"{statistics.median(found['seconds'][name]):.3f}", f"{ratio:.2f}", f"{apart:.1e}"])
    print(markdown_table(["attention", "seconds", f"over {BACK_ENDS[0]}", "logits apart"], lines))
    return found


if __name__ == "__main__":
    main()
