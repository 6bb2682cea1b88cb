"""Pillow's own test images through the CPU step: what Pillow can show is shown, the rest fails."""

import os
import warnings
from pathlib import Path

import pytest
from PIL import Image

from pipeline.coverage import Ranges
from pipeline.encode import Encode
from pipeline.sources import open_source
from schemas.job import JobSpec, SourceSpec
from tests.corpus import corpus
from tests.hostile_decoders import children_of
from tests.lines import sample_table, unfolded
from tests.shards import write_shard

JOB = JobSpec.model_validate(
    {
        "source": {"format": "images", "path": "x"},
        "ask": [{"id": "caption", "prompt": "Describe the image."}],
        "output": {"path": "y"},
    }
)
BATCH = 16
MOST_BYTES = 2 * 10**9
OUTCOMES = {
    None,
    "ImageCorrupt",
    "ImageEmpty",
    "ImageTooLarge",
    "ImageUnidentified",
}
"""Of the images that have crashed or blocked decoders in the past, none does any more."""


def outcomes_of(files: tuple[Path, ...], encode: Encode) -> dict[Path, str | None]:
    """The class of each file's error; None for those that are decoded."""
    found: dict[Path, str | None] = {}
    for start in range(0, len(files), BATCH):
        group = files[start : start + BATCH]
        rows = [
            {"source_uri": str(file), "source_index": 0, "units": ["caption"], "image": data}
            for file, data in ((file, file.read_bytes()) for file in group)
        ]
        encoded = unfolded(encode(sample_table(rows)))
        for file, row in zip(group, encoded, strict=True):
            (prompt,) = row["prompts"]
            assert row["source_uri"] == str(file)
            assert (row["pixels"] is None) == (prompt["status"] == "failed")
            found[file] = (prompt["error"] or {}).get("class")
    return found


def can_be_shown(file: Path, *, max_pixels: int) -> bool:
    """Whether Pillow makes RGB of it, within the limit and without Ghostscript."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        patched.setattr(Image, "MAX_IMAGE_PIXELS", max_pixels)
        try:
            with Image.open(file) as image:
                image.convert("RGB")
                return image.format != "EPS"
        except Exception:  # noqa: BLE001 (whatever Pillow raises, it does not show the image)
            return False


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


@pytest.mark.slow
def test_what_pillow_can_show_is_shown_and_the_rest_fails(
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = corpus()
    assert len(files) > 1000
    before = set(children_of(os.getpid()))
    encode = Encode(JOB, {})
    found = outcomes_of(files, encode)
    (child,) = set(children_of(os.getpid())) - before
    assert capfd.readouterr() == ("", "")
    assert set(found.values()) <= OUTCOMES
    assert peak_bytes(child) < MOST_BYTES
    limit = JOB.source.max_image_pixels
    failed = [file for file in files if found[file]]
    assert [file.name for file in failed if can_be_shown(file, max_pixels=limit)] == []
    assert sum(outcome is None for outcome in found.values()) > 800


@pytest.mark.slow
def test_every_file_is_one_row_of_either_source(tmp_path: Path) -> None:
    """With the bytes that it has, of which the test above tells the outcome."""
    files = corpus()
    (tmp_path / "all.txt").write_text("\n".join(map(str, files)))
    members = [(f"{number:05}.img", file.read_bytes()) for number, file in enumerate(files)]
    write_shard(tmp_path / "all.tar", members)
    sources = [
        {"format": "images", "path": str(tmp_path / "all.txt")},
        {"format": "webdataset", "path": str(tmp_path / "all.tar"), "columns": {"image": "img"}},
    ]
    for spec in sources:
        source = open_source(SourceSpec.model_validate(spec))
        shards = source.list()
        source.expect(shards)
        samples = [sample for shard in shards for sample in source.read(shard, skip=Ranges())]
        assert not [sample for sample in samples if sample.error or sample.image_error]
        assert sorted(sample.image or b"" for sample in samples) == sorted(d for _, d in members)
