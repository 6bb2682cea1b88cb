"""Which answers stand: every way in which a shard can have changed, and both wishes."""

import pytest

from pipeline.coverage import Coverage, Ranges, ShardCoverage
from pipeline.footer import NULL_QUESTION
from pipeline.sources.base import Shard
from pipeline.versions import Versions

NOW = [Shard("same", "1"), Shard("changed", "2"), Shard("begun", "2"), Shard("new", "1")]


def covered(uri: str, identity: str, *, total: int | None = 3, rows: int = 3) -> ShardCoverage:
    units = {"caption": Ranges(((0, rows),)), NULL_QUESTION: Ranges(((0, 1),))}
    return ShardCoverage(uri, identity, total, units)


ANSWERED = Coverage(
    [
        covered("same", "1"),
        covered("changed", "1"),
        covered("begun", "1", total=None, rows=2),
        covered("gone", "1"),
        covered("gone-begun", "1", rows=2),
    ]
)


@pytest.mark.parametrize(
    ("on_change", "standing"),
    [("replace", ["same"]), ("keep", ["same", "changed", "gone", "gone-begun"])],
)
def test_what_stands(on_change: str, standing: list[str]) -> None:
    versions = Versions.of(NOW, ANSWERED, on_change=on_change)
    assert [shard.uri for shard in versions.standing(ANSWERED)] == standing


@pytest.mark.parametrize(
    ("on_change", "done"), [("replace", ["same"]), ("keep", ["same", "changed"])]
)
def test_what_is_not_to_be_answered(on_change: str, done: list[str]) -> None:
    versions = Versions.of(NOW, ANSWERED, on_change=on_change)
    complete = [
        s.uri for s in NOW if versions.done(s, ANSWERED, units=["caption"]).is_complete(["caption"])
    ]
    assert complete == done


def test_nobody_is_asked_a_new_question_about_what_cannot_be_read_any_more() -> None:
    versions = Versions.of(NOW, ANSWERED, on_change="keep")
    units = ["caption", "added"]
    assert versions.done(NOW[1], ANSWERED, units=units).is_complete(units)
    assert not versions.done(NOW[0], ANSWERED, units=units).is_complete(units)


def test_a_version_that_is_answered_again_takes_the_place_of_the_kept_one() -> None:
    answered = Coverage([covered("changed", "1"), covered("changed", "2", total=None, rows=1)])
    versions = Versions.of(NOW, answered, on_change="keep")
    assert [shard.identity for shard in versions.standing(answered)] == ["2"]


def test_an_answer_that_comes_late_about_an_old_version_does_not_stand() -> None:
    versions = Versions.of(NOW, Coverage([covered("changed", "2")]), on_change="keep")
    assert not versions.stand(covered("changed", "1"))
