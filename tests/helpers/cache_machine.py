"""Histories of a cache that hypothesis chooses, over all families, topologies, schedules and views of them."""

from histories import History
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import ragged_pads, small_config
from views import models_and_views

COUNTS = st.sampled_from([1, 1, 1, 2, 3, 5, 8, 17, 0])  # tokens fed after an operation; 0 chains two operations
for_dynamic_caches = precondition(lambda machine: not machine.history.static)


@st.composite
def bits_of(draw, options: dict, part: list[int] | None) -> dict[int, int] | None:
    """Bits of keys and values at some of the chunk sizes, of a quantised cache; None for a plain one."""
    if draw(st.booleans()):
        return None
    config = small_config(**options)
    tokens = [1] * (config.num_prelude_layers + config.num_coda_layers)
    sizes = sorted({*tokens, *(config.chunk_sizes if part is None else part)})
    return draw(st.dictionaries(st.sampled_from(sizes), st.sampled_from([4, 8, 16])))


class CacheMachine(RuleBasedStateMachine):
    """Hypothesis chooses a model or a view, ragged rows and operations, each followed by tokens `History` compares."""

    @initialize(
        chosen=models_and_views(), pads=ragged_pads(), static=st.booleans(), record=st.booleans(), data=st.data()
    )
    def start(self, chosen, pads, static, record, data):
        options, part = chosen
        bits = None if static else data.draw(bits_of(options, part))
        self.history = History(options, pads, static, part, bits)
        if record and not static:
            self.history.record()

    def feed(self, count):
        if count:
            self.history.feed(count)

    @rule(count=st.integers(1, 20), with_mask=st.booleans(), with_positions=st.booleans())
    def prefill(self, count, with_mask, with_positions):
        self.history.feed(count, with_mask, with_positions)

    @rule(count=st.integers(1, 6), with_mask=st.booleans(), with_positions=st.booleans())
    def decode(self, count, with_mask, with_positions):
        for _ in range(count):
            self.history.feed(1, with_mask, with_positions)

    @for_dynamic_caches
    @rule(count=COUNTS)
    def record(self, count):
        self.history.record()
        self.feed(count)

    @for_dynamic_caches
    @rule(count=COUNTS)
    def stop_recording(self, count):
        self.history.stop_recording()
        self.feed(count)

    @for_dynamic_caches
    @rule(data=st.data(), count=COUNTS)
    def crop(self, data, count):
        self.history.crop(data.draw(st.integers(0, min(self.history.columns, 20))))
        self.feed(count)

    @rule(data=st.data(), count=COUNTS)
    def reorder(self, data, count):
        rows = len(self.history.pads)
        self.history.reorder(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
        self.feed(count)

    @for_dynamic_caches
    @rule(data=st.data(), count=COUNTS)
    def select(self, data, count):
        rows = len(self.history.pads)
        self.history.select(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True)))
        self.feed(count)

    @for_dynamic_caches
    @precondition(lambda self: len(self.history.pads) <= 3)
    @rule(times=st.integers(1, 2), count=COUNTS)
    def repeat(self, times, count):
        self.history.repeat(times)
        self.feed(count)

    @rule(pads=ragged_pads(), count=COUNTS)
    def reset(self, pads, count):
        self.history.reset(pads)
        self.feed(count)

    @rule(count=COUNTS)
    def deepcopy(self, count):
        self.history.copy()
        self.feed(count)
