"""What each stage asks of clusters of all sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.resources import check_fits, resolve_resources
from schemas.errors import SpecError
from schemas.job import ResourcesSpec


@given(cpus=st.integers(1, 512), gpus=st.integers(0, 64))
def test_the_defaults_fit_every_cluster(cpus: int, gpus: int) -> None:
    cluster = {"CPU": float(cpus), "GPU": float(gpus)}
    resources = resolve_resources(ResourcesSpec(), cluster)
    check_fits(resources, cluster)
    assert resources.read_cpus > 0


def test_each_gpu_gets_an_actor_of_its_own() -> None:
    resources = resolve_resources(ResourcesSpec(), {"CPU": 32.0, "GPU": 4.0})
    assert (resources.generate_actors, resources.generate_gpus) == (4, 1.0)


def test_one_actor_on_cpus_computes_on_all_of_them() -> None:
    resources = resolve_resources(ResourcesSpec(), {"CPU": 2.0})
    assert (resources.generate_actors, resources.generate_gpus) == (1, 0)
    assert resources.generate_threads == 2


def test_a_spec_that_asks_for_more_than_there_is_names_the_figures_and_the_remedy() -> None:
    spec = ResourcesSpec.model_validate({"generate": {"actors": 3, "cpus": 2}})
    cluster = {"CPU": 2.0}
    with pytest.raises(SpecError, match=r"generate 3 x 2 CPU.*there are 2; lower"):
        check_fits(resolve_resources(spec, cluster), cluster)


def test_gpus_that_are_not_there_are_refused() -> None:
    spec = ResourcesSpec.model_validate({"generate": {"gpus": 1}})
    cluster = {"CPU": 8.0}
    with pytest.raises(SpecError, match=r"needs 1 GPUs.*there are 0"):
        check_fits(resolve_resources(spec, cluster), cluster)


def test_what_is_in_flight_is_bounded_by_the_spec_else_by_the_number_of_actors() -> None:
    small, large = {"CPU": 2.0}, {"CPU": 64.0, "GPU": 4.0}
    spec = ResourcesSpec.model_validate({"bytes_in_flight": 2**20})
    assert resolve_resources(spec, large).bytes_in_flight == 2**20
    assert resolve_resources(ResourcesSpec(), small).bytes_in_flight == 2 * 2**28
    resources = resolve_resources(ResourcesSpec(), large)
    actors = resources.preprocess_actors[1] + resources.generate_actors
    assert resources.bytes_in_flight == actors * 2**28
