"""What pages say of the project's files, names and links is so."""

import inspect
import re
from itertools import pairwise

import networkx
import pytest

from dk_detection.layers.table import TABLE
from docs import rooms
from tests.docs.pages import PAGES, ROOT, tokens

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its first row."""
    section = (ROOT / page).read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    lines = re.search(r"(^\|.*\|\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def anchors(page) -> set[str]:
    """The anchors that GitHub gives to headings."""
    parsed = tokens(page)
    titles = [text.content for heading, text in pairwise(parsed) if heading.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links(page):
    inline = [child for token in tokens(page) for child in token.children or ()]
    links = [child.attrGet("href") or child.attrGet("src") for child in inline if child.type in ("link_open", "image")]
    for link in links:
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_can_be_reached():
    reached, new = set(), {ROOT / "README.md"}
    while new:
        reached |= new
        linked = {
            (page.parent / link).resolve()
            for page in new
            for link in re.findall(r"\]\(([^)#]+\.md)", page.read_text(encoding="utf-8"))
            if "://" not in link
        }
        new = linked - reached
    assert {*PAGES} <= reached, {*PAGES} - reached


def test_the_drawing_of_the_rooms_is_that_of_the_sources():
    """If not: python docs/rooms.py."""
    drawing = (ROOT / "docs" / "rooms.svg").read_text(encoding="utf-8")
    graph = rooms.rooms()
    assert drawing == rooms.draw(graph) + "\n"
    assert set(re.findall(r">(\w+)</text>", drawing)) == set(graph)
    described = [room for row in table("docs/architecture.md", "## Rooms") for room in code(row[0])]
    assert sorted(described) == sorted(graph)


def test_rows_of_the_drawing():
    graph = networkx.DiGraph(["ab", "bc", "cd", "ad", "ed"])
    graph.add_node("alone")
    rows = rooms.rows_of(graph)
    long = [("a", "d"), ("e", "d")]
    expected = [
        {"a", "e"},
        {"b", *((*edge, 1) for edge in long)},
        {"c", *((*edge, 2) for edge in long)},
        {"d"},
        {"alone"},
    ]
    assert list(map(set, rows)) == expected
    row_of = {node: index for index, row in enumerate(rows) for node in row}
    assert all(row_of[end] == row_of[start] + 1 for start, end in graph.edges)
    assert rows[1].index(("a", "d", 1)) < rows[1].index(("e", "d", 1)) or rows[0] == ["e", "a"]  # they do not cross


@pytest.mark.parametrize("heading", ["## The path of one argument", "## The path of one patch"])
def test_paths(heading):
    rows = table("docs/architecture.md", heading)
    assert len(rows) > 5
    for row in rows:
        (file,), (name,) = code(row[0]), code(row[1])
        assert re.search(rf"\b(def|class|struct|at::Tensor|int64_t) {name}\b", (ROOT / file).read_text("utf-8")), row


def test_table_of_layers():
    rows = [row for row in TABLE if row.kind == "conv"]
    written = table("docs/exchange.md", "## Layers")
    assert [code(row[0]) + code(row[1]) for row in written] == [[row.token, row.layer.__name__] for row in rows]
    for row, cells in zip(rows, written, strict=True):
        takes = {name for base in row.layer.__mro__ for name in inspect.signature(base.__init__).parameters}
        assert set(code(cells[3])) <= takes | {token.token for token in rows}, cells
