"""What each stage asks of the cluster: the spec's wishes, completed from what Ray reports.

Actors hold their logical CPUs for as long as they live. On a small machine whole CPUs for each
stage would leave the read tasks nothing, and the job would wait for ever: there every stage asks
for a fraction. Pure arithmetic: this module probes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from schemas.errors import SpecError
from schemas.job import ResourcesSpec

ACTOR_BYTES = 256 * 2**20
"""What may wait for an actor, and come from it."""


@dataclass(frozen=True)
class Resources:
    """Logical CPUs and GPUs of one task or actor of each stage, and how many actors there are.

    `bytes_in_flight`: what may lie between the stages of all of them.
    """

    read_cpus: float
    preprocess_actors: tuple[int, int]
    preprocess_cpus: float
    generate_actors: int
    generate_cpus: float
    generate_gpus: float
    generate_threads: int
    batch_size: int
    bytes_in_flight: int

    @property
    def cpus_needed(self) -> float:
        """Below this, some stage would never be scheduled."""
        return (
            self.read_cpus
            + self.preprocess_actors[0] * self.preprocess_cpus
            + self.generate_actors * self.generate_cpus
        )

    @property
    def gpus_needed(self) -> float:
        return self.generate_actors * self.generate_gpus


def resolve_resources(spec: ResourcesSpec, cluster: Mapping[str, float]) -> Resources:
    """The resources of each stage on a cluster that reports `{"CPU": ..., "GPU": ...}`.

    `generate_threads`: the compute threads of one generate actor, should it run on CPUs.
    """
    cpus, gpus = cluster.get("CPU", 0.0), cluster.get("GPU", 0.0)
    actors = spec.generate.actors or max(1, int(gpus))
    is_roomy = cpus >= actors + 3
    stage_cpus = 1.0 if is_roomy else cpus / 4
    generate_cpus = spec.generate.cpus
    if generate_cpus is None:
        generate_cpus = 1.0 if is_roomy else stage_cpus / actors
    preprocess_cpus = spec.preprocess.cpus or stage_cpus
    spare = cpus - actors * generate_cpus - 2 * stage_cpus
    most = max(1, int(spare / preprocess_cpus)) if is_roomy else 1
    preprocess_actors = spec.preprocess.actors or (1, most)
    return Resources(
        read_cpus=stage_cpus,
        preprocess_actors=preprocess_actors,
        preprocess_cpus=preprocess_cpus,
        generate_actors=actors,
        generate_cpus=generate_cpus,
        generate_gpus=spec.generate.gpus if spec.generate.gpus is not None else min(1.0, gpus),
        generate_threads=max(1, int(cpus // actors)),
        batch_size=spec.generate.batch_size,
        bytes_in_flight=spec.bytes_in_flight or ACTOR_BYTES * (preprocess_actors[1] + actors),
    )


def check_fits(resources: Resources, cluster: Mapping[str, float]) -> None:
    """Raise SpecError where the job would wait for ever for what the cluster does not have."""
    for kind, needed in (("CPU", resources.cpus_needed), ("GPU", resources.gpus_needed)):
        there = cluster.get(kind, 0.0)
        if needed > there + 1e-6:
            raise SpecError(
                f"resources: the job needs {needed:g} {kind}s ({_stages(resources)}), there are "
                f"{there:g}; lower resources.generate or resources.preprocess, or run on a larger "
                "cluster with --address"
            )


def _stages(r: Resources) -> str:
    return (
        f"read {r.read_cpus:g} CPU, "
        f"preprocess {r.preprocess_actors[0]} x {r.preprocess_cpus:g} CPU, "
        f"generate {r.generate_actors} x {r.generate_cpus:g} CPU and {r.generate_gpus:g} GPU"
    )
