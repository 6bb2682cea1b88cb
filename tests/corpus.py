"""The images of Pillow's own tests: of every format, good ones and bad ones.

They are in its source distribution only, which is downloaded once, into the virtual environment.
"""

import functools
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
FOLDER = "Tests/images/"


@functools.cache
def corpus() -> tuple[Path, ...]:
    """The files of Pillow's `Tests/images`; skips the test where they cannot be downloaded."""
    (version,) = re.findall(r"^pillow==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    folder = Path(sys.prefix) / ".cache" / f"pillow-{version}-images"
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            images = _unpacked(_downloaded(version, Path(scratch)))
            try:
                images.rename(folder)
            except OSError:
                if not folder.exists():
                    raise  # else another process of the tests was quicker: its files are the same
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file()))


def _downloaded(version: str, folder: Path) -> Path:
    wanted = ["--no-deps", "--no-binary", "pillow", f"pillow=={version}"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz"))
    if done.returncode or not archives:
        reason = (done.stderr.strip() or "pip has given none").splitlines()[-1]
        pytest.skip(f"Pillow's source distribution cannot be downloaded: {reason}")
    return archives[0]


def _unpacked(archive: Path) -> Path:
    folder = archive.parent / "images"
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.partition("/")[2]
            if member.isfile() and name.startswith(FOLDER):
                path = folder / name.removeprefix(FOLDER)
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None
                with path.open("wb") as file:
                    shutil.copyfileobj(content, file)
    return folder
