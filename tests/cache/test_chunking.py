"""The geometry of chunks beside its definition, row by row and token by token (`chunks.Row`)."""

import pytest
import torch
from chunks import Row, grids, member_columns, of_pair, pairs_filled
from hypothesis import given, settings
from hypothesis import strategies as st
from support import small_config

from modeling_spiralformer.batch_spiralformer import LeftPadding, PackedTexts, _check_boundaries
from modeling_spiralformer.chunking_spiralformer import ChunkGrid, FilledChunks

PADS = st.none() | st.lists(st.integers(0, 14), min_size=1, max_size=4)  # None: a batch without padding
LENGTHS = st.integers(1, 3) | st.integers(1, 30)  # of a call: in short ones some rows fill nothing
DEVICE = torch.get_default_device()
COLUMNS = st.integers(0, 40)
every_grid = given(grid=grids())
every_batch = given(grid=grids(), pads=PADS, columns=COLUMNS)

# -- the names under test -----------------------------------------------------------------------------------------


def padding_of(pads: list[int] | None) -> LeftPadding | None:
    return None if pads is None else LeftPadding(torch.tensor(pads))


def filling_of(grid, pads, start, end, skip_idle=True, every_row=False) -> FilledChunks | None:
    return grid.filling(start, end, padding_of(pads), DEVICE, skip_idle, every_row)


def texts_of(lengths: list[list[int]]) -> PackedTexts:
    return PackedTexts(torch.tensor([[token for length in row for token in range(length)] for row in lengths]))


def first_and_end(filled: FilledChunks) -> tuple[int, int]:
    return filled.first, filled.end


def rows_of(grid: ChunkGrid, pads: list[int] | None) -> list[Row]:
    return [Row(grid, p) for p in pads or [0]]


# -- one row ------------------------------------------------------------------------------------------------------


@every_grid
def test_the_definition_is_the_paper_s(grid):
    """Chunks are cut without a gap, the first has g - w members, the others g, and rho counts them."""
    row = Row(grid)
    chunks = [row.members(chunk) for chunk in range(4)]
    assert [len(members) for members in chunks] == [grid.size - grid.offset] + [grid.size] * 3
    assert sum(chunks, []) == list(range(4 * grid.size - grid.offset))
    for chunk, members in enumerate(chunks):
        assert [grid.pi(token) for token in members] == [chunk] * len(members)
        assert grid.rho(torch.tensor(members)).tolist() == [row.rho(token) for token in members]
        assert [row.pi(token) for token in members] == [chunk] * len(members)
        assert [row.rho(token) for token in members] == list(range(grid.size))[-len(members) :]


