"""How often the host waits for the device, on one that has no numbers: torch's `meta`.

What has to know numbers there shows itself, and gets zeros.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.engine.live import Row
from pipeline.engine.pixels import pixel_table
from pipeline.engine.replays import Replays, Run
from pipeline.engine.slots import SlotsEngine
from tests.engine_cases import cases_of, request_of
from tests.flash import stand_in
from tests.models import tiny_model, tiny_processor

META, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Counts what makes the host wait, by name; `sent`: what goes to the device, waited for or
    not."""

    def __init__(self) -> None:
        super().__init__()
        self.counted, self.sent = Counter[str](), 0

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options, packet = dict(kwargs or {}), function.overloadpacket
        if packet in (aten._to_copy, aten.to):
            names = [argument.name for argument in function._schema.arguments]
            given = dict(zip(names, args, strict=False)) | options
            tensor, to = given["self"], given.get("device") or args[0].device
            if tensor.device == META and to == CPU:
                self.counted["read"] += 1
                return torch.zeros(tensor.shape, dtype=given.get("dtype") or tensor.dtype)
            if tensor.device == CPU and to == META:
                self.sent += 1
                self.counted["sent"] += not given.get("non_blocking")
        if packet in (aten._local_scalar_dense, aten.item) and args[0].device == META:
            self.counted["item"] += 1
            return 0
        if packet in (aten.index, aten.index_put_, aten.index_put, aten._index_put_impl_):
            by_mask = [each for each in args[1] if each is not None and each.dtype == torch.bool]
            self.counted["mask"] += sum(each.device == META for each in by_mask)
        return function(*args, **options)


class Sending(TorchFunctionMode):
    """What is made of the host's numbers on the device, which the other one does not see."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._counted = waits.counted

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        is_there = isinstance(args[0], torch.Tensor) if args else True
        if function in (torch.tensor, torch.as_tensor) and not is_there:
            self._counted["made"] += torch.device(options.get("device") or CPU) == META
        return function(*args, **options)


class Watched(SlotsEngine):
    """`steps`: what the host waited for in each step; `rest`: in all else."""

    def __init__(self, model: Any, **options: Any) -> None:
        super().__init__(model, **options)
        self.waits, self.steps = Waits(), list[Counter[str]]()

    def _run(self) -> None:
        with self.waits, Sending(self.waits):
            super()._run()

    def _decode(self, rows: Sequence[Row]) -> None:
        before = self.waits.counted.copy()
        super()._decode(rows)
        self.steps.append(self.waits.counted - before)

    @property
    def rest(self) -> Counter[str]:
        return self.waits.counted - sum(self.steps, Counter())


@pytest.fixture(params=["auto", "flash_attention_2"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Watched:
    stand_in(monkeypatch)
    model = copy.deepcopy(tiny_model()).to(META)
    return Watched(
        model,
        eos_token_ids=[2],
        table=pixel_table(tiny_processor()),
        kv_budget_bytes=10_000_000,
        attention=request.param,
    )


def ask(engine: Watched) -> None:
    cases = cases_of(3, 6)
    of_images = [request_of(tiny_processor(), *cases[n::3]) for n in range(3)]
    alone = [request_of(tiny_processor(), case) for case in cases[:5]]
    engine.submit([*of_images, *alone])


def test_the_host_waits_once_for_each_token(engine: Watched) -> None:
    ask(engine)
    assert len(engine.steps) > 2
    assert engine.steps == [Counter(read=1)] * len(engine.steps)
    assert engine.rest == Counter(read=1), "looking at images and reading prompts"


def test_in_what_is_recorded_of_a_step_nothing_is_sent_and_nothing_waited_for(
    engine: Watched,
) -> None:
    """As a CUDA graph has to be: the host is not asked while it runs."""
    recorded = list[bool]()

    def record(run: Run) -> Run:
        def again() -> torch.Tensor:
            before = engine.waits.counted.copy(), engine.waits.sent
            found = run()
            recorded.append(before == (engine.waits.counted, engine.waits.sent))
            return found

        return again

    engine._stepper.replays = Replays(record)
    ask(engine)
    assert recorded == [True] * len(engine.steps)
    assert engine.steps == [Counter(read=1)] * len(engine.steps)
