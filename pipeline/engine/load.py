"""A checkpoint into memory: its processor for the CPU actors, its model for the accelerator.

Embedded, local and hub checkpoints take the same way. torch and transformers are imported inside
the functions, so that the driver and `--help` never pay for them.
"""

import contextlib
import gc
import importlib.util
import logging
import pickle
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from pipeline.engine import placement, quantization, trust
from pipeline.engine.checkpoint import Checkpoint, dtype_name, family_of, open_checkpoint
from pipeline.engine.family import Family
from pipeline.engine.repair import UNSAID, Repair, repairs
from pipeline.engine.tokens import check_fit
from schemas.errors import SpecError
from schemas.job import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor


CUTTING = ("truncation", "truncation_strategy", "max_length", "stride")
FILLING = ("padding", "pad_to_multiple_of")
"""Settings of a tokenizer that decide how long a prompt is, whatever it says."""


def import_libraries() -> None:
    """Import torch and what every checkpoint needs of transformers, once in a worker's life.

    What they bring stays, so it is not looked through for garbage, now or later: that is a quarter
    of the time that a worker takes to start. Nothing has been loaded yet of which some may go.
    """
    gc.disable()
    try:
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def load_family(spec: ModelSpec) -> Family:
    return family_of(open_checkpoint(spec))


def load_config(spec: ModelSpec) -> "LlavaConfig":
    """The configuration with the defaults of its parts filled in; no weights."""
    from transformers import AutoConfig

    checkpoint = open_checkpoint(spec)
    with _quiet(), _faults_of(checkpoint):
        kind = AutoConfig if spec.trust_remote_code else family_of(checkpoint).config_class()
        config: LlavaConfig = kind.from_pretrained(
            checkpoint.fetched(), revision=checkpoint.revision, **trust.load_options(spec)
        )
        return config


def load_processor(spec: ModelSpec) -> "LlavaProcessor":
    """The checkpoint's processor on the PIL backend, padding left.

    The backend is named because transformers picks torchvision's wherever that is installed, whose
    resizing gives other pixels. Prompts are neither cut nor filled up, whatever the files say. What
    it says wrongly of an image's places is set right, and told in the log. Raises SpecError where
    processor and model do not fit each other.
    """
    processor = _processor(spec, padding_side="left")
    if getattr(processor.image_processor, "backend", None) != "pil":
        raise SpecError(
            f"model {spec.path}: {type(processor.image_processor).__name__} has no PIL backend"
        )
    _leave_lengths(processor.tokenizer)
    config = load_config(spec)
    if load_family(spec).is_fast:
        for repair in _repairs(processor, config):
            logging.getLogger(__name__).warning("model %s: %s", spec.path, repair)
            setattr(processor, repair.key, repair.now)
        _check_image(processor, config, name=spec.path)
    check_fit(
        spec.path,
        processor.tokenizer.get_vocab(),
        image_token=getattr(processor, "image_token", None),
        # On the slow path, how a processor marks images is its own business.
        image_token_id=config.image_token_id if load_family(spec).is_fast else None,
        embedded=config.get_text_config().vocab_size,
    )
    return processor


def _leave_lengths(tokenizer: Any) -> None:
    """A prompt that is cut loses image tokens; one that is too long is a failed row."""
    for key in (*CUTTING, *FILLING):
        tokenizer.init_kwargs.pop(key, None)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        backend.no_truncation()
        backend.no_padding()


def processor_repairs(spec: ModelSpec) -> list[Repair]:
    """What `load_processor` sets right."""
    return _repairs(_processor(spec), load_config(spec))


def _repairs(processor: "LlavaProcessor", config: "LlavaConfig") -> list[Repair]:
    stored = {key: getattr(processor, key, usual) for key, usual in UNSAID.items()}
    return repairs(stored, config.to_dict())


def own_padding_side(spec: ModelSpec) -> str:
    """`left` or `right`: where the checkpoint's tokenizer pads, if it is not told otherwise."""
    side: str = _processor(spec).tokenizer.padding_side
    return side


def _processor(spec: ModelSpec, **options: str) -> "LlavaProcessor":
    from transformers import AutoProcessor

    checkpoint = open_checkpoint(spec)
    with _quiet(), _faults_of(checkpoint):
        own = family_of(checkpoint).processor_class
        kind = AutoProcessor if spec.trust_remote_code else own()
        processor: LlavaProcessor = kind.from_pretrained(
            checkpoint.fetched(),
            revision=checkpoint.revision or "main",
            backend="pil",
            **trust.load_options(spec),
            **options,
        )
        return processor


