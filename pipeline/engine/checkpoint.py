"""A checkpoint's files, before any weight is read: where they are and whether they will do.

The same code serves the embedded model, a local folder, a hub id and a folder in a store. It runs
on the driver, so it imports neither torch nor transformers; what it cannot prove from the files,
`load.py` proves.
"""

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipeline import embedded
from pipeline.engine.family import FAMILIES, Family, family_named
from pipeline.engine.placement import check_placement
from pipeline.engine.quantization import check_installed
from pipeline.engine.stored import StoredFolder, list_folder
from pipeline.engine.tokens import check_tokens
from pipeline.engine.trust import check_code, check_pickles
from pipeline.sources.uris import shown
from pipeline.storage import filesystem, is_local
from schemas.ask import GenerateSpec, default_of
from schemas.errors import SpecError
from schemas.job import EMBEDDED, ModelSpec

HUB_TIMEOUT_S = 10.0
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
TEXTS = (".json", ".jinja", ".model", ".txt", ".py")
"""Ends of the names of files that are no weights and may matter."""
OF_WEIGHTS = (".safetensors", ".bin")

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


@dataclass(frozen=True)
class Checkpoint:
    """The files of one checkpoint. `path` is a folder, or a hub id to be read at `revision`.

    `commit`: the hub's commit that the files belong to, where they come from the hub; of a folder
    in a store (`stored`), the digest of its listing.
    """

    path: str
    revision: str | None
    files: frozenset[str]
    commit: str | None = None
    stored: StoredFolder | None = None

    def open(self, name: str) -> Path:
        """The file on this machine, downloaded first where the checkpoint is elsewhere."""
        if self.stored is not None:
            return self.stored.fetch(name)
        if self.revision is None:
            return Path(self.path) / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.path, name, revision=self.revision))

    def fetched(self, *, weights: bool = False) -> str:
        """What transformers is to load; what is wanted of a store's files is here then."""
        if self.stored is None:
            return self.path
        wanted = [name for name in self.files if name.endswith(TEXTS)]
        paths = [self.open(name) for name in (*wanted, *(self.weights if weights else ()))]
        return str(paths[0].parent)

    def dtypes(self, name: str) -> list[str]:
        """Of each tensor of a safetensors file, as safetensors names them. Raises SpecError for a
        broken file."""
        if self.stored is not None:
            return self.stored.dtypes(name)
        return _header_dtypes(self.open(name))

    def read_json(self, name: str) -> dict[str, Any]:
        """The file's object, `{}` where there is no such file. Raises SpecError for bad JSON."""
        if name not in self.files:
            return {}
        try:
            value = json.loads(self.open(name).read_text("utf-8"))
        except ValueError as error:
            raise SpecError(f"model {self.path}: {name} is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise SpecError(f"model {self.path}: {name} holds no JSON object")
        return value

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        return self.read_json("config.json")

    @property
    def weights(self) -> list[str]:
        """Names of the files that hold the weights, whether they are there or not.

        As transformers looks for them: safetensors before pickles, one file before many.
        """
        for whole, index in ((WEIGHTS, WEIGHTS_INDEX), (PICKLE, PICKLE_INDEX)):
            if whole in self.files:
                return [whole]
            if index in self.files:
                return sorted(set(self.read_json(index).get("weight_map", {}).values()))
        return []

    @property
    def is_pickled(self) -> bool:
        return any(name.endswith(".bin") for name in self.weights)


def resolve(spec: ModelSpec) -> str:
    """What transformers is to load: the embedded folder, a local folder or a hub id."""
    if spec.path == EMBEDDED:
        return str(embedded.CHECKPOINT)
    return os.path.expanduser(spec.path)


def open_checkpoint(spec: ModelSpec) -> Checkpoint:
    """List the checkpoint's files. Raises SpecError where there is nothing to be found, and
    StoreUnavailable where a store does not answer.

    A hub id is pinned to the commit its revision names now. Without a network it is what the local
    cache holds of it.
    """
    path = resolve(spec)
    if "://" in path:
        return _in_store(spec)
    if not Path(path).exists() and not path.startswith(("/", ".", "~")):
        return _on_hub(spec)
    if spec.revision:
        raise SpecError(
            f"model.revision {spec.revision!r} is for hub ids; {spec.path!r} is a folder"
        )
    return _local(path)


def _local(path: str) -> Checkpoint:
    folder = Path(path)
    if not folder.exists():
        raise SpecError(f"model.path {path!r} does not exist")
    if not folder.is_dir():
        raise SpecError(f"model.path {path!r} is a file: name the folder that holds config.json")
    return Checkpoint(path, None, frozenset(f.name for f in folder.iterdir() if f.is_file()))


def _in_store(spec: ModelSpec) -> Checkpoint:
    if shown(spec.path) != spec.path:
        raise SpecError(
            f"model.path {shown(spec.path)!r} holds a password or a query: name the folder alone, "
            "credentials come from the environment"
        )
    fs, inner = filesystem(spec.path, spec.storage)
    if is_local(fs):
        return _local(inner)
    folder = list_folder(spec.path, spec.storage, suffixes=(*TEXTS, *OF_WEIGHTS))
    revision = folder.revision
    if spec.revision not in (None, revision):
        raise SpecError(
            f"model.path {spec.path!r} is at revision {revision} now, a digest of its files: it "
            f"has changed since it was at {spec.revision}"
        )
    return Checkpoint(folder.url, None, frozenset(folder.files), commit=revision, stored=folder)


def _on_hub(spec: ModelSpec) -> Checkpoint:
    from huggingface_hub import HfApi, errors, try_to_load_from_cache

    name = f"{spec.path}@{spec.revision}" if spec.revision else spec.path
    try:
        info = HfApi().model_info(spec.path, revision=spec.revision, timeout=HUB_TIMEOUT_S)
    except errors.HFValidationError as error:
        raise SpecError(f"model.path {spec.path!r} is neither a folder nor a hub id") from error
    except errors.GatedRepoError as error:
        raise SpecError(
            f"model {name} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SpecError(f"model {spec.path} has no revision {spec.revision!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise SpecError(
            f"model {name} is not on the hub (or is private: set HF_TOKEN), and there is no folder "
            "of that name"
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # httpx's own
        cached = try_to_load_from_cache(spec.path, "config.json", revision=spec.revision)
        if isinstance(cached, str):
            snapshot = Path(cached).parent
            return replace(_local(str(snapshot)), commit=snapshot.name)
        raise SpecError(
            f"model {name}: the hub cannot be reached ({error}), the local cache does not hold it "
            "and there is no folder of that name"
        ) from error
    files = frozenset(sibling.rfilename for sibling in info.siblings or ())
    return Checkpoint(spec.path, info.sha, files, commit=info.sha)


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


def family_of(checkpoint: Checkpoint) -> Family:
    """Raises SpecError for a model that nothing here can run."""
    model_type = checkpoint.config.get("model_type")
    family = family_named(str(model_type))
    architectures = checkpoint.config.get("architectures") or [family and family.architecture]
    if family is None or family.architecture not in architectures:
        known = "; ".join(
            f"{each.architecture} (model_type {each.model_type!r}), such as {each.example}"
            for each in FAMILIES.values()
        )
        raise SpecError(
            f"model {checkpoint.path} is a {architectures[0]} (model_type {model_type!r}), which "
            "is not supported. What is: any of transformers' models for image-text-to-text, and "
            f"faster than others {known}"
        )
    return family


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


def dtype_name(spec: ModelSpec, checkpoint: Checkpoint) -> str:
    """The dtype the model runs in: `float32`, `bfloat16` or `float16`.

    `auto` is float32 for `embedded`, else what config.json says, else that of the stored weights.
    """
    if spec.dtype != "auto":
        return spec.dtype
    if spec.path == EMBEDDED:
        return "float32"
    config = checkpoint.config
    for part in (config, config.get("text_config") or {}):
        if name := part.get("dtype") or part.get("torch_dtype"):
            return str(name).removeprefix("torch.")
    if checkpoint.is_pickled:
        raise SpecError(
            f"model {checkpoint.path}: config.json names no dtype, and pickled weights are not "
            "opened to see theirs: set model.dtype"
        )
    stored = checkpoint.dtypes(checkpoint.weights[0])
    return next((SAFETENSORS_DTYPES[d] for d in stored if d in SAFETENSORS_DTYPES), "float32")


SAFETENSORS_DTYPES: Mapping[str, str] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def _header_dtypes(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return [file.get_slice(name).get_dtype() for name in sorted(file.keys())]
    except (SafetensorError, OSError) as error:
        raise SpecError(f"{path} is broken or cut off ({error}): download it again") from error
