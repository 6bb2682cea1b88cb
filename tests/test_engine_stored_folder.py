"""Checkpoints in a store: listed by the driver, downloaded once on each machine, whole or not."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.plan import plan
from pipeline.engine.check import check_model
from pipeline.engine.checkpoint import open_checkpoint
from pipeline.engine.load import load_model, load_processor
from pipeline.engine.stored import list_folder
from pipeline.fingerprint import model_fingerprint
from pipeline.storage import filesystem
from schemas.errors import SpecError, StoreUnavailable
from schemas.job import ModelSpec, StorageSpec
from tests.models import noise_image, shared_checkpoint, tiny_model
from tests.s3 import S3Server
from tests.whole_jobs import job_of

INDEX = "model.safetensors.index.json"
BIG_BYTES = 300 * 2**20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAVAFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def spec(s3_server: S3Server, cache: Path) -> ModelSpec:
    """A checkpoint in a folder of the bucket that no other test uses."""
    storage = StorageSpec(endpoint_url=s3_server.endpoint_url)
    url = s3_server.url(uuid.uuid4().hex)
    upload(url, storage, shared_checkpoint())
    return ModelSpec(path=url, storage=storage, device="cpu")


def upload(url: str, storage: StorageSpec, folder: Path) -> None:
    fs, inner = filesystem(url, storage)
    for path in folder.iterdir():
        fs.pipe_file(f"{inner}/{path.name}", path.read_bytes())


def put(spec: ModelSpec, name: str, data: bytes | None) -> None:
    """Write a file of the checkpoint, or remove it."""
    fs, inner = filesystem(spec.path, spec.storage)
    if data is None:
        fs.rm_file(f"{inner}/{name}")
    else:
        fs.pipe_file(f"{inner}/{name}", data)


def cached(cache: Path) -> list[str]:
    return sorted(p.name for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_model_in_a_store_is_the_one_that_was_uploaded(spec: ModelSpec, cache: Path) -> None:
    check_model(spec)
    processor = load_processor(spec)
    assert processor.image_token == "<image>"
    assert "model.safetensors" not in cached(cache)
    model = load_model(spec, torch.device("cpu"))
    loaded = model.state_dict()
    assert all(torch.equal(w, loaded[name]) for name, w in tiny_model().state_dict().items())
    [folder] = (cache / "models").iterdir()
    assert (folder / "model.safetensors").stat().st_size
    assert not list(folder.glob("*.part"))


def test_the_driver_downloads_no_weights(spec: ModelSpec, cache: Path, tmp_path: Path) -> None:
    noise_image(0).save(tmp_path / "one.png")
    source = {"format": "images", "path": str(tmp_path / "one.png")}
    ask = [{"id": "what", "prompt": "What is this?"}]
    planned = plan(job_of("", tmp_path / "out", source=source, ask=ask, model=spec))
    assert cached(cache)
    assert "model.safetensors" not in cached(cache)
    assert planned.job.model.revision == open_checkpoint(spec).commit
    check_model(planned.job.model)


def test_a_model_that_changes_after_the_plan_is_not_used(spec: ModelSpec) -> None:
    pinned = spec.model_copy(update={"revision": open_checkpoint(spec).commit})
    put(spec, "README.md", b"about it")
    open_checkpoint(pinned)
    put(spec, "generation_config.json", b"{}")
    with pytest.raises(SpecError, match="it has changed since it was at"):
        load_processor(pinned)


def test_the_fingerprint_follows_the_store(spec: ModelSpec, cache: Path) -> None:
    def of(path: Any = spec) -> dict[str, str]:
        return model_fingerprint(job_of("x", "y", model=path))

    before = of()
    assert "model.safetensors" not in cached(cache)
    local = of({"path": str(shared_checkpoint())})
    assert {name for name in local if local[name] != before[name]} == {"weights"}
    weights = bytearray((shared_checkpoint() / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    put(spec, "model.safetensors", bytes(weights))
    after = of()
    assert {name for name in after if after[name] != before[name]} == {"weights"}


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("model.safetensors", None, "has no model.safetensors"),
        ("config.json", None, "has no config.json"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", b"12345", "model.safetensors is broken or cut off"),
        ("model.safetensors", b"\xff" * 64, "model.safetensors is broken or cut off"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_the_driver(
    spec: ModelSpec, cache: Path, name: str, data: bytes | None, told: str
) -> None:
    put(spec, name, data)
    with pytest.raises(SpecError, match=told):
        check_model(spec)
    assert "model.safetensors" not in cached(cache)


def test_weights_that_were_cut_off_on_their_way_up_are_refused_by_the_driver(
    spec: ModelSpec, cache: Path
) -> None:
    whole = (shared_checkpoint() / "model.safetensors").read_bytes()
    put(spec, "model.safetensors", whole[:-1])
    with pytest.raises(SpecError, match=f"{len(whole) - 1} bytes where its header says"):
        check_model(spec)
    put(spec, "model.safetensors", None)
    put(spec, INDEX, json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode())
    with pytest.raises(SpecError, match=r"names model-00001-of-00001\.safetensors, missing"):
        check_model(spec)
    assert "model.safetensors" not in cached(cache)


def test_a_folder_that_is_not_there_and_a_store_that_is_not_there(spec: ModelSpec) -> None:
    nowhere = spec.model_copy(update={"path": f"{spec.path}-not"})
    with pytest.raises(SpecError, match="does not exist"):
        check_model(nowhere)
    gone = StorageSpec(endpoint_url="http://127.0.0.1:9", timeout_s=1)
    with pytest.raises(StoreUnavailable, match="cannot be read"):
        check_model(spec.model_copy(update={"storage": gone}))


def test_secrets_in_the_url_are_refused() -> None:
    with pytest.raises(SpecError, match="credentials come from the environment") as caught:
        check_model(ModelSpec(path="https://me:secret@store/model"))
    assert "secret" not in str(caught.value)


def test_a_file_that_changes_while_it_is_read_is_none(spec: ModelSpec, cache: Path) -> None:
    folder = list_folder(spec.path, spec.storage, suffixes=(".json",))
    put(spec, "config.json", b"{}")
    with pytest.raises(SpecError, match="has changed while it was read"):
        folder.fetch("config.json")
    assert "config.json" not in cached(cache)


FETCH = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from schemas.job import StorageSpec
from pipeline.engine.stored import list_folder
url, endpoint, name = sys.argv[1:]
storage = StorageSpec(endpoint_url=endpoint)
folder = list_folder(url, storage, suffixes=(".json", ".safetensors", ".bin"))
print("ready", flush=True)
sys.stdin.readline()
print(folder.fetch(name).stat().st_size, flush=True)
"""


