"""What old processors say wrongly of how many places an image takes in a prompt, set right.

Checkpoints were converted before these keys of processor_config.json were known: they are missing,
or not those of the model. Where config.json leaves no doubt, its values are used:

    patch_size                        vision_config.patch_size
    vision_feature_select_strategy    the key of that name; `default` for VipLLaVA
    num_additional_image_tokens       what the vision tower puts before the patches (`TOWERS`)
    num_image_tokens                  the patches of an image of the tower's size (LLaVA-OneVision)

A tower of another kind may put anything there: all but patch_size stay as they are then. Runs on
the driver too, and imports neither torch nor transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.engine.checkpoint import Checkpoint

FILE = "processor_config.json"
PATCH, STRATEGY, ADDITIONAL, PLACES = (
    "patch_size",
    "vision_feature_select_strategy",
    "num_additional_image_tokens",
    "num_image_tokens",
)
UNSAID: Mapping[str, Any] = {PATCH: None, STRATEGY: None, ADDITIONAL: 0, PLACES: None}
"""What a processor takes where the key is missing."""
TOWERS: Mapping[str, int] = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""By model_type: class tokens before the patches."""
USUAL_TOWER = "clip_vision_model"
"""Where config.json names none."""
KEYS: Mapping[str, tuple[str, ...]] = {
    "llava": (PATCH, STRATEGY, ADDITIONAL),
    "llava_next": (PATCH, STRATEGY, ADDITIONAL),
    "llava_onevision": (STRATEGY, PLACES),
    "vipllava": (PATCH, STRATEGY, ADDITIONAL),
}
"""By model_type: what its processor has of them."""


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
        PLACES: "cuts an image of its tower's size into so many patches",
    }[key]


def repairs(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[Repair]:
    """What has to be set right. `stored`: keys of the processor; `config`: of config.json.

    None where an image takes as many places with what is stored as with what is right.
    """
    right = _right(config)
    said = {key: stored.get(key, usual) for key, usual in UNSAID.items()}
    if _cut(said) == _cut({**said, **right}):
        return []
    return [Repair(k, stored.get(k), v) for k, v in right.items() if said[k] != v]


def _right(config: Mapping[str, Any]) -> dict[str, Any]:
    """The processor's keys, as far as config.json tells them."""
    known, keys = _told(config), KEYS.get(str(config.get("model_type")), ())
    return {key: known[key] for key in keys if known.get(key) is not None}


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    vision = config.get("vision_config") or {}
    patch, side = vision.get("patch_size"), vision.get("image_size")
    extra = TOWERS.get(vision.get("model_type", USUAL_TOWER))
    if extra is None:
        return {PATCH: patch}
    # VipLLaVA has no key for it.
    strategy = "default" if config.get("model_type") == "vipllava" else config.get(STRATEGY)
    places = (side // patch) ** 2 if side and patch else None
    return {PATCH: patch, STRATEGY: strategy, ADDITIONAL: extra, PLACES: places}


def _cut(keys: Mapping[str, Any]) -> tuple[object, object, int]:
    """What decides how many places there are: of patches, and what comes on top."""
    return keys[PATCH], keys[PLACES], (keys[ADDITIONAL] or 0) - (keys[STRATEGY] == "default")


def repairs_of(checkpoint: Checkpoint) -> list[Repair]:
    """As far as config.json says by itself what is right."""
    return repairs(checkpoint.read_json(FILE), checkpoint.config)


def repaired(checkpoint: Checkpoint) -> bytes | None:
    """processor_config.json as transformers would write it, set right; null where nothing is."""
    if not repairs_of(checkpoint):
        return None
    whole = {**checkpoint.read_json(FILE), **_right(checkpoint.config)}
    return (json.dumps(whole, indent=2, sort_keys=True) + "\n").encode()
