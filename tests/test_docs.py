"""docs/configuration.md: every key with its type, its default and whether it takes a restart, and no other key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lb.keys import LbConfig, ServerKeys
from lb.schema import Key, walk

PAGE = Path(__file__).parent.parent / "docs" / "configuration.md"
TOPS = {"Top level": "", "A server's top level": ""}


def tables(chapter: str) -> dict[tuple[str, str], tuple[str, str, str]]:
    """The rows of a chapter's tables: path of the table and key, to type, default and restart."""
    text = PAGE.read_text()
    start = text.index(f"\n## {chapter}\n")
    end = text.find("\n## ", start + 1)
    rows: dict[tuple[str, str], tuple[str, str, str]] = {}
    path = ""
    for line in text[start:end].splitlines():
        if line.startswith("### "):
            heading = line.removeprefix("### ").strip("`")
            path = TOPS.get(heading, heading)
        elif line.startswith("| `"):
            name, kind, default, restart, meaning = (cell.strip() for cell in line.strip("|").split(" | "))
            assert meaning, f"{path} {name} has no meaning"
            assert (path, name.strip("`")) not in rows, f"{path} {name} stands there twice"
            rows[path, name.strip("`")] = kind, default, restart
    return rows


def expected(table: type[object]) -> Iterator[tuple[tuple[str, str], tuple[str, str, str]]]:
    for path, name, entry in walk(table):
        yield (path, name), (entry.kind.words, default(entry), "yes" if entry.restart else "no")


def default(entry: Key) -> str:
    if entry.is_required:
        return "required"
    value = entry.json_default()
    if isinstance(value, dict) and value:
        return "defaults"
    if value is None or value in ({}, []):
        return "none"
    if value == "":
        return '`""`'
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


@pytest.mark.parametrize(("chapter", "table"), [("The balancer", LbConfig), ("A server", ServerKeys)])
def test_the_page_has_every_key_as_it_is_and_no_other(chapter: str, table: type[object]) -> None:
    assert tables(chapter) == dict(expected(table))


def test_the_messages_on_the_page_are_real(tmp_path: Path) -> None:
    """The console session at the top: each message is one that the program gives."""
    from lb.config import load_config
    from lb.errors import ConfigErrors
    from tests.files import examples

    path = examples(tmp_path) / "quiclb.yaml"
    text = path.read_text()
    for old, new in (
        ("idle-timeout", "idle-timout"),
        ("nonce-length: 12", "nonce-length: 3"),
        ("81d5e47a", "3fa91c02"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    with pytest.raises(ConfigErrors) as caught:
        load_config(path)
    session = re.search(r"\$ quiclb check quiclb.yaml\n(.*?)\$ echo", PAGE.read_text(), re.DOTALL)
    assert session is not None
    assert session[1].splitlines() == [str(error) for error in caught.value.exceptions]


def test_the_readmes_configurations_are_some(tmp_path: Path) -> None:
    """The first is a whole file; the second makes it one for the other engine, which has no workers."""
    from lb.config import load_config
    from tests.files import write_keys

    readme = (PAGE.parent.parent / "README.md").read_text()
    whole, change = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    write_keys(tmp_path)
    (tmp_path / "quiclb.yaml").write_text(whole)
    config = load_config(tmp_path / "quiclb.yaml")

    assert [backend.name for backend in config.services[0].service.backends] == ["a", "b", "c"]
    assert config.services[0].service.cid_slots[0].config.algorithm == "single-pass"

    (tmp_path / "quiclb.yaml").write_text(change + whole.replace("workers: 2\n", ""))
    in_the_kernel = load_config(tmp_path / "quiclb.yaml")
    assert (in_the_kernel.engine, in_the_kernel.interface) == ("xdp", "eth0")
    assert in_the_kernel.services == config.services


@pytest.mark.parametrize(
    ("folder", "begin", "end"),
    [("lb", "# Architecture", "`backend/` is an application"), ("backend", "| in `backend/`", "## A datagram's way")],
)
def test_the_architecture_has_a_row_for_every_module_and_no_other(folder: str, begin: str, end: str) -> None:
    text = (PAGE.parent / "architecture.md").read_text()
    rows = re.findall(r"^\| ((?:`[\w/]+` ?)+)\|", text[text.index(begin) : text.index(end)], re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`([\w/]+)`", row)]
    top = PAGE.parent.parent / folder
    modules = [
        path.relative_to(top).with_suffix("") for path in top.rglob("*.py") if folder == "lb" or path.parent == top
    ]

    assert sorted(named) == sorted(str(module) for module in modules if module.stem not in ("__init__", "__main__"))


def test_every_link_between_the_pages_leads_somewhere() -> None:
    root = PAGE.parent.parent
    for page in (*root.glob("*.md"), *root.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]*)#?[^)]*\)", page.read_text()):
            assert not target or (page.parent / target).exists(), f"{page.name}: {target}"


RUNBOOK = PAGE.with_name("operations.md")


def test_every_row_of_what_happens_when_is_a_test() -> None:
    text = RUNBOOK.read_text()
    table = text[text.index("## What happens when") : text.index("## Alerts")]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| when ")]
    assert len(rows) >= 14
    for row in rows:
        named = re.search(r"`(tests/[a-z0-9_/]+\.py)::(test_\w+)` \|$", row)
        assert named is not None, row
        assert f"def {named[2]}(" in (RUNBOOK.parents[1] / named[1]).read_text(), row
