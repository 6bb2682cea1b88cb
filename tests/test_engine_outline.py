"""What a step is told, rounded up and flat."""

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.engine.grid import tables_of
from pipeline.engine.outline import Outline, flat_of, numbers_of, rounded_up

MOST = Outline(rows=1024, longest_own=4096, slots=200, abreast=1024, longest_prefix=640)


@given(
    groups=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    alone=st.integers(0, 9),
    is_rounded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rows_find_their_slots_and_what_is_added_finds_nothing(
    groups: list[int], alone: int, is_rounded: bool, seed: int
) -> None:
    rng = random.Random(seed)
    slot_of = [slot for slot, count in enumerate(groups) for _ in range(count)] + [-1] * alone
    if not any(groups):
        slot_of.append(0)
    rng.shuffle(slot_of)
    rows = len(slot_of)
    own = [rng.randint(1, 300) for _ in slot_of]
    members = [[n for n, slot in enumerate(slot_of) if slot == s] for s in range(len(groups))]
    table, place_of = tables_of(members, tokens=range(rows))
    prefix_tokens = np.arange(len(groups)) + 500
    outline = Outline(rows, max(own), len(groups), table.shape[1], 640)
    if is_rounded:
        outline = rounded_up(outline, most=MOST)
    is_alone = np.array([slot < 0 for slot in slot_of], dtype=int)
    given = [np.array(own), np.arange(rows), prefix_tokens, table, place_of, is_alone]
    found = numbers_of(outline, flat_of(outline, given))
    assert found.own_tokens.tolist() == own + [1] * (outline.rows - rows)
    assert found.positions[:rows].tolist() == list(range(rows))
    assert found.prefix_tokens[len(groups) :].eq(0).all()
    assert found.is_alone.tolist() == is_alone.tolist() + [1] * (outline.rows - rows)
    for row, slot in enumerate(slot_of):
        if slot >= 0:
            at, column = divmod(int(found.place_of[row]), outline.abreast)
            assert (at, int(found.table[at, column])) == (slot, row)
    for slot, group in enumerate(members):
        assert set(found.table[slot].tolist()) <= set(group or [0])


@given(rows=st.integers(1, 1024), own=st.integers(1, 4096), slots=st.integers(0, 200), n=st.data())
def test_what_is_rounded_up_holds_what_there_is(
    rows: int, own: int, slots: int, n: st.DataObject
) -> None:
    abreast = n.draw(st.integers(1, rows)) if slots else 0
    outline = Outline(rows, own, slots, abreast, 600 if slots else 0)
    found = rounded_up(outline, most=MOST)
    for name in ("rows", "longest_own", "slots", "abreast", "longest_prefix"):
        assert getattr(outline, name) <= getattr(found, name) <= getattr(MOST, name)
    assert rounded_up(found, most=MOST) == found


def test_few_outlines_stand_for_all() -> None:
    found = {rounded_up(Outline(rows, 64), most=MOST).rows for rows in range(1, 1025)}
    assert len(found) == 20
    assert all(rounded_up(Outline(r, 64), most=MOST).rows <= 1.5 * r for r in range(1, 1025))
    assert {rounded_up(Outline(1, own), most=MOST).longest_own for own in range(1, 129)} == {
        64,
        128,
    }