@given(grid=grids(), pads=st.integers(0, 30))
def test_chunks_fill_at_one_phase_from_the_first_latent_on(grid, pads):
    row = Row(grid, pads)
    fill_columns = [row.members(chunk)[-1] for chunk in range(4)]
    assert {column % grid.size for column in fill_columns} == {grid.phase(pads)}
    assert [column // grid.size for column in fill_columns] == [grid.first_latent(pads) + chunk for chunk in range(4)]
    assert torch.equal(grid.phase(torch.tensor([pads])), torch.tensor([grid.phase(pads)]))


@given(grid=grids(), pads=st.integers(0, 30), columns=st.integers(0, 60))
def test_opened_counts_the_columns_at_which_the_row_would_fill_a_chunk(grid, pads, columns):
    places = [(column - pads + grid.offset) % grid.size for column in range(columns)]
    assert grid.opened(columns, grid.phase(pads)) == places.count(grid.size - 1)
    if pads == 0:  # K(n)
        assert grid.opened(columns, grid.phase(0)) == grid.num_filled(columns) == len(Row(grid).filled(0, columns))


@given(grid=grids(), pads=st.integers(0, 20), columns=st.integers(0, 60))
def test_a_token_reads_what_the_token_a_shift_before_it_lies_in(grid, pads, columns):
    row = Row(grid, pads)
    position = grid.read_position(columns, grid.phase(pads))
    if (read := row.read(columns)) is not None:
        chunk, place = read
        assert position == row.latent(chunk) * grid.size + place
        assert chunk in row.filled(0, columns + 1)  # causal
    tensor = grid.read_position(torch.tensor([columns]), grid.phase(torch.tensor([[pads]])))
    assert tensor.tolist() == [[position]]


def test_a_schedule_has_a_grid_for_each_iteration():
    config = small_config(chunk_sizes=[4, 3, 1], chunk_offsets=[1, 2, 0], causal_shifts=[3, 5, 0])
    assert ChunkGrid.of(config) == [ChunkGrid(4, 1, 3), ChunkGrid(3, 2, 5), ChunkGrid(1, 0, 0)]


# -- what a call fills --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("skip_idle", "every_row"), [(False, False), (True, False), (True, True)])
@settings(max_examples=200)
@given(grid=grids(), pads=PADS, start=COLUMNS, length=LENGTHS)
def test_what_a_call_fills(grid, pads, start, length, skip_idle, every_row):
    end, rows = start + length, rows_of(grid, pads)
    expected = {
        (index, row.latent(chunk)): (chunk, [None] * (grid.size - len(members)) + members)
        for index, row in enumerate(rows)
        for chunk, members in row.filled(start, end).items()
    }
    filled = filling_of(grid, pads, start, end, skip_idle, every_row)
    if filled is None:
        assert not expected
        return
    assert expected or (pads and not skip_idle)  # only a call that must not look at the padding may fill nothing
    first, end_latent = first_and_end(filled)
    got = {
        (row, first + k): (of_pair(filled.position_ids, index, k), member_columns(filled, grid.size, index, k))
        for index, row, k in pairs_filled(filled, len(rows))
    }
    assert got == expected
    assert filled.count == end_latent - first == filled.position_ids.shape[1] and not filled.packed

    busy = sorted({row for row, _ in expected})
    alone = pads is not None and skip_idle and not every_row and len(busy) < len(rows)
    assert (None if filled.rows is None else filled.rows.tolist()) == (busy if alone else None)
    if pads is None or skip_idle:  # no latent column runs for nothing
        assert {first, end_latent - 1} <= {latent for _, latent in expected}
    if pads is None:
        assert filled.valid is None and filled.new is None
        return
    running = [rows[index] for index in busy] if alone else rows
    held = [{row.latent(chunk) for chunk in row.filled(0, end)} for row in running]
    assert filled.valid.tolist() == [[latent in latents for latent in range(end_latent)] for latents in held]
    assert filled.position_ids.min() >= 0  # of those left out, too: they are computed along


# -- what the next call needs -------------------------------------------------------------------------------------


@every_batch
def test_open_tokens(grid, pads, columns):
    expected = max(len(row.open(columns)) for row in rows_of(grid, pads))
    assert grid.open_tokens(columns, padding_of(pads)) == expected


def latents_read_later(row: Row, columns: int) -> set[int]:
    """The latent columns that tokens in column `columns` and later read: as far as all that has filled goes."""
    later = range(columns, columns + row.pads + row.grid.shift + 2 * row.grid.size)
    return {row.latent(read[0]) for column in later if (read := row.read(column)) is not None}


@every_batch
def test_first_read_latent(grid, pads, columns):
    read = [
        latents_read_later(row, columns) & {row.latent(chunk) for chunk in row.filled(0, columns)}
        for row in rows_of(grid, pads)
    ]
    assert grid.first_read_latent(columns, padding_of(pads)) == min(set().union(*read), default=None)


@every_batch
def test_first_kept_latent(grid, pads, columns):
    needed = [
        latents_read_later(row, columns) | {row.latent(len(row.filled(0, columns)))} for row in rows_of(grid, pads)
    ]
    assert grid.first_kept_latent(columns, padding_of(pads)) == min(set().union(*needed))


@every_batch
def test_latent_columns_are_those_at_which_a_row_fills_a_chunk_or_would_have(grid, pads, columns):
    """Had it had tokens there: so they hold all that has filled."""
    rows, counted = rows_of(grid, pads), grid.latent_columns(columns, padding_of(pads))
    places = [[row.rho(column - row.pads) for column in range(columns)] for row in rows]
    assert counted == max(row_places.count(grid.size - 1) for row_places in places)
    assert all(row.latent(chunk) < counted for row in rows for chunk in row.filled(0, columns))


# -- packed rows --------------------------------------------------------------------------------------------------


@st.composite
def texts(draw) -> list[list[int]]:
    """Lengths of the texts of one to three rows of one length."""
    total = draw(st.integers(1, 40))
    cut = st.lists(st.integers(1, total), unique=True, max_size=8).map(lambda places: sorted({0, *places, total}))
    rows = [draw(cut) for _ in range(draw(st.integers(1, 3)))]
    return [[end - start for start, end in zip(row, row[1:], strict=False)] for row in rows]


def packed_chunks(grid: ChunkGrid, lengths: list[int]) -> list[tuple[int, int, list[int]]]:
    """The full chunks of one packed row that its tokens read, as they fill: start of the text, index, columns."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    return [
        (start, chunk, members)
        for start, length in zip(starts, lengths, strict=True)
        for chunk, members in Row(grid, start).filled(0, start + length).items()
        if chunk in read_in(grid, start, start + length)
    ]


def read_in(grid: ChunkGrid, start: int, end: int) -> set[int]:
    """The chunks that the tokens of a text read."""
    return {read[0] for column in range(start, end) if (read := Row(grid, start).read(column)) is not None}


@given(grid=grids(), lengths=texts())
def test_what_packed_rows_fill(grid, lengths):
    expected = [packed_chunks(grid, row) for row in lengths]
    filled = grid.packed_filling(texts_of(lengths), DEVICE)
    if filled is None:
        assert not any(expected)
        return
    assert first_and_end(filled) == (0, max(map(len, expected))) and filled.packed
    assert filled.rows is None and filled.valid is None and filled.new is None
    for row, chunks in enumerate(expected):
        for k, (_, chunk, members) in enumerate(chunks):
            assert of_pair(filled.position_ids, row, k) == chunk
            absent = [None] * (grid.size - len(members))
            assert member_columns(filled, grid.size, row, k) == absent + members


def most_latents(grid: ChunkGrid, length: int) -> int:
    """The latent columns of a compiled call, which does not look at its rows of that length."""
    texts = PackedTexts(torch.arange(length)[None])
    texts.on_host = None
    return grid._packed_count(texts)


@every_grid
def test_a_compiled_call_has_room_for_what_any_packed_rows_fill(grid):
    """`most[n]`: the chunks that are read in a row of n tokens, cut into the texts that read the most."""
    read, most = [len(read_in(grid, 0, length)) for length in range(31)], [0]
    for length in range(1, 31):
        most.append(max(most[length - last] + read[last] for last in range(1, length + 1)))
        assert most[length] <= most_latents(grid, length)


@given(grid=grids(), count=st.integers(1, 9))
def test_a_compiled_call_has_no_more_room_than_some_rows_fill(grid, count):
    """Texts that read two chunks fill it; where they are longer than both, it is a chunk for every g tokens."""
    pair = next(length for length in range(1, 99) if len(read_in(grid, 0, length)) == 2)
    if pair < 2 * grid.size:
        assert grid._packed_count(texts_of([[pair] * count])) == most_latents(grid, pair * count)
    else:
        assert most_latents(grid, count) == count // grid.size


@given(grid=grids(), lengths=texts())
def test_what_packed_rows_read(grid, lengths):
    places, readable = grid.packed_reads(texts_of(lengths), DEVICE)
    for row, row_lengths in enumerate(lengths):
        latents = [chunk[:2] for chunk in packed_chunks(grid, row_lengths)]
        starts = [sum(row_lengths[:index]) for index in range(len(row_lengths))]
        for start, length in zip(starts, row_lengths, strict=True):
            for column in range(start, start + length):
                read = Row(grid, start).read(column)
                assert readable[row, column] == (read is not None)
                if read is not None:
                    assert places[row, column] == latents.index((start, read[0])) * grid.size + read[1]


# -- padding and texts --------------------------------------------------------------------------------------------


@given(pads=st.lists(st.integers(0, 9), min_size=1, max_size=4), columns=st.integers(0, 12))
def test_left_padding(pads, columns):
    padding = padding_of(pads)
    real = [[column >= p for column in range(columns)] for p in pads]
    assert padding.on_host == pads and padding.real_columns(columns).tolist() == real
    assert padding.cropped(columns).on_host == [min(p, columns) for p in pads]
    for trailing in (0, 3):  # right padding is none of left padding, a row of zeros all of it
        mask = torch.tensor(real, dtype=torch.long).view(len(pads), columns)
        mask = torch.nn.functional.pad(mask, (0, trailing))
        expected = [p if p < columns else columns + trailing for p in pads]
        assert LeftPadding.of(mask).on_host == expected
        assert LeftPadding.of(mask.bool()).on_host == expected


@given(lengths=texts(), data=st.data())
def test_texts_count_from_0_on(lengths, data):
    position_ids = texts_of(lengths).position_ids  # whatever is cut
    row = data.draw(st.integers(0, len(position_ids) - 1))
    column = data.draw(st.integers(0, position_ids.shape[1] - 1))
    before = position_ids[row, column - 1].item() if column else -1
    wrong = data.draw(st.integers(-3, 50).filter(lambda value: value not in (0, before + 1)))
    position_ids[row, column] = wrong
    with pytest.raises(ValueError, match=rf"`position_ids`.*but row {row} has \[.*{wrong}\] up to column {column}\."):
        PackedTexts(position_ids)


@given(lengths=texts(), name=st.sampled_from(["cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"]), data=st.data())
def test_boundaries_are_where_positions_restart(lengths, name, data):
    """All texts of a batch, or some of them: a text that is said nowhere is only not said."""
    position_ids = texts_of(lengths).position_ids
    restarts = [index for index, position in enumerate(position_ids.flatten().tolist()) if position == 0]
    starts = sorted({0, *data.draw(st.lists(st.sampled_from(restarts)))})
    _check_boundaries({name: boundary(name, starts, position_ids)}, position_ids)
    inside = [index for index in range(position_ids.numel()) if index not in restarts]
    if inside:
        starts = sorted({*starts, wrong := data.draw(st.sampled_from(inside))})
        with pytest.raises(ValueError, match=rf"`{name}` must start a text only where.*starts \[.*\b{wrong}\b"):
            _check_boundaries({name: boundary(name, starts, position_ids)}, position_ids)


def boundary(name: str, starts: list[int], position_ids: torch.Tensor) -> torch.Tensor:
    """The argument of that name that says so: starts and the end of all, or the number of each token's text."""
    if name != "seq_idx":
        return torch.tensor([*starts, position_ids.numel()], dtype=torch.int32)
    index = torch.zeros(position_ids.numel(), dtype=torch.int32)
    index[starts] = 1
    return index.cumsum(0, dtype=torch.int32).view(position_ids.shape)
