"""The promise that an answer does not depend on the batch, on questions that nobody here wrote."""

from benchmarks.exactness import compare
from tools.easy_vqa_data import load_split


def test_batches_of_1_and_16_answer_as_generate_does_on_each_prompt_alone() -> None:
    figures = compare(load_split("test")[:10])
    assert figures["differences"] == []
    assert figures["equal"] == figures["prompts"] > 90
