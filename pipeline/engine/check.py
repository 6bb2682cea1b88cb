"""Whether a checkpoint will do: what can be told of its files before anything is started.

Runs on the driver, so it imports neither torch nor transformers; what it cannot prove from the
files, `load.py` proves.
"""

from collections.abc import Mapping

from pipeline.engine.checkpoint import (
    PICKLE_INDEX,
    WEIGHTS,
    WEIGHTS_INDEX,
    Checkpoint,
    dtype_name,
    family_of,
    open_checkpoint,
)
from pipeline.engine.placement import check_placement
from pipeline.engine.quantization import check_installed
from pipeline.engine.tokens import check_tokens
from pipeline.engine.trust import check_code, check_pickles
from schemas.ask import GenerateSpec, default_of
from schemas.errors import SpecError
from schemas.job import ModelSpec

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")

PLAIN_DECODING: Mapping[str, tuple[object, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "num_beams": (1,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}
"""Keys of generation_config.json that change a greedy answer, and their values (besides null) that
do not. The engine applies none of them."""
ALSO_IN_GENERATE = {
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_new_tokens",
    "stop_strings": "stop",
}
"""Those that a job can set itself, by the name that they have in `generate`."""


def check_model(spec: ModelSpec, generate: GenerateSpec = GenerateSpec()) -> None:  # noqa: B008
    """Refuse, before anything is started, a checkpoint that cannot work. Raises SpecError."""
    checkpoint = open_checkpoint(spec)
    _check_config(checkpoint)
    check_code(spec, checkpoint)
    _check_decoding(checkpoint, generate)
    _check_weights(checkpoint)
    check_pickles(spec, checkpoint)
    _check_texts(checkpoint)
    check_tokens(checkpoint)
    _check_attention(spec, checkpoint)
    check_installed(spec.quantization)
    check_placement(spec)
    why = family_of(checkpoint).why_slow
    if why is not None and spec.quantization != "none":
        raise SpecError(
            f"model.quantization is {spec.quantization}, but which layers of {checkpoint.path} "
            f"would bear it is not known: {why}. Set it to none"
        )


def _check_config(checkpoint: Checkpoint) -> None:
    if "config.json" not in checkpoint.files:
        raise SpecError(f"model {checkpoint.path} has no config.json: it is no checkpoint folder")
    family_of(checkpoint)
    if quantized := checkpoint.config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise SpecError(
            f"model {checkpoint.path} holds quantized weights (quantization_config of config.json: "
            f"{method}), which are not supported: give the checkpoint that they were made of, and "
            "set model.quantization to 8bit or 4bit"
        )


def _check_decoding(checkpoint: Checkpoint, generate: GenerateSpec) -> None:
    """What the checkpoint would have of `generate`, the job has to say itself."""
    decoding = checkpoint.read_json("generation_config.json")
    for key, neutral in PLAIN_DECODING.items():
        value, ours = decoding.get(key), ALSO_IN_GENERATE.get(key)
        if value is None or value in neutral:
            continue
        if ours is None:
            raise SpecError(
                f"model {checkpoint.path}: generation_config.json sets {key}={value!r}, which is "
                "not supported. Remove the key"
            )
        if getattr(generate, ours) == default_of(ours):
            raise SpecError(
                f"model {checkpoint.path}: generation_config.json sets {key}={value!r}, which "
                f"holds only where the job says so: set generate.{ours}, or remove the key"
            )


def _check_weights(checkpoint: Checkpoint) -> None:
    weights = checkpoint.weights
    if not weights:
        old = sorted(f for f in checkpoint.files if f.endswith((".bin", ".pt", ".pth", ".h5")))
        raise SpecError(
            f"model {checkpoint.path} has no {WEIGHTS}"
            + (f", only {old[0]}: convert it with transformers' `save_pretrained`" if old else "")
        )
    if missing := [name for name in weights if name not in checkpoint.files]:
        index = PICKLE_INDEX if checkpoint.is_pickled else WEIGHTS_INDEX
        raise SpecError(
            f"model {checkpoint.path}: {index} names {', '.join(missing)}, missing here: finish "
            "the download"
        )
    if checkpoint.revision is None and not checkpoint.is_pickled:
        for name in weights:
            checkpoint.dtypes(name)


def _check_texts(checkpoint: Checkpoint) -> None:
    for what, names in (("processor", PROCESSOR_FILES), ("tokenizer", TOKENIZER_FILES)):
        if checkpoint.files.isdisjoint(names):
            raise SpecError(f"model {checkpoint.path} has no {what}: wants {' or '.join(names)}")


def _check_attention(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """The package may be on the workers only, so `load_model` asks for it there."""
    if spec.attention != "flash_attention_2":
        return
    if spec.device == "cpu":
        raise SpecError("model.attention flash_attention_2 needs a GPU; model.device is cpu")
    if (dtype := dtype_name(spec, checkpoint)) == "float32":
        raise SpecError(
            f"model.attention flash_attention_2 needs bfloat16 or float16; model.dtype "
            f"{spec.dtype} is {dtype} for {spec.path}"
        )
