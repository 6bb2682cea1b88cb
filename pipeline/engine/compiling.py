"""What torch compiles of a model: when that pays, and what is said where it does not work."""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._dynamo.exc import TorchDynamoException

from schemas.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


MODELS = 16
COMPILED_OF_A_MODEL = 2
"""Of one function, at most: passes and steps."""


def attention_pays_on(device: torch.device, dtype: torch.dtype) -> bool:
    """The text model gains by it everywhere, the vision tower and the head on any CPU."""
    return device.type == "cpu" and dtype == torch.bfloat16


def compile_once(function: Callable[..., Any], *, fullgraph: bool = False) -> Callable[..., Any]:
    """For any lengths but one, and for as many threads as there are now, or fewer."""
    # Counted together for all models of a process, since they share transformers' functions.
    torch._dynamo.config.recompile_limit = MODELS * COMPILED_OF_A_MODEL
    options: dict[str, Any] = {"guard_filter_fn": _but_state}
    return torch.compile(function, dynamic=True, fullgraph=fullgraph, options=options)


def _but_state(guards: Sequence[Any]) -> Sequence[bool]:
    """All but the one that asks for the number of threads, and for modes that an engine is always
    in: it would have all compiled again for fewer threads, which what is there can be run by."""
    return [guard.guard_type != "GLOBAL_STATE" for guard in guards]


@contextlib.contextmanager
def compiling(model: "PreTrainedModel") -> Iterator[None]:
    """Where something is called for the first time. Raises SpecError where it cannot be compiled.

    On a CPU, weights are copied into the order that oneDNN reads them in, whose products of float32
    are also faster than those that torch takes otherwise, where that is MKL on an AMD processor.
    Weights that are quantized would be copied unquantized.
    """
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    is_frozen = model.device.type == "cpu" and not is_quantized
    # Looking for garbage among all that torch makes meanwhile takes long.
    looked_for_garbage = gc.isenabled()
    gc.disable()
    try:
        with (
            torch._inductor.config.patch(freezing=is_frozen),
            torch._dynamo.config.patch(specialize_float=True),
        ):
            yield
    except TorchDynamoException as error:
        what = " ".join(str(error).split("\n\n")[0].split())
        raise SpecError(
            f"resources.generate.compile: the model cannot be compiled here ({what}): set it to "
            "false"
        ) from error
    finally:
        if looked_for_garbage:
            gc.enable()
