"""A million tokens decoded by one process, in dynamic and static caches: `make long-run`.

    python tests/helpers/long_run.py --tokens 1000000

Rows of unequal padding are decoded side by side, to four times `max_position_embeddings`, text after text. At the
end of each text the logits of its last step are compared with an uncached forward of the whole text, and the memory of
the process is read. The command fails where logits are off, or where memory grows.
"""

import argparse
import gc
import json
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from support import new_cache, pad_rows, random_ids, small_model  # noqa: E402  this checkout's package

ROWS, LONGEST = 16, 256
TOLERANCE = 1e-9
GROWTH = 8 * 2**20  # bytes that may come and go between two texts


def resident() -> int:
    """Bytes of this process that are in memory now; the most that ever were where the system does not say."""
    status = Path("/proc/self/statm")
    if status.is_file():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def decode_text(model, number: int, columns: int, static: bool) -> float:
    """Decodes rows to `columns` columns, greedily; how far the last logits are from an uncached forward."""
    ids, mask = pad_rows([random_ids(1, 9 + 2 * row, seed=number * ROWS + row)[0] for row in range(ROWS)], "left")
    mask = torch.nn.functional.pad(mask, (0, columns - ids.shape[1]), value=1)
    cache = new_cache(model, static, columns)
    text, new = [ids], ids
    length = ids.shape[1]
    while True:
        logits = model(new, attention_mask=mask[:, :length], past_key_values=cache).logits[:, -1]
        if length == columns:
            break
        new = logits.argmax(-1, keepdim=True)
        text.append(new)
        length += 1
    whole = model(torch.cat(text, dim=1), attention_mask=mask, use_cache=False, logits_to_keep=1).logits[:, -1]
    return float((logits - whole).abs().max())


def run(tokens: int, columns: int = 4 * LONGEST) -> dict:
    """Decodes texts until so many tokens are there; the figures of the run."""
    torch.set_num_threads(1)
    model = small_model(chunk_sizes=[8, 4, 2, 1], num_core_layers=1, max_position_embeddings=LONGEST)
    started, done, worst, memory = time.time(), 0, 0.0, []
    with tqdm(total=tokens, unit=" tokens") as progress:
        while done < tokens:
            for static in (False, True):
                worst = max(worst, decode_text(model, len(memory), columns, static))
                done += ROWS * columns
                progress.update(ROWS * columns)
            gc.collect()
            memory.append(resident())
    return {
        "tokens": done,
        "texts": 2 * len(memory),
        "columns": columns,
        "worst difference": worst,
        "memory after the first two texts": memory[0],
        "most memory after that": max(memory[1:], default=memory[0]),
        "seconds": round(time.time() - started),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="How many to decode.")
    found = run(parser.parse_args(argv).tokens)
    print(json.dumps(found, indent=1))
    if not found["worst difference"] < TOLERANCE:
        raise SystemExit(f"logits are off by {found['worst difference']:.2e}")
    grown = found["most memory after that"] - found["memory after the first two texts"]
    if grown > GROWTH:
        raise SystemExit(f"the process has grown by {grown / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
