"""The process that decodes: what an image does to it costs that image, and nothing else."""

import gc
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import decode
from pipeline.decode_process import DecodeSettings
from pipeline.decoder import Decoder
from pipeline.engine.pixels import Resize
from schemas.errors import (
    DecodeError,
    DecoderCrashed,
    DecoderTimedOut,
    ImageCorrupt,
    ImageEmpty,
    ImageTooLarge,
    JobError,
)
from tests.hostile_decoders import (
    children_of,
    hostile,
    is_alive,
    path_with_hostile_decoders,
    wait_until,
)
from tests.shards import image_bytes, saved

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

MB = 2**20
RESIZE = Resize(margin=None, edge=32, fixed=None, resample=3, crop=(32, 32))


def noise(width: int, height: int) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), "PNG")


PNG = noise(50, 70)


Started = Callable[[], list[int]]


def settings(**changes: Any) -> DecodeSettings:
    values: dict[str, Any] = {
        "resize": RESIZE,
        "max_pixels": 100_000_000,
        "max_bytes": 2**28,
        "allow_truncated": False,
        "is_fast": False,
        "timeout_s": 60.0,
        "memory_bytes": 512 * MB,
    }
    return DecodeSettings(**{**values, **changes})


@pytest.fixture(autouse=True)
def _hostile_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every process that is started here."""
    monkeypatch.setenv("PYTHONPATH", path_with_hostile_decoders())


@pytest.fixture
def started() -> Callable[[], list[int]]:
    """The processes that were started since the test began."""
    before = set(children_of(os.getpid()))
    return lambda: [pid for pid in children_of(os.getpid()) if pid not in before]


@pytest.fixture
def decoder(started: Started) -> Iterator[Decoder]:
    with Decoder(settings()) as decoder:
        yield decoder


def outcomes(decoder: Decoder, *images: bytes) -> list[Any]:
    """The class of each image's error; None for those that are decoded."""
    futures = [decoder.submit(image) for image in images]
    return [type(error) if (error := future.exception()) else None for future in futures]


def error_of(decoder: Decoder, image: bytes) -> str:
    error = decoder.submit(image).exception()
    assert isinstance(error, DecodeError)
    return str(error)


