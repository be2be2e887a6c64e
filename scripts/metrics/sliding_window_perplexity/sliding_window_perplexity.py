"""Perplexity and bits per byte of texts of any length, over overlapping windows: a module of `evaluate`."""

import math

import datasets
import evaluate
import torch

_DESCRIPTION = """
Perplexity and bits per byte of a causal language model on texts of any length. A window of at most `window` tokens
moves over the text in steps of `stride` tokens, and every token is scored exactly once: by the first window that
predicts it.
"""

_CITATION = ""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): the texts. Each is scored alone, after one start token.
    model: a causal language model of transformers, on its device.
    tokenizer: its tokenizer. It adds no special tokens here, and reads text that looks like one as text.
    window (int): most tokens that the model sees at once, the start token among them.
    stride (int): tokens from the start of one window to that of the next; 1 <= stride <= window. With stride = window
        the windows do not overlap. A smaller stride gives every token a longer context and takes more forward passes.
        The default is half of the window.
    batch_size (int): windows in one forward pass.
    start_token_id (int): what the first token of a text is predicted from. Default: the tokenizer's end of sequence,
        which separates documents in training.

Returns: a dictionary of
    perplexity (float): exp of the loss.
    bits_per_byte (float): summed loss / ln 2 / UTF-8 bytes of the texts.
    loss (float): nats per token.
    tokens, bytes (int): what was scored.

Raises ValueError for a window or stride out of range, a tokenizer without an end of sequence where no start token is
given, and texts without any token.
"""


def make_windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """
    The windows over a text of `length` tokens after its start token: (begin, end, tokens scored).

    A window feeds the columns begin ... end - 1, counted from the start token, and predicts the column after each.
    The tokens scored are its last ones: those that no window before it predicted.
    """
    windows, scored, begin = [], 0, 0
    while scored < length:
        end = min(begin + window, length)
        windows.append((begin, end, end - scored))
        scored, begin = end, begin + stride
    return windows


def _check(name: str, value: object, largest: int | None) -> None:
    in_range = type(value) is int and value >= 1 and (largest is None or value <= largest)
    if not in_range:
        bounds = ">= 1" if largest is None else f"in [1, {largest}]"
        raise ValueError(f"`{name}` must be an integer {bounds}, but got {value!r}.")


def encode(tokenizer, text: str) -> list[int]:
    """Token ids of a text, nothing added; text that looks like a special token is read as text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def window_losses(model, rows: list[tuple[list[int], int]], padding_id: int) -> list[torch.Tensor]:
    """
    Losses of the scored tokens of a batch of windows, float64, one tensor a row.

    `rows` holds the columns begin ... end of each window (one more than it feeds) and the number of tokens scored.
    """
    longest = max(len(ids) for ids, _ in rows) - 1
    fed = torch.full((len(rows), longest), padding_id)
    mask = torch.zeros_like(fed)
    for index, (ids, _) in enumerate(rows):
        fed[index, : len(ids) - 1] = torch.tensor(ids[:-1])
        mask[index, : len(ids) - 1] = 1
    logits = model(input_ids=fed.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    losses = []
    for row, (ids, scored) in zip(logits, rows, strict=True):
        predicted = row[len(ids) - 1 - scored : len(ids) - 1]
        # Half precision is too coarse for a log-softmax.
        predicted = predicted if predicted.dtype == torch.float64 else predicted.float()
        targets = torch.tensor(ids[len(ids) - scored :], device=row.device)
        losses.append(torch.nn.functional.cross_entropy(predicted, targets, reduction="none").double().cpu())
    return losses


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SlidingWindowPerplexity(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(self, predictions, model, tokenizer, window, stride=None, batch_size=8, start_token_id=None):
        _check("window", window, None)
        stride = max(1, window // 2) if stride is None else stride
        _check("stride", stride, window)
        _check("batch_size", batch_size, None)
        start = tokenizer.eos_token_id if start_token_id is None else start_token_id
        if start is None:
            raise ValueError(
                "`start_token_id` must be given for a tokenizer without an end of sequence, but got None."
            )
        rows = []
        for text in predictions:
            ids = [start, *encode(tokenizer, text)]
            windows = make_windows(len(ids) - 1, window, stride)
            rows += [(ids[begin : end + 1], scored) for begin, end, scored in windows]
        if not rows:
            raise ValueError("`predictions` must hold text, but got none that has a token.")
        # Windows of one length in one batch: less padding.
        rows.sort(key=lambda row: len(row[0]), reverse=True)
        training = model.training
        model.eval()
        losses = []
        try:
            with torch.inference_mode():
                starts = range(0, len(rows), batch_size)
                for first in evaluate.logging.tqdm(starts, desc="Windows", unit="batch"):
                    losses += window_losses(model, rows[first : first + batch_size], start)
        finally:
            model.train(training)
        total, tokens = float(torch.cat(losses).sum()), sum(len(row) for row in losses)
        count = sum(len(text.encode()) for text in predictions)
        loss = total / tokens
        return {
            # exp(710) overflows a float.
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": total / math.log(2) / count,
            "loss": loss,
            "tokens": tokens,
            "bytes": count,
        }
