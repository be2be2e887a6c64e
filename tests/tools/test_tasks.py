"""Synthetic tasks: their rows beside a stack and a loop of hops that are written out, and which answers are right."""

from collections import Counter

import numpy as np
import pytest
from documents import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from workshop.experiments.plan import load_experiment
from workshop.tasks import rows as task_rows
from workshop.tasks.dyck import Dyck, open_brackets, walk
from workshop.tasks.hops import Hops, answers, chains
from workshop.tasks.rows import digest, draw_rows, make_dataset, make_task
from workshop.tasks.scoring import add_right, bins, count_right
from workshop.tokenizers import make_word_tokenizer, save_tokenizer

DYCK = {"name": "dyck", "types": 3, "depth": 4, "longest": 16, "mean_length": 9, "rows": 40}
HOPS = {"name": "hops", "hops": 3, "letters": 4, "length": 12, "rows": 40}


def stacks(string: list[int], types: int) -> list[list[tuple[int, int]]]:
    """The open brackets, type and place, behind each place; AssertionError where a bracket closes another one."""
    stack, found = [], []
    for place, bracket in enumerate(string):
        if bracket < types:
            stack.append((bracket, place))
        else:
            assert stack.pop()[0] == bracket - types
        found.append(list(stack))
    return found


def hop(letters: list[int], place: int) -> int:
    """find_1 by its definition, places counted from 1: max({0} and all j <= i whose v_{j-1} is v_i)."""
    found = [j for j in range(2, place + 1) if letters[j - 2] == letters[place - 1]]
    return max([0, *found])


def hop_often(letters: list[int], place: int, hops: int) -> int:
    for _ in range(hops):
        place = hop(letters, place) if place else 0
    return place


# -- Dyck -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 10), st.integers(2, 40), st.booleans(), st.integers(0, 9))
def test_strings_are_nested_bounded_in_depth_and_length_and_end_closed(types, depth, longest, longer, seed):
    shortest, longest = (longest + 1, 2 * longest) if longer else (1, longest)
    strings, lengths = walk(200, types, depth, shortest, longest, np.random.default_rng(seed))
    assert lengths.max() > 0
    for string, length in zip(strings.tolist(), lengths.tolist(), strict=True):
        if length:
            assert shortest <= length <= longest
            found = stacks(string[:length], types)
            assert not found[-1] and max(map(len, found)) <= depth


def test_the_walk_has_the_published_probabilities():
    """Of strings that may be so long that none is left out: half of the choices end, open or close."""
    strings, lengths = walk(4000, 3, 4, 1, 400, np.random.default_rng(0))
    assert lengths.min() > 0
    opens, ends, types = Counter(), Counter(), Counter()
    for string, length in zip(strings.tolist(), lengths.tolist(), strict=True):
        depth = 0
        for place in range(length):
            opens[depth, string[place] < 3] += 1
            ends[False] += depth == 0 and place > 0
            types[string[place] % 3] += 1
            depth += 1 if string[place] < 3 else -1
        ends[True] += 1
    assert opens[0, False] == opens[4, True] == 0 and opens[4, False] > 1000
    for depth in (1, 2, 3):
        assert opens[depth, True] / (opens[depth, True] + opens[depth, False]) == pytest.approx(0.5, abs=0.02)
    assert ends[True] / ends.total() == pytest.approx(0.5, abs=0.02)
    assert all(count / types.total() == pytest.approx(1 / 3, abs=0.02) for count in types.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 9))
def test_open_brackets_are_those_of_a_stack(types, depth, seed):
    strings, lengths = walk(20, types, depth, 1, 60, np.random.default_rng(seed))
    padded = np.where(np.arange(60) < lengths[:, None], strings, -5)
    top, distance, height = open_brackets(padded, types, depth)
    for row, length in enumerate(lengths):
        for place, stack in enumerate(stacks(strings[row, :length].tolist(), types)):
            assert height[row, place] == len(stack)
            assert top[row, place] == (stack[-1][0] if stack else -1)
            if stack:
                assert distance[row, place] == place + 1 - stack[-1][1]
        assert (top[row, length:] == -1).all()


def test_a_closing_bracket_is_predicted_above_four_fifths_of_all_closing_ones():
    task = make_task(DYCK)
    drawn = [ids for ids, _ in draw_rows(task, 12)["validation"]]
    ids = np.zeros((12, max(map(len, drawn))), np.int64)
    for row, found in enumerate(drawn):
        ids[row, : len(found)] = found
    logits = np.random.default_rng(0).normal(scale=3, size=(*ids.shape, 9))
    right, total = Counter(), Counter()
    for row, found in enumerate(drawn):
        for place, stack in enumerate(stacks([int(token) - 3 for token in found[1:-1]], 3)):
            if not stack:
                continue
            shares = np.exp(logits[row, place + 1]) / np.exp(logits[row, place + 1]).sum()
            closed = shares[3 + 3 + stack[-1][0]] / shares[6:9].sum() > 0.8
            gap = place + 1 - stack[-1][1]
            bin_of = next(f"{low}-{2 * low - 1}" if low > 1 else "1" for low in (8, 4, 2, 1) if gap >= low)
            for name in ("all", f"distance {bin_of}", f"depth {len(stack)}"):
                right[name] += closed
                total[name] += 1
    logits[:3] += 2000  # a softmax does not see what is added to all
    logits[7:] -= 2000
    found = add_right([task.score(logits[:5], ids[:5]), task.score(logits[5:], ids[5:])])
    assert found == {name: [right[name], total[name]] for name in total} and 0 < right["all"] < total["all"]
    assert list(found)[0] == "all" and len(found) > 6


