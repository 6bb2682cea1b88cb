"""What old processors say wrongly of how many places an image takes in a prompt, set right.

Checkpoints were converted before these keys of processor_config.json were known: they are missing,
or not those of the model. Where config.json leaves no doubt, its values are used:

    patch_size                        vision_config.patch_size
    vision_feature_select_strategy    the key of that name; `default` for VipLLaVA
    num_additional_image_tokens       what the vision tower puts before the patches (`TOWERS`)

A tower of another kind may put anything there: the last two keys stay as they are then. Runs on the
driver too, and imports neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engine.checkpoint import Checkpoint

FILE = "processor_config.json"
PATCH, STRATEGY, ADDITIONAL = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
)
UNSAID: Mapping[str, Any] = {PATCH: None, STRATEGY: None, ADDITIONAL: 0}
"""What a processor takes where the key is missing."""
TOWERS: Mapping[str, int] = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""By model_type: class tokens before the patches."""
USUAL_TOWER = "clip_vision_model"
"""Where config.json names none."""
FAMILIES: Mapping[str, str | None] = {"llava": None, "llava_next": None, "vipllava": "default"}
"""By model_type, those whose processors have these keys; the strategy that has no key."""


@dataclass(frozen=True)
class Repair:
    """One key of processor_config.json, and what is taken in its place."""

    key: str
    was: object
    now: object

    def __str__(self) -> str:
        said = "is missing" if self.was is None else f"is {self.was!r}"
        return (
            f"{FILE}: {self.key} {said}; {self.now!r} is used, since the model in config.json "
            f"{_because(self.key)}"
        )


def _because(key: str) -> str:
    return {
        PATCH: "cuts images into patches of that size",
        STRATEGY: "picks its image features so",
        ADDITIONAL: "has a vision tower that puts so many tokens before the patches",
    }[key]


def repairs(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[Repair]:
    """What has to be set right. `stored`: keys of the processor; `config`: of config.json.

    None where an image takes as many places with what is stored as with what is right.
    """
    family, vision = str(config.get("model_type")), config.get("vision_config") or {}
    if family not in FAMILIES:
        return []
    right = {PATCH: vision.get("patch_size")}
    extra = TOWERS.get(vision.get("model_type", USUAL_TOWER))
    if extra is not None:
        right[STRATEGY] = FAMILIES[family] or config.get(STRATEGY)
        right[ADDITIONAL] = extra
    right = {key: value for key, value in right.items() if value is not None}
    said = {key: stored.get(key, usual) for key, usual in UNSAID.items()}
    if _cut(said) == _cut({**said, **right}):
        return []
    return [Repair(k, stored.get(k), v) for k, v in right.items() if said[k] != v]


def _cut(keys: Mapping[str, Any]) -> tuple[object, int]:
    """What decides how many places there are: the size of a patch, and how many come on top."""
    return keys[PATCH], (keys[ADDITIONAL] or 0) - (keys[STRATEGY] == "default")


def repairs_of(checkpoint: Checkpoint) -> list[Repair]:
    """As far as config.json says by itself what is right."""
    return repairs(checkpoint.read_json(FILE), checkpoint.config)


def repaired(checkpoint: Checkpoint) -> bytes | None:
    """processor_config.json as transformers would write it, set right; null where nothing is."""
    found = repairs_of(checkpoint)
    if not found:
        return None
    whole = {**checkpoint.read_json(FILE), **{repair.key: repair.now for repair in found}}
    return (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()
