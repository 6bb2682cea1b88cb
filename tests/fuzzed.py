"""All laws that are fuzzed, tried for a while with cases that no run has tried before."""

import time
import traceback
from typing import Any

from hypothesis import strategies as st

from tests import fuzz, fuzz_texts
from tests.fuzz import Law, tried

LAWS: dict[str, tuple[Law, st.SearchStrategy[Any]]] = {
    "tars": (fuzz.tars_are_read, fuzz.TARS),
    "manifests": (fuzz.manifests_are_read, fuzz.MANIFESTS),
    "tables": (fuzz.tables_are_read, fuzz.TABLES),
    "rows": (fuzz_texts.rows_become_tables, fuzz_texts.ROWS),
    "prompts": (fuzz_texts.rows_become_prompts, fuzz_texts.ROWS),
    "specs": (fuzz_texts.specs_are_jobs_or_mistakes, fuzz_texts.SPECS),
    "files": (fuzz_texts.files_are_jobs_or_mistakes, fuzz_texts.YAMLS),
    "conditions": (fuzz_texts.conditions_hold_or_not, fuzz_texts.CONDITIONS),
}
AT_ONCE = 200
LONGEST_TOLD = 2000


def fuzzed(*, seconds: float, seed: int) -> dict[str, Any]:
    """The laws take turns; one that was broken is left out from then on."""
    end = time.monotonic() + seconds
    cases, faults = dict.fromkeys(LAWS, 0), {}
    while time.monotonic() < end and len(faults) < len(LAWS):
        for name, (law, strategy) in LAWS.items():
            if name in faults:
                continue
            try:
                tried(law, strategy, examples=AT_ONCE, seed=seed + cases[name])
            except Exception:  # noqa: BLE001 (it is what is looked for)
                faults[name] = traceback.format_exc()[-LONGEST_TOLD:]
            cases[name] += AT_ONCE
    return {"cases": cases, "faults": [f"{name}: {told}" for name, told in faults.items()]}
