"""Small steps take one thread; prompts and larger steps take those that there are."""

import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pipeline.engine import threads
from pipeline.engine.compiling import compile_once
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
    if not is_small:
        monkeypatch.setattr(threads, "ONE_THREADS_BYTES", 0)
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
    layer = sum(weight.nbytes for weight in text.layers[0].parameters())
    enough = Threads(text)
    assert enough.most_rows == threads.ONE_THREADS_BYTES // layer
    for rows, expected in ((enough.most_rows, 1), (enough.most_rows + 1, 2)):
        with enough.enough_for(rows):
            assert torch.get_num_threads() == expected


def test_quantized_weights_are_unpacked_by_all_threads() -> None:
    text = tiny_model().model.language_model
    packed = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    text.layers[0].register_parameter("packed", packed)
    assert Threads(text).most_rows == 0


def test_an_error_leaves_the_number_as_it_was() -> None:
    enough = Threads(tiny_model().model.language_model)
    with pytest.raises(RuntimeError), enough.enough_for(1):
        raise RuntimeError("out of memory")
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++, which is not here")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_is_compiled_is_run_by_fewer_threads_as_it_is() -> None:
    numbers, twice = torch.arange(8.0), compile_once(lambda numbers: numbers * 2)
    found = [twice(numbers)]
    graphs = counters["stats"]["unique_graphs"]
    torch.set_num_threads(1)
    found.append(twice(numbers))
    assert all(torch.equal(each, numbers * 2) for each in found)
    assert counters["stats"]["unique_graphs"] == graphs