# -- hops -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 99))
def test_answers_are_those_of_the_definition(letters, length, seed):
    generator = np.random.default_rng(seed)
    sequences, hops = generator.integers(letters, size=(8, length)), generator.integers(1, 5, size=8)
    found = answers(sequences, hops, letters)
    for row in range(8):
        sequence = sequences[row].tolist()
        for place in range(length):
            end = hop_often(sequence, place + 1, int(hops[row]))
            assert found[row, place] == (sequence[end - 1] if end else -1)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 12), st.integers(0, 99))
def test_from_the_last_letter_every_hop_leads_to_another_place(hops, letters, more, seed):
    length = 2 * hops + 1 + more
    for sequence in chains(30, hops, letters, length, np.random.default_rng(seed)).tolist():
        places = [hop_often(sequence, length, count) for count in range(hops + 1)]
        assert places[-1] > 1 and places == sorted(set(places), reverse=True)
        assert max(sequence) < letters


def test_hops_lie_anywhere_and_no_letter_is_the_likely_answer():
    sequences = chains(4000, 3, 4, 24, np.random.default_rng(0))
    ends = Counter(hop_often(sequence, 24, 3) for sequence in sequences.tolist())
    letters = Counter(answers(sequences, np.full(4000, 3), 4)[:, -1].tolist())
    assert len(ends) == 18  # places 2 to 19: the other pairs need 4 places, the last letter one
    assert max(ends.values()) < 800
    assert all(count / 4000 == pytest.approx(0.25, abs=0.03) for count in letters.values()) and len(letters) == 4


def test_the_most_frequent_letter_is_right_as_often_as_the_pages_say():
    plan = load_experiment(ROOT / "scripts" / "experiments" / "hops.yaml")
    ids = np.stack([ids for ids, _ in draw_rows(plan.drawn, plan.evaluation_blocks)["validation"]])
    frequent = np.array([np.bincount(row[2:-1]).argmax() for row in ids])
    right = [f"{(frequent == ids[:, -1])[ids[:, 1] == hops + 2].mean():.0%}" for hops in (1, 2, 3, 4)]
    for page in ("experiments.md", "results.md"):
        text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
        assert f"in {right[0]}, {right[1]}, {right[2]} and {right[3]}" in text


def test_a_row_is_the_number_of_hops_the_letters_and_the_answer():
    task = make_task(HOPS)
    rows = draw_rows(task, 31)
    assert Counter(int(ids[1]) for ids, _ in rows["validation"]) == {3: 11, 4: 10, 5: 10}
    for ids, labels in rows["train"] + rows["validation"]:
        hops, letters = int(ids[1]) - 2, [int(token) - 6 for token in ids[2:-1]]
        assert ids[0] == 1 and 1 <= hops <= 3 and len(ids) == len(labels) == task.longest_row == 15
        assert (labels[:3] == -100).all() and labels[-1] == ids[-1]
        for place in range(1, 13):  # what follows a place is predicted there
            end = hop_often(letters, place, hops)
            assert labels[place + 2] == (letters[end - 1] + 6 if end else -100)


def test_the_answer_is_the_most_probable_token_behind_the_sequence():
    task = make_task(HOPS)
    ids = np.stack([ids for ids, _ in draw_rows(task, 9)["validation"]])
    logits = np.random.default_rng(0).normal(size=(9, 15, 10))
    for row in (0, 1, 5):
        logits[row, 13, ids[row, 14]] = 9
    for row in (2, 3, 4, 6, 7, 8):
        logits[row, 13, ids[row, 14]] = -9
    assert task.score(logits, ids) == {"all": [3, 9], "hops 1": [1, 3], "hops 2": [1, 3], "hops 3": [1, 3]}


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [DYCK, HOPS], ids=["dyck", "hops"])
def test_no_row_of_training_is_evaluated(settings):
    task = make_task(settings | {"rows": 3000})
    rows = draw_rows(task, 300)
    seen = {ids.tobytes() for ids, _ in rows["train"]}
    assert [len(found) for found in rows.values()] == [3000, *[300] * (len(task.splits) - 1)]
    for split in task.splits[1:]:
        assert not seen & {ids.tobytes() for ids, _ in rows[split]}
    if "longer" in rows:
        assert max(len(ids) for ids, _ in rows["train"]) <= 18 < min(len(ids) for ids, _ in rows["longer"])
        assert max(len(ids) for ids, _ in rows["longer"]) <= task.longest_row == 34


