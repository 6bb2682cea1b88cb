"""Steps of a small model take one thread; prompts and larger models take those that there are."""

from typing import Any

import pytest
import torch

from pipeline.engine import threads
from pipeline.engine.threads import Threads
from tests.engine_cases import cases_of, engine_for, request_of
from tests.models import tiny_model, tiny_processor

pytestmark = pytest.mark.usefixtures("two_threads")


def passes_of(engine: Any) -> list[tuple[int, int]]:
    """Tokens and threads of each pass that the engine is about to run."""
    found, run = [], engine._language.run

    def told(what: Any, embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        found.append((len(embeds), torch.get_num_threads()))
        read: torch.Tensor = run(what, embeds, positions)
        return read

    engine._language.run = told
    return found


@pytest.mark.parametrize("is_small", [True, False])
def test_one_thread_reads_the_tokens_of_a_small_models_step(
    monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    processor = tiny_processor()
    monkeypatch.setattr(threads, "FEWEST_ROWS", 16 if is_small else 10**9)
    engine = engine_for("slots", tiny_model(), processor)
    passes = passes_of(engine)
    requests = [request_of(processor, case) for case in cases_of(5, 1)]
    engine.submit(requests)
    steps = {n for tokens, n in passes if tokens <= len(requests)}
    prompts = {n for tokens, n in passes if tokens > len(requests)}
    assert (steps, prompts) == ({1 if is_small else 2}, {2})
    assert torch.get_num_threads() == 2


def test_more_rows_than_one_thread_is_enough_for() -> None:
    text = tiny_model().model.language_model
    layer = sum(weight.numel() for weight in text.layers[0].parameters())
    enough = Threads(text)
    assert enough.most_rows == threads.ONE_THREADS_PRODUCTS // layer
    for rows, expected in ((enough.most_rows, 1), (enough.most_rows + 1, 2)):
        with enough.enough_for(rows):
            assert torch.get_num_threads() == expected


def test_an_error_leaves_the_number_as_it_was() -> None:
    enough = Threads(tiny_model().model.language_model)
    with pytest.raises(RuntimeError), enough.enough_for(1):
        raise RuntimeError("out of memory")
    assert torch.get_num_threads() == 2