class TestImages:
    def test_pixels_are_those_of_decoding_and_resizing_here(self, decoder: Decoder) -> None:
        decoded = decoder.submit(PNG).result()
        expected = RESIZE(decode(PNG, max_pixels=10_000))
        assert np.array_equal(decoded.array, np.asarray(expected))
        assert (decoded.width, decoded.height) == (50, 70)

    def test_images_come_back_in_their_order(self, decoder: Decoder) -> None:
        futures = [decoder.submit(noise(20 + n, 32)) for n in range(30)]
        assert [future.result().width for future in futures] == list(range(20, 50))

    def test_any_bytes_in_a_row_are_an_image(self, decoder: Decoder) -> None:
        assert decoder.submit(memoryview(b"-" + PNG)[1:]).result().width == 50

    def test_an_error_of_decoding_is_raised_with_its_class_and_message(
        self, decoder: Decoder
    ) -> None:
        assert outcomes(decoder, b"", PNG[:200], PNG) == [ImageEmpty, ImageCorrupt, None]
        assert "starts like PNG" in error_of(decoder, PNG[:12])

    def test_all_images_share_one_process(self, decoder: Decoder, started: Started) -> None:
        outcomes(decoder, PNG)
        before = started()
        outcomes(decoder, *[PNG, b"no image"] * 10)
        assert started() == before

    def test_too_many_bytes_are_refused_before_anything_is_done(self) -> None:
        with Decoder(settings(max_bytes=len(PNG))) as decoder:
            assert outcomes(decoder, PNG, PNG + b"0", PNG) == [None, ImageTooLarge, None]
            message = error_of(decoder, PNG + b"0")
        assert f"{len(PNG) + 1} bytes, more than the {len(PNG)} of source.max_image" in message

    def test_an_image_that_grows_beyond_the_limit_when_resized_is_too_large(self) -> None:
        strip = image_bytes(size=(20_000, 1))
        with Decoder(settings(max_pixels=1_000_000)) as decoder:
            assert outcomes(decoder, strip) == [ImageTooLarge]
            assert "would be resized to 640000 x 32" in error_of(decoder, strip)

    def test_truncated_images_are_decoded_where_that_is_allowed(self) -> None:
        cut = PNG[: len(PNG) // 2]
        with Decoder(settings(allow_truncated=True)) as decoder:
            assert outcomes(decoder, cut) == [None]

    def test_fast_decodes_less_of_a_large_jpeg_and_tells_its_whole_size(self) -> None:
        image = Image.effect_mandelbrot((1600, 1200), (-2.0, -1.2, 1.0, 1.2), 60).convert("RGB")
        jpeg = saved(image, "JPEG", quality=90)
        with Decoder(settings()) as exact, Decoder(settings(is_fast=True)) as fast:
            slow, quick = exact.submit(jpeg).result(), fast.submit(jpeg).result()
            small = saved(image.resize((80, 60)), "JPEG")
            assert exact.submit(small).result() == fast.submit(small).result()
            assert exact.submit(PNG).result() == fast.submit(PNG).result()
        assert (quick.width, quick.height) == (1600, 1200)
        difference = np.abs(quick.array.astype(int) - slow.array)
        assert 0 < difference.mean() < 2


class TestBadOnes:
    @pytest.mark.parametrize(
        ("deed", "how"),
        [
            ("segv", "SIGSEGV"),
            ("end_by:SIGABRT", "SIGABRT"),
            ("end_by:SIGKILL", "SIGKILL"),
            ("leave:3", "status 3"),
            ("leave:0", "status 0"),
        ],
    )
    def test_a_decoder_that_ends_its_process_costs_its_image_only(
        self,
        decoder: Decoder,
        deed: str,
        how: str,
    ) -> None:
        before, bad, after = [decoder.submit(image) for image in (PNG, hostile(deed), PNG)]
        assert before.result() == after.result()
        with pytest.raises(DecoderCrashed) as error:
            bad.result()
        assert f"b'HOSTILE:', ended the process ({how}), 2 times" in str(error.value)

    @pytest.mark.parametrize("deed", ["hang", "spin"])
    def test_a_decoder_that_hangs_costs_its_image_only(self, deed: str) -> None:
        with Decoder(settings(timeout_s=0.5)) as decoder:
            start = time.monotonic()
            before, bad, after = [decoder.submit(image) for image in (PNG, hostile(deed), PNG)]
            assert before.result() == after.result()
            assert time.monotonic() - start < 10
            with pytest.raises(DecoderTimedOut, match=r"longer than 0\.5 s; .*decode_timeout_s"):
                bad.result()

    def test_time_is_counted_for_each_image_alone(self) -> None:
        with Decoder(settings(timeout_s=0.5)) as decoder:
            for _ in range(4):
                time.sleep(0.2)
                assert outcomes(decoder, PNG) == [None]

    def test_a_decoder_that_asks_for_memory_without_end_costs_its_image_only(
        self,
        decoder: Decoder,
        started: Started,
    ) -> None:
        outcomes(decoder, PNG)
        before = started()
        assert outcomes(decoder, hostile("eat"), PNG) == [ImageTooLarge, None]
        assert "decode_memory_bytes" in error_of(decoder, hostile("eat"))
        assert started() == before

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
    def test_an_image_of_more_pixels_than_memory_is_too_large(self, kind: str) -> None:
        image = saved(Image.new("RGB", (7000, 7000)), kind)
        with Decoder(settings(memory_bytes=32 * MB, max_bytes=150 * MB)) as decoder:
            assert outcomes(decoder, image, PNG) == [ImageTooLarge, None]

    def test_what_a_decoder_prints_goes_nowhere(
        self,
        decoder: Decoder,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        assert outcomes(decoder, hostile("talk"), PNG, hostile("segv")) == [
            None,
            None,
            DecoderCrashed,
        ]
        assert capfd.readouterr() == ("", "")

    def test_what_nobody_has_foreseen_costs_its_image_only(
        self,
        decoder: Decoder,
    ) -> None:
        assert outcomes(decoder, hostile("surprise:x"), PNG) == [DecoderCrashed, None]
        assert "ended in SurpriseError: boo" in error_of(decoder, hostile("surprise:boo"))

    def test_an_image_that_another_has_killed_is_tried_again(
        self,
        decoder: Decoder,
        tmp_path: Path,
    ) -> None:
        assert outcomes(decoder, hostile(f"die_once:{tmp_path / 'died'}"), PNG) == [None, None]

    def test_a_process_that_was_killed_between_images_is_replaced(
        self, decoder: Decoder, started: Started
    ) -> None:
        assert outcomes(decoder, PNG) == [None]
        (child,) = started()
        os.kill(child, signal.SIGKILL)
        assert outcomes(decoder, PNG, PNG) == [None, None]


class TestLife:
    def test_it_ends_when_it_is_closed(self, started: Started) -> None:
        decoder = Decoder(settings())
        outcomes(decoder, PNG)
        (child,) = started()
        decoder.close()
        assert not is_alive(child)

    def test_it_ends_when_nobody_holds_it(self, started: Started) -> None:
        decoder = Decoder(settings())
        outcomes(decoder, PNG)
        (child,) = started()
        del decoder
        gc.collect()
        assert wait_until(lambda: not is_alive(child))

    @pytest.mark.parametrize("deed", ["", "spin"])
    def test_it_ends_with_an_owner_that_is_killed(self, deed: str) -> None:
        program = (
            "import time; from tests.test_decoder import *; decoder = Decoder(settings());"
            f"decoder.submit(PNG).result(); decoder.submit({hostile(deed)!r});"
            "print(*children_of(os.getpid()), flush=True); time.sleep(600)"
        )
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
            assert owner.stdout is not None
            child = int(owner.stdout.readline())
            assert is_alive(child)
            owner.kill()
        assert wait_until(lambda: not is_alive(child))

    def test_ctrl_c_is_left_to_its_owner(self, decoder: Decoder, started: Started) -> None:
        outcomes(decoder, PNG)
        (child,) = started()
        os.kill(child, signal.SIGINT)
        assert outcomes(decoder, PNG) == [None]
        assert started() == [child]

    def test_one_that_cannot_start_is_no_fault_of_the_image(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho no such thing >&2\nexit 7\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        with (
            Decoder(settings()) as decoder,
            pytest.raises(JobError, match=r"does not start .*status 7.*no such thing"),
        ):
            decoder.submit(PNG).result()

    def test_a_python_that_is_gone_is_no_fault_of_the_image(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "executable", "/no/python")
        with (
            Decoder(settings()) as decoder,
            pytest.raises(JobError, match=r"does not start: .*/no/python"),
        ):
            decoder.submit(PNG).result()

    def test_closing_while_it_starts_leaves_nothing_behind(self, started: Started) -> None:
        for _ in range(5):
            Decoder(settings()).close()
        assert started() == []

    def test_it_needs_neither_torch_nor_transformers(self) -> None:
        code = "import sys, pipeline.decode_process; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestMemory:
    """100 megapixels, in no more than 1 GB."""

    SIDE = 10_000

    def test_a_photo_that_lies_on_its_side(self) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        self.check(saved(Image.new("RGB", (self.SIDE, self.SIDE)), "JPEG", exif=exif))

    def test_an_image_that_is_not_rgb(self) -> None:
        image = Image.new("RGBA", (self.SIDE, self.SIDE))
        self.check(saved(image, "PNG", compress_level=1))

    def check(self, image: bytes) -> None:
        with Decoder(settings(memory_bytes=10**9)) as decoder:
            assert outcomes(decoder, image) == [None]


def test_a_header_alone_does_not_allocate() -> None:
    bomb = bytearray(saved(Image.new("L", (8, 8)), "PNG"))
    bomb[16:24] = struct.pack(">II", 9_000, 9_000)
    with Decoder(settings(memory_bytes=64 * MB)) as decoder:
        assert issubclass(outcomes(decoder, bytes(bomb))[0], DecodeError)