def test_a_language_that_training_exhausts_is_refused():
    with pytest.raises(ValueError, match="`rows` of `task` must leave other rows for validation, but got 200"):
        draw_rows(make_task(DYCK | {"types": 1, "longest": 2, "mean_length": 4, "rows": 200}), 1)


DIGESTS = {
    "dyck": ("48412097a617", "3e55e10324d4", "f00fb7b30dae"),
    "hops": ("5bfdd0671b9e", "14b1f1bd6f4f"),
}


@pytest.mark.parametrize("settings", [DYCK, HOPS], ids=["dyck", "hops"])
def test_rows_are_the_same_everywhere(settings):
    rows = draw_rows(make_task(settings), 10)
    assert tuple(digest(found)[:12] for found in rows.values()) == DIGESTS[settings["name"]]
    assert digest(rows["train"]) != digest(rows["train"][::-1])
    ids, labels = rows["train"][0]
    assert digest([(ids, labels)]) != digest([(ids, np.where(labels == labels[-1], 0, labels))])
    assert draw_rows(make_task(settings), 20)["validation"][9][0].tolist() == rows["validation"][9][0].tolist()


@pytest.mark.parametrize("settings", [DYCK, HOPS], ids=["dyck", "hops"])
def test_the_tokenizer_has_the_ids_of_the_rows(settings, tmp_path):
    task = make_task(settings)
    save_tokenizer(make_word_tokenizer(task.words, task.template), tmp_path, task.longest_row)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 3 + len(task.words) and tokenizer.pad_token_id == 0
    for ids, _ in draw_rows(task, 5)["validation"]:
        words = " ".join(task.words[token - 3] for token in ids if token > 2)
        assert tokenizer(words)["input_ids"] == ids.tolist()
    with pytest.raises(Exception, match="WordLevel error"):
        tokenizer("(1 x")


@pytest.mark.parametrize("settings", [DYCK, HOPS], ids=["dyck", "hops"])
def test_a_dataset_holds_rows_of_their_own_lengths(settings):
    rows = draw_rows(make_task(settings), 5)["train"]
    dataset = make_dataset(rows)
    assert dataset["input_ids"][:] == [ids.tolist() for ids, _ in rows]
    assert dataset["labels"][:] == [labels.tolist() for _, labels in rows]


@pytest.mark.parametrize(
    "settings, words",
    [
        (DYCK | {"name": "dick"}, r"`name` of `task` must be one of \['dyck', 'hops'\], but got 'dick'"),
        ({"types": 3}, r"`name` of `task`.*None"),
        (DYCK | {"hops": 3}, r"`task` dyck must hold exactly \['types', 'depth', .*, but got .*'hops'"),
        ({"name": "hops"}, r"`task` hops must hold exactly \['hops', 'letters', 'length', 'rows'\], but got \[\]"),
        (DYCK | {"depth": 0}, "`depth` of `task` must be an integer >= 1, but got 0"),
        (DYCK | {"rows": 1.5}, "`rows` of `task` must be an integer >= 1, but got 1.5"),
        (DYCK | {"types": True}, "`types` of `task` must be an integer >= 1, but got True"),
        (HOPS | {"letters": 27}, "`letters` must be at most 26, but got 27"),
        (HOPS | {"length": 6}, "`length` must be above twice hops 3, but got 6"),
    ],
)
def test_bad_tasks_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        make_task(settings)


def test_right_answers_are_counted_and_sorted_by_number():
    right, numbers = np.array([True, False, True, True]), np.array([1, 2, 16, 3])
    found = count_right(right, {"distance": bins(numbers)})
    assert found == {"all": [3, 4], "distance 1": [1, 1], "distance 2-3": [1, 2], "distance 16-31": [1, 1]}
    assert list(add_right([{"hops 10": [1, 2]}, {"hops 2": [0, 1], "all": [1, 3]}, {"hops 10": [1, 1]}])) == [
        *("all", "hops 2", "hops 10")
    ]
    assert add_right([{"a 1": [1, 2]}, {"a 1": [2, 3]}]) == {"a 1": [3, 5]}
    assert bins(np.array([1, 2, 3, 4, 7, 8, 255, 256])).tolist() == [
        *("1", "2-3", "2-3", "4-7", "4-7", "8-15", "128-255", "256-511")
    ]


def test_every_task_says_what_it_is():
    assert set(task_rows.TASKS.values()) == {Dyck, Hops}
    assert make_task(DYCK).title == "Dyck-(3, 4)" and make_task(HOPS).title.endswith("p up to 3, n = 12")
    assert make_task(DYCK).words == ["(1", "(2", "(3", "1)", "2)", "3)"]
    assert make_task(HOPS).words == ["1", "2", "3", "a", "b", "c", "d"]
