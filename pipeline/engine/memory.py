"""Memory of the device: how much the slots may take, what weights take, and how it shows that there
is none left."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")

CUDA_SHARE = 0.8
"""Of what is free once the weights are there; the rest is for activations."""
CPU_SHARE = 0.25
"""Of the machine's memory, or the container's."""

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
"""Control groups, by which containers and schedulers limit memory: https://docs.kernel.org/
admin-guide/cgroup-v2.html and cgroup-v1/memory.html."""

EXHAUSTED = re.compile(
    "can't allocate memory|could not (create|execute) a primitive$|std::bad_alloc"
    "|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|CUDA error: out of memory"
)
"""How those that have no exception of their own for it say that memory has run out: torch's
allocator for CPUs, oneDNN, C++, cuBLAS, cuDNN, the driver."""


def default_kv_budget_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min([machine, *_limits_of_groups()]) * CPU_SHARE)


def _limits_of_groups() -> Iterator[int]:
    """Bytes that the groups which this process is in may take."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A container may see its own group as the root, under the name that the host has for it.
        group = Path(path.lstrip("/"))
        files = (root / each / name for each in (group, *group.parents))
        told = (file.read_text().strip() for file in files if file.is_file())
        yield from (int(limit) for limit in told if limit.isdigit())


def weights_bytes(model: torch.nn.Module) -> int:
    """Of parameters, buffers, and the scales of what is quantized."""
    tensors = {tensor.data_ptr(): tensor for tensor in _tensors(model)}
    return sum(tensor.nbytes for tensor in tensors.values())


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    # bitsandbytes keeps scales in several places.
    holders = [getattr(m, name, None) for m in model.modules() for name in ("state", "quant_state")]
    for holder in (*model.parameters(), *holders):
        kept = vars(holder).values() if hasattr(holder, "__dict__") else ()
        yield from (value for value in kept if isinstance(value, torch.Tensor))


def available_bytes(device: torch.device) -> int:
    """Memory that nobody needs."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    told = Path("/proc/meminfo")
    for line in told.read_text().splitlines() if told.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


@dataclass(frozen=True)
class Shortage:
    """Memory has run out. `said`: by whom, and how."""

    said: str


def within_memory(run: Callable[[], T], device: torch.device) -> T | Shortage:
    """What it gives, or that memory has run out; its tensors are freed then.

    Raises whatever else it raises.
    """
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {_first_line(error)}"
    release_cached(device)
    return Shortage(said)


def is_out_of_memory(error: RuntimeError | MemoryError) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return bool(EXHAUSTED.search(_first_line(error)))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def does_not_fit(what: str, device: torch.device, shortage: Shortage) -> str:
    return (
        f"{what} does not fit the memory of {device}, even alone ({shortage.said}; "
        f"{available_bytes(device):,} bytes are free): lower max_new_tokens, or use model.dtype "
        "bfloat16 or a larger device"
    )
