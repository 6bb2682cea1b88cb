"""A checkpoint's files, before any weight is read: where they are and what they say.

The same code serves the embedded model, a local folder, a hub id and a folder in a store. It runs
on the driver, so it imports neither torch nor transformers. Whether they will do: `check.py`.
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
from pipeline.engine.stored import StoredFolder, list_folder
from pipeline.sources.uris import shown
from pipeline.storage import filesystem, is_local
from schemas.errors import SpecError
from schemas.job import EMBEDDED, ModelSpec

HUB_TIMEOUT_S = 10.0
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TEXTS = (".json", ".jinja", ".model", ".txt", ".py")
"""Ends of the names of files that are no weights and may matter."""
OF_WEIGHTS = (".safetensors", ".bin")


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
