"""What of a checkpoint could run code of its author, and what is asked for before it may.

Pickled weights can hold calls of anything; `auto_map` names Python files that transformers would
import. Runs on the driver too, and imports neither torch nor transformers.
"""

from collections.abc import Iterator
from typing import Any

from pipeline.engine.checkpoint import Checkpoint
from schemas.errors import SpecError
from schemas.job import ModelSpec

MAPPED = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
)
"""Files that may name code of the checkpoint's own."""


def check_pickles(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise SpecError for weights in pickles, unless the job allows them."""
    if checkpoint.is_pickled and not spec.allow_pickle:
        raise SpecError(
            f"model {checkpoint.path} has its weights in pickles ({checkpoint.weights[0]}), which "
            "can run code when they are opened: convert them with transformers' `save_pretrained`, "
            "or set model.allow_pickle: true, and they are opened by torch's weights_only, which "
            "takes tensors alone"
        )


def check_code(spec: ModelSpec, checkpoint: Checkpoint) -> None:
    """Raise SpecError for a checkpoint with code of its own, unless the job trusts it."""
    for name, module in _code(checkpoint):
        if not spec.trust_remote_code:
            raise SpecError(
                f"model {checkpoint.path}: {name} names code of its own (auto_map: {module}), "
                "which would run here and on every worker: read it, and set "
                "model.trust_remote_code: true, or take auto_map out, and transformers' own class "
                "is used"
            )
        if "--" in module:
            raise SpecError(
                f"model {checkpoint.path}: {name} names code of another repository (auto_map: "
                f"{module}), which may change at any time: put the file beside {name} and name it"
            )


def load_options(spec: ModelSpec) -> dict[str, bool]:
    """What `from_pretrained` is told, said always: where it is not, transformers asks a person."""
    return {"trust_remote_code": spec.trust_remote_code}


def _code(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """Each file that names code, with what it names."""
    for name in MAPPED:
        named: Any = checkpoint.read_json(name).get("auto_map") or {}
        for each in named.values() if isinstance(named, dict) else [named]:
            # A tokenizer names two classes, of which one may be null.
            for module in each if isinstance(each, list) else [each]:
                if module:
                    yield name, str(module)