def _check_image(processor: "LlavaProcessor", config: "LlavaConfig", *, name: str) -> None:
    wanted = "num_image_tokens" if hasattr(processor, "num_image_tokens") else "patch_size"
    if not getattr(processor, wanted):
        raise SpecError(
            f"model {name}: {wanted} of processor_config.json is {getattr(processor, wanted)}, and "
            "vision_config of config.json does not tell the right one: set it"
        )
    _check_tiles(processor, config, name=name)


def _check_tiles(processor: Any, config: Any, *, name: str) -> None:
    """Into how many tiles an image is cut, the model works out again for itself."""
    theirs = getattr(processor.image_processor, "image_grid_pinpoints", None)
    ours = getattr(config, "image_grid_pinpoints", None)
    if [list(each) for each in theirs or ()] != [list(each) for each in ours or ()]:
        raise SpecError(
            f"model {name}: image_grid_pinpoints is {theirs} in preprocessor_config.json, but "
            f"{ours} in config.json, which the weights were made for: make them the same"
        )


def device_of(spec: ModelSpec) -> "torch.device":
    """The device the model runs on here. Raises SpecError for `cuda` where there is none."""
    import torch

    has_cuda = torch.cuda.is_available()
    if spec.device == "cuda" and not has_cuda:
        raise SpecError(
            "model.device is cuda, but this actor sees no GPU: set resources.generate.gpus, or "
            "model.device to auto"
        )
    return torch.device("cuda" if has_cuda and spec.device != "cpu" else "cpu")


def load_model(spec: ModelSpec, device: "torch.device") -> "LlavaForConditionalGeneration":
    """The model in eval mode, on `device` or spread as the spec says, in the dtype that
    `dtype_name` gives.

    Raises SpecError for weights that are missing or of another shape, which transformers would
    draw at random, for an attention kernel or a quantization that is not installed, and for weights
    that cannot be quantized.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    flash = importlib.util.find_spec("flash_attn") or importlib.util.find_spec("kernels")
    if spec.attention == "flash_attention_2" and not flash:
        raise SpecError(
            "model.attention is flash_attention_2, but flash-attn is not installed on this worker: "
            "install it, or set model.attention to sdpa"
        )
    quantization.check_installed(spec.quantization)
    checkpoint = open_checkpoint(spec)
    dtype: torch.dtype = getattr(torch, dtype_name(spec, checkpoint))
    with _quiet(), _faults_of(checkpoint):
        own = family_of(checkpoint).model_class
        kind = AutoModelForImageTextToText if spec.trust_remote_code else own()
        model, report = kind.from_pretrained(
            checkpoint.fetched(weights=True),
            revision=checkpoint.revision or "main",
            dtype=dtype,
            attn_implementation=None if spec.attention == "auto" else spec.attention,
            use_safetensors=not checkpoint.is_pickled,
            weights_only=True,
            output_loading_info=True,
            **trust.load_options(spec),
            **quantization.load_options(spec.quantization, dtype=dtype, device=device),
            **placement.load_options(spec),
        )
    if missing := sorted(report["missing_keys"]):
        raise SpecError(
            f"model {spec.path}: {len(missing)} weights are missing, {missing[0]} among them"
        )
    if spec.quantization != "none":
        quantization.finished(model, device=device, name=spec.path)
    elif spec.device_map is None:
        model.to(device)
    loaded: LlavaForConditionalGeneration = model.eval()
    return loaded


def end_tokens(model: "LlavaForConditionalGeneration", processor: "LlavaProcessor") -> list[int]:
    """The ids that end an answer: those of the generation config, else the tokenizer's."""
    named: int | list[int] | None = model.generation_config.eos_token_id
    if named is None:
        named = processor.tokenizer.eos_token_id
    return [] if named is None else [named] if isinstance(named, int) else list(named)


@contextlib.contextmanager
def _faults_of(checkpoint: Checkpoint) -> Iterator[None]:
    """What transformers raises for bad files (it has no classes of its own) as a SpecError."""
    expected = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)
    of_weights = (SafetensorError, pickle.UnpicklingError, EOFError)
    try:
        yield
    except (*expected, *of_weights) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise SpecError(
            f"model {checkpoint.path} cannot be loaded: {type(error).__name__}: {first}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no pages of warnings in a worker's log; errors still reach it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
