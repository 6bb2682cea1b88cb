"""Attention that torch compiles: the formula's values, for any lengths, compiled once."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from jobs.bench import Bench, build_engine, measure
from jobs.subject import load_subject
from jobs.workload import noise, questions
from pipeline.engine import prefill
from pipeline.engine.kernels import FEW, Kernels
from schemas.job import GenerateResources, ModelSpec
from tests.models import shared_checkpoint

pytestmark = [
    pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with g++, not here"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]

KV_HEADS, GROUP, DIM = 3, 2, 16
SCALE = DIM**-0.5


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    kernels = Kernels(torch.device("cpu"), torch.bfloat16, compiled=True)
    with torch.inference_mode():
        kernels.warm_up(kv_heads=KV_HEADS, group=GROUP, dim=DIM)
    return kernels


def formula(query, keys, bias):
    key, value = (each.double() for each in keys)
    scores = query.double() @ key.transpose(-1, -2) * SCALE
    scores = scores + bias.double()
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def hidden(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A bias that hides half of the keys, but never the first one."""
    bias = torch.zeros(shape, dtype=torch.bfloat16)
    bias.masked_fill_(torch.rand(shape, generator=generator) < 0.5, float("-inf"))
    bias[..., 0] = 0
    return bias


@pytest.mark.parametrize("queries", [GROUP, 2 * GROUP, FEW, FEW + 1, 40])
@pytest.mark.parametrize("hides", ["by sequence", "by query"])
@torch.inference_mode()
def test_what_is_compiled_is_the_formula(compiled: Kernels, queries: int, hides: str) -> None:
    generator = torch.Generator().manual_seed(queries)
    graphs = counters["stats"]["unique_graphs"]
    for sequences, columns in ((2, 3), (5, 33), (17, 200), (1, 9), (4, 1)):
        arena = torch.randn(2, sequences + 1, KV_HEADS, columns + 4, DIM, generator=generator)
        arena = arena.bfloat16()
        keys = arena[0, :sequences, :, :columns], arena[1, :sequences, :, :columns]
        query = torch.randn(sequences, KV_HEADS, queries, DIM, generator=generator).bfloat16()
        shapes = {"by sequence": (sequences, 1, 1), "by query": (1, 1, queries)}
        bias = hidden((*shapes[hides], columns), generator)
        part = compiled.attend(query, keys, bias, scale=SCALE)
        out, lse = formula(query, keys, bias)
        torch.testing.assert_close(part.attention.double(), out, atol=0.02, rtol=0.02)
        found_lse = part.highest.double() + part.total.double().log()
        torch.testing.assert_close(found_lse, lse, atol=0.02, rtol=0.01)
    assert counters["stats"]["unique_graphs"] == graphs, "a length was compiled"


@pytest.mark.parametrize("queries", [GROUP, FEW + 1])
@torch.inference_mode()
def test_a_query_that_sees_nothing_gets_numbers(compiled: Kernels, queries: int) -> None:
    keys = torch.ones(2, 4, KV_HEADS, 7, DIM, dtype=torch.bfloat16).unbind()
    query = torch.ones(4, KV_HEADS, queries, DIM, dtype=torch.bfloat16)
    bias = torch.zeros(4, 1, 1, 7, dtype=torch.bfloat16)
    bias[2] = float("-inf")
    part = compiled.attend(query, keys, bias, scale=SCALE)
    assert part.highest.isfinite().all()
    assert part.attention.isfinite().all()


@pytest.mark.parametrize("keys", [4, 4000])
@torch.inference_mode()
def test_float16_is_large_enough_for_many_large_values(keys: int) -> None:
    """A sum of 4,000 of these would be infinite."""
    kernels = Kernels(torch.device("cpu"), torch.float16, eager=True)
    query = torch.zeros(1, KV_HEADS, GROUP, DIM, dtype=torch.float16)
    pair = query.new_zeros(1, KV_HEADS, keys, DIM), query.new_full((1, KV_HEADS, keys, DIM), 60)
    part = kernels.attend(query, pair, query.new_zeros(1, 1, 1, keys), scale=SCALE)
    places = torch.arange(KV_HEADS * GROUP)
    alone = kernels.taken(part, places)
    torch.testing.assert_close(alone, torch.full_like(alone, 60))
    torch.testing.assert_close(
        kernels.join(part, places, part, places, blind=places < 0), torch.full_like(alone, 60)
    )


@pytest.mark.usefixtures("two_threads")
def test_an_engine_compiles_nothing_once_it_is_there() -> None:
    subject = load_subject(ModelSpec(path=str(shared_checkpoint()), dtype="bfloat16"))
    engine = build_engine(subject, resources=GenerateResources(compile=True))
    graphs = counters["stats"]["unique_graphs"]
    images = noise(subject.image_shape, 5, seed=0)
    for each in (3, 1):
        work = questions(subject.vocabulary, images, each=each, new_tokens=6, seed=each)
        engine.submit(work.requests(each))
    assert counters["stats"]["unique_graphs"] == graphs


def test_in_bfloat16_a_compiled_engine_says_what_the_model_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefill, "BLOCK_TOKENS", 7)
    bench = Bench(
        mode="vqa",
        images=6,
        questions=4,
        new_tokens=4,
        model=str(shared_checkpoint()),
        dtype="bfloat16",
        batch_sizes=(8,),
        rounds=1,
        checked=24,
        is_exact=False,
        compile=True,
    )
    measured = measure(bench, say=lambda _: None)
    assert measured["agreement"]["bfloat16"]["ok"], measured["agreement"]
