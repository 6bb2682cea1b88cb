"""What a model sees in images: each distinct one is looked at once while anybody waits for it."""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from pipeline.engine.compiling import attention_pays_on, compile_once, compiling
from pipeline.engine.family import FAMILIES
from pipeline.engine.kernels import by_products
from pipeline.engine.memory import Shortage, does_not_fit, within_memory
from pipeline.engine.pixels import normalised
from pipeline.engine.request import ImagePixels, Prefix
from schemas.errors import DeviceOutOfMemory, GenerateError, TokenFeatureMismatch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

IMAGES_AT_ONCE = 16
"""Tiles are images too, as far as the vision tower is concerned."""
TILES_DIMENSIONS = 4

PRODUCTS = "lavaflow_products"
"""An attention function, for the reason told in `kernels.py`. What transformers names "eager" does
the same, but torch's compiler knows that when it sees it, and puts its own kernel in the place."""


class Looker:
    """The vision tower, up to the layer that the model reads, and the projector.

    `table`: float32 [3, 256] of `pixels.pixel_table`. `compiled`: by torch, where that pays; for
    any number of images but one. Raises SpecError where that does not work here.
    """

    def __init__(
        self, model: "LlavaForConditionalGeneration", table: np.ndarray, *, compiled: bool = False
    ) -> None:
        self._model = model
        self._table = torch.from_numpy(table).to(model.device)
        cut_tower(model)
        if compiled and model.device.type == "cpu":
            _compile_tower(model)
        self._seen: dict[str, torch.Tensor | GenerateError] = {}
        self._wanted: Counter[str] = Counter()
        self._lock = threading.Lock()
        """Of what is wanted: callers want while the engine's thread lets go."""

    def want(self, prefix: Prefix) -> None:
        """Its images are to be kept, once they have been looked at, until `let_go` is called."""
        with self._lock:
            self._wanted.update({image.sha256 for image in prefix.images})

    def let_go(self, prefix: Prefix) -> None:
        """Undo `want`."""
        with self._lock:
            for sha256 in {image.sha256 for image in prefix.images}:
                self._wanted[sha256] -= 1
                if not self._wanted[sha256]:
                    del self._wanted[sha256]
                    self._seen.pop(sha256, None)

    def look(self, prefixes: Iterable[Prefix]) -> None:
        """Look at images that nobody has looked at yet."""
        fresh = {i.sha256: i for p in prefixes for i in p.images if i.sha256 not in self._seen}
        for images in alike(fresh.values()):
            self._look(images)

    def features(self, prefix: Prefix) -> torch.Tensor | GenerateError | None:
        """[tokens, hidden] for the image tokens of the prefix, or why there are none for it.

        Null for a prefix without images and without image tokens.
        """
        found = [self._seen[image.sha256] for image in prefix.images]
        for each in found:
            if isinstance(each, GenerateError):
                return each
        tensors = [each for each in found if isinstance(each, torch.Tensor)]
        n_tokens = list(prefix.token_ids).count(self._model.config.image_token_id)
        n_features = sum(map(len, tensors))
        if n_tokens != n_features:
            return mismatch(n_tokens, n_features)
        return torch.cat(tensors) if tensors else None

    def forget(self) -> None:
        with self._lock:
            self._seen.clear()
            self._wanted.clear()

    def _look(self, images: Sequence[ImagePixels]) -> None:
        """Where memory runs out, half as many at a time."""
        device = self._model.device
        found = within_memory(lambda: self._looked(images), device)
        if not isinstance(found, Shortage):
            self._seen.update(zip((i.sha256 for i in images), found, strict=True))
        elif len(images) == 1:
            self._seen[images[0].sha256] = no_room_for_image(images[0], device, found)
        else:
            half = (len(images) + 1) // 2
            self._look(images[:half])
            self._look(images[half:])

    def _looked(self, images: Sequence[ImagePixels]) -> Sequence[torch.Tensor]:
        return features_of(self._model, images, self._table)


def no_room_for_image(
    image: ImagePixels, device: torch.device, shortage: Shortage
) -> DeviceOutOfMemory:
    what = f"the image, {' x '.join(map(str, image.pixels.shape))} for the vision tower,"
    return DeviceOutOfMemory(does_not_fit(what, device, shortage))


