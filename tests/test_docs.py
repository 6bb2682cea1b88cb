"""README, docs and examples: every command parses, every spec loads, every path exists."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from jobs import yaml12
from jobs.cli import main
from jobs.load import build_spec, load_spec
from jobs.reference import reference_page

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])
EXAMPLES = sorted(REPOSITORY.glob("examples/*.yaml"))
NAMES = [page.name for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> Iterator[str]:
    """The commands of fenced blocks, of tables, and of the first lines of the examples."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            yield from block.replace("\\\n", " ").splitlines()
        yield from re.findall(r"^\| `(lavaflow [^`]+)`", page.read_text(), re.MULTILINE)
    for example in EXAMPLES:
        yield from re.findall(r"^#   (.+)$", example.read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_shown_is_one_that_exists(command: str) -> None:
    program, *args = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{args[0]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    elif program == "lavaflow":
        parse(args)
    else:
        assert (REPOSITORY / program).exists(), f"{program} is none of ours"


def parse(args: list[str]) -> None:
    """Parse as the command line does, and run nothing."""
    with main.make_context("lavaflow", list(args)) as ctx:
        name, command, rest = main.resolve_command(ctx, args)
        assert command is not None
        with command.make_context(name, rest, parent=ctx):
            pass


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(click.UsageError):
        parse(["caption", "photos/", "--no-such-option"])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_spec_shown_is_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        build_spec(yaml12.load(block), origin=page.name)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])
def test_every_example_is_valid(example: Path) -> None:
    assert load_spec(str(example)).units


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_every_path_of_the_tree_exists() -> None:
    (tree,) = (b for b in blocks(REPOSITORY / "README.md", "text") if b.startswith("schemas/"))
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            assert (REPOSITORY / name).exists(), name
        else:
            assert (REPOSITORY / folder / name).exists(), folder + name


def test_every_command_is_in_the_table_of_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    listed = re.findall(r"^\| `lavaflow (\w+)", readme, re.MULTILINE)
    assert listed == list(main.commands)


def test_the_reference_page_is_up_to_date() -> None:
    page = (REPOSITORY / "docs" / "spec.md").read_text()
    assert page == reference_page(), "make it again: lavaflow spec > docs/spec.md"