def fetching(spec: ModelSpec, name: str) -> "subprocess.Popen[str]":
    """A process that will fetch the file once it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, spec.path, str(spec.storage.endpoint_url), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while process.stdout.readline().strip() != "ready":
        assert process.poll() is None
    return process


def test_two_actors_that_start_at_once_download_once(spec: ModelSpec) -> None:
    data = os.urandom(20 * 2**20)
    put(spec, "pytorch_model.bin", data)
    both = [fetching(spec, "pytorch_model.bin") for _ in range(2)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = "".join(process.communicate()[0] for process in both)
    assert said.count(f"{len(data)}\n") == 2
    assert said.count("downloading ") == 1


def test_a_download_that_is_killed_leaves_nothing_that_counts(spec: ModelSpec, cache: Path) -> None:
    put(spec, "pytorch_model.bin", os.urandom(2**20) * (BIG_BYTES // 2**20))
    process = fetching(spec, "pytorch_model.bin")
    process.stdin.write("\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    while not any(part.stat().st_size for part in cache.rglob("*.part")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert cached(cache) == ["pytorch_model.bin.part"]
    folder = list_folder(spec.path, spec.storage, suffixes=(".json", ".safetensors", ".bin"))
    assert folder.fetch("pytorch_model.bin").stat().st_size == BIG_BYTES
    assert cached(cache) == ["pytorch_model.bin"]


def test_a_file_that_is_damaged_on_its_way_is_none(spec: ModelSpec, tmp_path: Path) -> None:
    folder = list_folder(spec.path, spec.storage, suffixes=(".json",))
    file, aside = folder.files["config.json"], tmp_path / "config.json.part"
    aside.write_bytes(b"x" * file.size)
    with pytest.raises(StoreUnavailable, match="was damaged on its way: its MD5 is 00, its etag"):
        folder._check("config.json", aside, digest="00", identity=file.identity)
    folder._check("config.json", aside, digest=file.identity, identity=file.identity)


def test_the_environment_may_name_the_server(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", str(spec.storage.endpoint_url))
    check_model(ModelSpec(path=spec.path))
