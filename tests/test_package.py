"""The wheel: everything that a working command needs is in it, and no more."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", str(folder), str(REPOSITORY)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("lavaflow-*.whl")
    return built


def test_the_wheel_holds_the_packages_the_model_and_its_samples(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = [
        path.relative_to(REPOSITORY).as_posix()
        for package in ("schemas", "pipeline", "jobs")
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [name for name in tracked if name not in names] == []
    assert not [n for n in names if n.startswith(("tests/", "tools/", "benchmarks/"))]


def test_the_demo_of_the_installed_wheel_answers_and_a_second_one_finds_nothing_left(
    wheel: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True, capture_output=True)

    def lavaflow(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, site / "bin" / "lavaflow", *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )

    first = lavaflow("demo", "-o", "out")
    assert first.returncode == 0, first.stderr
    assert "This run: " in first.stdout
    assert "0 failed" in first.stdout
    assert "a red circle\n    Describe the image." in first.stdout
    assert "A red circle on a light background." in first.stdout

    second = lavaflow("demo", "-o", "out")
    assert second.returncode == 0, second.stderr
    assert second.stdout.startswith("This run: nothing left to do\n")
    assert second.stdout.partition("Table: ")[2] == first.stdout.partition("Table: ")[2]

    verified = lavaflow("verify", "out")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert json.loads(verified.stdout)["ok"] is True
