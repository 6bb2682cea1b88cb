"""Choosing among answers, on questions that nobody here wrote."""

import pytest

from benchmarks.choices import compare
from tools.easy_vqa_data import load_split


def test_choices_over_the_answers_there_are_score_at_least_what_free_answers_do() -> None:
    figures = compare(load_split("test")[:8])
    assert figures["choices"] == 13
    assert figures["questions"] > 70
    assert figures["right"]["chosen"] >= figures["right"]["free"] > 0.9
    assert figures["largest_distance_of_a_sum_from_1"] == pytest.approx(0.0, abs=1e-5)
