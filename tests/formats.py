"""The same images as a source of each format, with some damage in each."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.shards import json_bytes, tar_bytes

KINDS = ("webdataset", "parquet", "parquet-uris", "images", "manifest")
QUESTIONS = [{"id": "colour", "question": "what color is the shape?"}]
GONE = "gone.png"


def write_sources(folder: Path, images: Sequence[bytes], *, shards: int = 3) -> None:
    """A folder of each of KINDS: `shards` files that share the images, and one that breaks off."""
    parts = [dict(enumerate(images[n::shards], start=n * 1000)) for n in range(shards)]
    for name in KINDS:
        (folder / name).mkdir(parents=True)
    for number, part in enumerate(parts):
        _write_tar(folder / "webdataset", number, part)
        _write_table(folder / "parquet" / f"{number}.parquet", part)
        _write_images(folder / "images", part)
        names = [*(_name(index) for index in part), GONE]
        _write_names(folder / "parquet-uris" / f"{number}.parquet", names)
        _write_manifest(folder / "manifest", number, names)
    (folder / "images" / "empty.png").touch()
    for whole in ("webdataset/0.tar", "parquet/0.parquet", "manifest/1.jsonl.gz"):
        data = (folder / whole).read_bytes()
        (folder / whole).with_stem(f"cut-{Path(whole).stem}").write_bytes(data[: len(data) // 2])


def source_of(kind: str, place: str, **keys: Any) -> dict[str, Any]:
    """The `source` of a spec, for the sources that lie at `place`."""
    format_ = kind.partition("-")[0]
    if kind in {"parquet-uris", "manifest"}:
        keys["image_root"] = f"{place}/images"
    if kind != "images":
        keys["keep"] = ["caption"]
    return {"format": format_, "path": f"{place}/{kind}/", **keys}


def asks_of(kind: str) -> list[dict[str, Any]]:
    """What every image is asked, and where the format has questions, the row's own."""
    own: list[dict[str, Any]] = [] if kind == "images" else [{"from": "questions"}]
    return [{"id": "shape", "prompt": "what shape is present?"}, *own]


def _name(index: int) -> str:
    return f"{index:05}.png"


def _write_tar(folder: Path, number: int, part: Mapping[int, bytes]) -> None:
    members = []
    for index, image in part.items():
        columns = {"questions": QUESTIONS, "caption": f"image {index}"}
        members += [(_name(index), image), (f"{index:05}.json", json_bytes(columns))]
    data = tar_bytes(members)
    if number % 3 == 1:
        (folder / f"{number}.tar.gz").write_bytes(gzip.compress(data, 1))
    elif number % 3 == 2:
        with pa.CompressedOutputStream(str(folder / f"{number}.tar.zst"), "zstd") as file:
            file.write(data)
    else:
        (folder / f"{number}.tar").write_bytes(data)


def _write_table(path: Path, part: Mapping[int, bytes]) -> None:
    columns = {"image": pa.array(part.values(), pa.binary()), **_told([*part])}
    pq.write_table(pa.table(columns), path, row_group_size=8, compression="zstd")


def _write_names(path: Path, names: Sequence[str]) -> None:
    pq.write_table(pa.table({"image": names, **_told(names)}), path, row_group_size=8)


def _told(indexes: Sequence[object]) -> dict[str, Any]:
    return {
        "questions": [QUESTIONS] * len(indexes),
        "caption": [f"image {index}" for index in indexes],
    }


def _write_images(folder: Path, part: Mapping[int, bytes]) -> None:
    for index, image in part.items():
        (folder / _name(index)).write_bytes(image)


def _write_manifest(folder: Path, number: int, names: Sequence[str]) -> None:
    """Each image twice, in two places; and a line that is none."""
    rows = [
        {"image": name, "question_id": f"{turn}-{name}", "text": f"{turn}?", "caption": name}
        for turn in range(2)
        for name in names
    ]
    lines = [*map(json.dumps, rows), "{no JSON"]
    data = "\n".join(lines).encode()
    if number % 2:
        (folder / f"{number}.jsonl.gz").write_bytes(gzip.compress(data))
    else:
        (folder / f"{number}.jsonl").write_bytes(data)
