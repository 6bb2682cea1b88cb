"""Memory of the device: how much the slots may take, and how it shows that there is none left."""

import os

import torch

CUDA_SHARE = 0.8
"""Of what is free once the weights are there; the rest is for activations."""
CPU_SHARE = 0.25
"""Of the machine's memory."""


def default_kv_budget_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free * CUDA_SHARE)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * CPU_SHARE)


def is_out_of_memory(error: RuntimeError) -> bool:
    """torch's CPU allocator has no exception class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_cached(device: torch.device) -> None:
    """Give back what torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def does_not_fit(device: torch.device) -> str:
    return (
        f"the row alone does not fit the memory of {device}: lower max_new_tokens, or use "
        "model.dtype bfloat16 or a larger device"
    )