def alike(images: Iterable[ImagePixels]) -> Iterator[list[ImagePixels]]:
    """Those with pixels of one shape, evenly many at a time, as the vision tower is given them."""
    by_shape: dict[tuple[int, ...], list[ImagePixels]] = {}
    for image in images:
        by_shape.setdefault(image.pixels.shape, []).append(image)
    for shape, some in by_shape.items():
        tiles = shape[0] if len(shape) == TILES_DIMENSIONS else 1
        at_once = max(1, IMAGES_AT_ONCE // tiles)
        rounds = -(-len(some) // at_once)
        for n in range(rounds):
            yield some[len(some) * n // rounds : len(some) * (n + 1) // rounds]


def features_of(
    model: "LlavaForConditionalGeneration", images: Sequence[ImagePixels], table: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Of each image, all with pixels of one shape, [tokens, hidden]."""
    stacked = torch.from_numpy(np.stack([image.pixels for image in images]))
    sizes = [image.size or image.pixels.shape[-2:-4:-1] for image in images]
    heights_first = torch.tensor([(height, width) for width, height in sizes])
    pixels = normalised(stacked, table).to(model.dtype)
    return FAMILIES[model.config.model_type].features(model, pixels, heights_first)


def cut_tower(model: "LlavaForConditionalGeneration") -> None:
    """Leave out the layers of the vision tower behind the one that is read.

    Whether the features stay the same is tried out. The config names the layer from the start then,
    so that whoever uses the model finds it.
    """
    wanted: int | Sequence[int] = model.config.vision_feature_layer
    owner: Any = _owner_of_layers(model)
    if owner is None:
        return
    layers: torch.nn.ModuleList = owner.layers
    named = [wanted] if isinstance(wanted, int) else wanted
    read = [n if n >= 0 else len(layers) + 1 + n for n in named]
    if max(read) >= len(layers):
        return
    before = _probe(model)
    owner.layers = layers[: max(read)]
    model.config.vision_feature_layer = read[0] if isinstance(wanted, int) else read
    try:
        is_same = torch.equal(_probe(model), before)
    except (RuntimeError, IndexError, TypeError):
        is_same = False
    if not is_same:
        owner.layers, model.config.vision_feature_layer = layers, wanted


def _products(  # noqa: PLR0913 (transformers' interface)
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """From [images, heads, patches, dim] to [images, patches, heads, dim]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    part = by_products(query, (key, value), attention_mask, scale)
    return part.attention.transpose(1, 2).contiguous(), None


AttentionInterface.register(PRODUCTS, _products)
AttentionMaskInterface.register(PRODUCTS, eager_mask)


def _compile_tower(model: "LlavaForConditionalGeneration") -> None:
    tower: Any = model.model.vision_tower
    if attention_pays_on(model.device, model.dtype):
        model.set_attn_implementation({"vision_config": PRODUCTS})
    plain, fast = tower.forward, compile_once(tower.forward)

    def forward(pixels: torch.Tensor, **options: Any) -> Any:
        # A single image would be compiled again, for itself, and so would another order of axes.
        return (fast if len(pixels) > 1 else plain)(pixels.contiguous(), **options)

    tower.forward = forward
    with compiling(model):
        _probe(model, images=2)


def _owner_of_layers(model: "LlavaForConditionalGeneration") -> torch.nn.Module | None:
    tower: torch.nn.Module = model.model.vision_tower
    depth = getattr(tower.config, "num_hidden_layers", None)
    for module in tower.modules():
        layers = getattr(module, "layers", None)
        if isinstance(layers, torch.nn.ModuleList) and len(layers) == depth:
            return module
    return None


@torch.inference_mode()
def _probe(model: "LlavaForConditionalGeneration", *, images: int = 1) -> torch.Tensor:
    side = model.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 3 * side * side, device=model.device).reshape(3, side, side)
    size, family = (side, side), FAMILIES[model.config.model_type]
    if family.has_tiles:
        size = min(model.config.image_grid_pinpoints, key=math.prod)
        tiles = 1 + math.prod(size) // side**2
        pixels = pixels.expand(tiles, 3, side, side)
    pixels = torch.stack([pixels.to(model.dtype)] * images)
    found = family.features(model, pixels, torch.tensor([list(size)] * images))
    return torch.cat(list(found))


def mismatch(n_tokens: int, n_features: int) -> TokenFeatureMismatch:
    """The likely culprit of the three, told from the difference."""
    if n_features - n_tokens == 1:
        remedy = (
            "set num_additional_image_tokens to 1 in processor_config.json, or bring its "
            "vision_feature_select_strategy in line with config.json"
        )
    elif n_tokens - n_features == 1:
        remedy = (
            "bring vision_feature_select_strategy of processor_config.json in line with "
            "config.json, or set num_additional_image_tokens to 0"
        )
    else:
        remedy = (
            "check patch_size in processor_config.json against vision_config.patch_size, then "
            "num_additional_image_tokens and vision_feature_select_strategy (of LLaVA-OneVision, "
            "num_image_tokens and vision_aspect_ratio)"
        )
    return TokenFeatureMismatch(
        f"the prompt has {n_tokens} image tokens, the model gives {n_features} features: {remedy}"
    )
