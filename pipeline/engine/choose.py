"""Which engine answers for a model: slots where they are exact, else the plain one.

slots   text models whose attention can be given to them as a function
plain   attention scores that are capped, layers of other kinds, `model.attention:
        flash_attention_2`; RoPE that depends on the longest prompt of a batch (dynamic,
        longrope), one prompt after the other
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engine.request import Engine
from schemas.job import GenerateResources

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

BATCH_ROPES = frozenset({"dynamic", "longrope"})
SLOT_LAYERS = frozenset({"full_attention", "sliding_attention"})


def engine_of(
    model: "LlavaForConditionalGeneration",
    *,
    eos_token_ids: Sequence[int],
    table: np.ndarray,
    attention: str = "auto",
    resources: GenerateResources = GenerateResources(),  # noqa: B008 (frozen)
) -> Engine:
    """`table`: of `pixels.pixel_table`. `attention`: as `model.attention` of a spec.

    Raises SpecError where `resources` ask for what does not work here.
    """
    if attention != "flash_attention_2" and can_pack(model):
        from pipeline.engine.slots import SlotsEngine

        return SlotsEngine(
            model,
            eos_token_ids=eos_token_ids,
            table=table,
            kv_budget_bytes=resources.kv_budget_bytes,
            eager=attention == "eager",
            compiled=resources.compile,
        )
    from pipeline.engine.plain import PlainEngine

    size = 1 if _rope_depends_on_the_batch(model) else resources.batch_size
    return PlainEngine(model, eos_token_ids=eos_token_ids, table=table, batch_size=size)


def can_pack(model: "LlavaForConditionalGeneration") -> bool:
    """Whether slots give what the model alone would."""
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or SLOT_LAYERS)
    return (
        kinds <= SLOT_LAYERS
        and not getattr(config, "attn_logit_softcapping", None)
        and bool(getattr(model.model.language_model, "_supports_attention_backend", False))
        and not _rope_depends_on_the_batch(model)
    )


def _rope_depends_on_the_batch(model: "LlavaForConditionalGeneration") -> bool:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return rope.get("rope_type") in BATCH_ROPES
