"""Which engine answers for a model: slots where they are exact, else the plain one.

slots   text models whose attention can be given to them as a function
plain   attention scores that are capped, layers of other kinds; parts on several devices
        (`placement.py`); RoPE that depends on the longest prompt of a batch (dynamic, longrope),
        one prompt after the other
alone   models of no family (`family.py`), by their own `generate`
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.engine.placement import is_spread
from pipeline.engine.request import Engine
from schemas.errors import SpecError
from schemas.job import GenerateResources

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

BATCH_ROPES = frozenset({"dynamic", "longrope"})
SLOT_LAYERS = frozenset({"full_attention", "sliding_attention"})


def engine_of(  # noqa: PLR0913 (all but the model by name)
    model: "LlavaForConditionalGeneration",
    *,
    eos_token_ids: Sequence[int],
    table: np.ndarray | None,
    processor: Any = None,
    attention: str = "auto",
    resources: GenerateResources = GenerateResources(),  # noqa: B008 (frozen)
) -> Engine:
    """`table`: of `pixels.pixel_table`; null for a model of no family, which wants its `processor`.
    `attention`: as `model.attention` of a spec.

    Raises SpecError where `resources` ask for what does not work here.
    """
    if table is None:
        from pipeline.engine.alone import AloneEngine

        if resources.compile:
            raise SpecError(
                "resources.generate.compile: a model that is asked through its own generate is "
                "not compiled: set it to false"
            )
        return AloneEngine(model, processor=processor, eos_token_ids=eos_token_ids)
    if why_plain(model) is None:
        from pipeline.engine.slots import SlotsEngine

        return SlotsEngine(
            model,
            eos_token_ids=eos_token_ids,
            table=table,
            kv_budget_bytes=resources.kv_budget_bytes,
            attention=attention,
            compiled=resources.compile,
        )
    from pipeline.engine.plain import PlainEngine

    size = 1 if _rope_depends_on_the_batch(model) else resources.batch_size
    return PlainEngine(model, eos_token_ids=eos_token_ids, table=table, batch_size=size)


def why_plain(model: "LlavaForConditionalGeneration") -> str | None:
    """Why slots would not give what the model alone does; null where they do."""
    config: Any = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or SLOT_LAYERS)
    if is_spread(model):
        return "its parts lie on several devices (model.device_map)"
    if other := sorted(kinds - SLOT_LAYERS):
        return f"it has layers of {', '.join(other)}"
    if getattr(config, "attn_logit_softcapping", None):
        return "its attention scores are capped (attn_logit_softcapping)"
    if not getattr(model.model.language_model, "_supports_attention_backend", False):
        return f"{type(model.model.language_model).__name__} cannot be given another attention"
    if _rope_depends_on_the_batch(model):
        return f"its positions depend on the longest prompt of a batch ({_rope_type(model)} RoPE)"
    return None


def _rope_depends_on_the_batch(model: "LlavaForConditionalGeneration") -> bool:
    return _rope_type(model) in BATCH_ROPES


def _rope_type(model: "LlavaForConditionalGeneration") -> str | None:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    name: str | None = rope.get("rope_type")
    return name
