"""Coverage is set arithmetic: the laws, against Python's own sets."""

import json

from hypothesis import given
from hypothesis import strategies as st

from pipeline.coverage import Coverage, Ranges, ShardCoverage

pairs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)
ranges = pairs.map(Ranges.of)
units = st.dictionaries(st.sampled_from(["caption", "indoor", "questions"]), ranges)
totals = st.none() | st.integers(0, 60)


def shard_of(rows_total: int | None, covered: dict[str, Ranges]) -> ShardCoverage:
    return ShardCoverage("a.tar", "etag", rows_total, covered)


shards = st.builds(shard_of, totals, units)


def indexes(covered: Ranges) -> set[int]:
    return {index for start, stop in covered.pairs for index in range(start, stop)}


class TestRanges:
    @given(pairs)
    def test_of_is_the_union_of_its_pairs(self, some: list[tuple[int, int]]) -> None:
        expected = {index for start, stop in some for index in range(start, stop)}
        assert indexes(Ranges.of(some)) == expected

    @given(ranges)
    def test_pairs_are_sorted_not_empty_and_never_touch(self, some: Ranges) -> None:
        bounds = [bound for pair in some.pairs for bound in pair]
        assert bounds == sorted(set(bounds))

    @given(ranges)
    def test_one_set_has_one_form(self, some: Ranges) -> None:
        assert Ranges.of_indexes(indexes(some)) == some

    @given(ranges, ranges)
    def test_union_intersection_and_difference_are_those_of_sets(
        self, a: Ranges, b: Ranges
    ) -> None:
        assert indexes(a | b) == indexes(a) | indexes(b)
        assert indexes(a & b) == indexes(a) & indexes(b)
        assert indexes(a - b) == indexes(a) - indexes(b)

    @given(ranges, st.integers(-1, 61))
    def test_membership_and_length_are_those_of_sets(self, some: Ranges, index: int) -> None:
        assert (index in some) == (index in indexes(some))
        assert len(some) == len(indexes(some))

    @given(ranges, st.integers(0, 60), st.integers(0, 60))
    def test_covers_is_inclusion(self, some: Ranges, start: int, stop: int) -> None:
        assert some.covers(start, stop) == (set(range(start, stop)) <= indexes(some))


class TestShardCoverage:
    @given(shards)
    def test_json_gives_back_what_it_was_given(self, shard: ShardCoverage) -> None:
        assert ShardCoverage.from_json(json.loads(json.dumps(shard.to_json()))) == shard

    @given(shards, shards)
    def test_union_covers_what_either_covers(self, a: ShardCoverage, b: ShardCoverage) -> None:
        both = a | b
        for unit in ("caption", "indoor", "questions"):
            either = a.units.get(unit, Ranges()) | b.units.get(unit, Ranges())
            assert both.units.get(unit, Ranges()) == either

    @given(totals, units)
    def test_union_keeps_a_length_that_either_knows(
        self, total: int | None, covered: dict[str, Ranges]
    ) -> None:
        known, unknown = shard_of(total, covered), shard_of(None, {})
        assert (known | unknown).rows_total == (unknown | known).rows_total == total

    @given(shards, st.sets(st.sampled_from(["caption", "indoor", "questions"]), min_size=1))
    def test_a_row_is_answered_when_no_unit_is_missing(
        self, shard: ShardCoverage, wanted: set[str]
    ) -> None:
        answered = shard.answered_rows(sorted(wanted))
        for index in range(61):
            assert (index in answered) == (not shard.missing_units(index, sorted(wanted)))

    def test_missing_units_come_in_the_order_that_was_asked(self) -> None:
        shard = shard_of(None, {"b": Ranges.of([(0, 3)])})
        assert shard.missing_units(1, ["c", "b", "a"]) == ["c", "a"]

    def test_a_shard_is_complete_only_once_its_end_is_known(self) -> None:
        covered = {"caption": Ranges.of([(0, 3)])}
        assert not shard_of(None, covered).is_complete(["caption"])
        assert shard_of(3, covered).is_complete(["caption"])
        assert not shard_of(4, covered).is_complete(["caption"])
        assert not shard_of(3, covered).is_complete(["caption", "indoor"])

    def test_an_empty_shard_is_complete_once_it_was_read(self) -> None:
        assert shard_of(0, {}).is_complete(["caption"])


class TestCoverage:
    def test_what_is_added_for_one_shard_adds_up(self) -> None:
        first = shard_of(None, {"caption": Ranges.of([(0, 2)])})
        second = shard_of(3, {"caption": Ranges.of([(2, 3)])})
        coverage = Coverage([first, second])
        assert len(coverage) == 1
        assert coverage.of("a.tar", "etag").is_complete(["caption"])
        assert list(coverage) == [first | second]

    def test_another_identity_is_another_shard(self) -> None:
        coverage = Coverage([shard_of(3, {"caption": Ranges.of([(0, 3)])})])
        assert coverage.of("a.tar", "changed") == ShardCoverage("a.tar", "changed")
        assert len(coverage) == 1
