"""Where the parts of a model lie: on one device, or spread over several of one actor.

transformers and accelerate lay them out (`device_map`) and hang hooks on them, which bring what a
part reads to where it lies. Only the model's own forward calls those hooks, so that a spread model
is answered by the plain engine. Runs on the driver too, and imports no torch outside of functions.
"""

import atexit
import importlib.util
import shutil
import tempfile
from typing import TYPE_CHECKING, Any

from schemas.errors import SpecError
from schemas.job import JobSpec, ModelSpec

if TYPE_CHECKING:
    import torch

OFFLOADED = "disk"


def placed(job: JobSpec) -> JobSpec:
    """The job with its model spread over the GPUs of an actor, where that has several and the job
    says nothing else."""
    gpus, model = job.resources.generate.gpus or 0, job.model
    is_said = model.device_map is not None or model.device == "cpu"
    if gpus <= 1 or is_said or model.quantization != "none":
        return job
    return job.model_copy(update={"model": model.model_copy(update={"device_map": "auto"})})


def check_placement(spec: ModelSpec) -> None:
    """Raise SpecError where a model is to be spread, and the package for that is missing."""
    if spec.device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise SpecError(
            "model.device_map is set, or resources.generate.gpus above 1, but accelerate is not "
            "installed: pip install 'lavaflow[device-map]' here and on the workers, or set "
            "resources.generate.gpus to 1"
        )


def load_options(spec: ModelSpec) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing where the model lies on one device."""
    if spec.device_map is None:
        return {}
    # For what fits no device.
    folder = tempfile.mkdtemp(prefix="lavaflow-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"device_map": spec.device_map, "offload_folder": folder}


def is_spread(model: Any) -> bool:
    """Whether its parts lie on several devices, or have to be brought from the disk."""
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(devices) > 1 or OFFLOADED in devices


def home_of(model: Any) -> "torch.device":
    """Where what a model reads is put together: its own device, or the first of several."""
    import torch

    if not is_spread(model):
        device: torch.device = model.device
        return device
    first = next((d for d in model.hf_device_map.values() if d != OFFLOADED), "cpu")
    return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
