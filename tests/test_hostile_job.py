"""A whole job over images that crash, block and fill the process that decodes them."""

from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.hostile_decoders import hostile, path_with_hostile_decoders
from tests.shards import write_shard
from tests.whole_jobs import answers, job_of, lavaflow, scene

DEEDS = {
    4: ("segv", "DecoderCrashed"),
    5: ("segv", "DecoderCrashed"),
    7: ("spin", "DecoderTimedOut"),
    9: ("eat", "ImageTooLarge"),
    11: ("end_by:SIGKILL", "DecoderCrashed"),
}


@pytest.mark.slow
def test_images_that_attack_their_decoder_fail_alone(tmp_path: Path) -> None:
    images = [hostile(DEEDS[n][0]) if n in DEEDS else scene(n)[2] for n in range(16)]
    write_shard(tmp_path / "in/a.tar", [(f"{n:03}.png", image) for n, image in enumerate(images)])
    job = job_of(
        tmp_path / "in",
        tmp_path / "out",
        ask=[{"id": "shape", "prompt": "what shape is present?"}],
        max_failed_fraction=1.0,
        resources={
            "generate": {"batch_size": 8},
            "preprocess": {"decode_timeout_s": 10.0, "decode_memory_bytes": 2**28},
        },
    )
    spec = tmp_path / "job.yaml"
    spec.write_text(yaml.safe_dump(job.model_dump(mode="json", by_alias=True)))
    environment = {"PYTHONPATH": path_with_hostile_decoders()}
    done = lavaflow("run", str(spec), "--json", env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = {row["source_index"]: row for row in answers(tmp_path / "out")}
    assert {n: row["error_class"] for n, row in rows.items() if row["error_class"]} == {
        n: error for n, (_, error) in DEEDS.items()
    }
    assert Counter(row["status"] for row in rows.values()) == {"ok": 11, "failed": 5}
    assert all(rows[n]["answer"] == scene(n)[1] for n in range(16) if n not in DEEDS)
    assert lavaflow("verify", str(tmp_path / "out"), env=environment).returncode == 0
