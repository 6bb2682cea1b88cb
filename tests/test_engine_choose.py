"""Which engine a model gets."""

from typing import Any

import pytest

from pipeline.engine.choose import engine_of, why_plain
from pipeline.engine.pixels import pixel_table
from pipeline.engine.plain import PlainEngine
from pipeline.engine.slots import SlotsEngine
from schemas.errors import SpecError
from tests.models import tiny_model, tiny_processor


def rope(kind: str) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, "factor": 2.0}}


def engine(model: Any, **options: Any) -> Any:
    return engine_of(model, eos_token_ids=[2], table=pixel_table(tiny_processor()), **options)


@pytest.mark.parametrize("keys", [{}, rope("linear")])
def test_slots_answer_where_they_are_exact(keys: dict[str, Any]) -> None:
    assert isinstance(engine(tiny_model(**keys)), SlotsEngine)


def test_rope_that_depends_on_the_batch_gets_one_prompt_after_the_other() -> None:
    found = engine(tiny_model(**rope("dynamic")))
    assert isinstance(found, PlainEngine)
    assert found._batch_size == 1


def test_flash_attention_without_its_package_is_refused() -> None:
    with pytest.raises(SpecError, match=r"flash_attention_2: .*set model.attention to sdpa"):
        engine(tiny_model(), attention="flash_attention_2")


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        (
            "attn_logit_softcapping",
            30.0,
            "its attention scores are capped (attn_logit_softcapping)",
        ),
        (
            "layer_types",
            ["full_attention", "linear_attention"],
            "it has layers of linear_attention",
        ),
        (
            "rope_parameters",
            rope("dynamic")["rope_parameters"],
            "its positions depend on the longest prompt of a batch (dynamic RoPE)",
        ),
    ],
)
def test_attention_of_another_kind_is_not_packed(key: str, value: Any, why: str) -> None:
    model = tiny_model()
    assert why_plain(model) is None
    setattr(model.config.get_text_config(), key, value)
    assert why_plain(model) == why
