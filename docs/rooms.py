"""Draws the rooms of the project and who imports whom, as the sources have it. Writes the SVG beside itself."""

import ast
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dk_detection"
COMPILED = "_C"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 132, 28, 20, 36, 16


def imports(source: str, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """All modules that `source` imports, at any depth of the code, as absolute dotted names with their line numbers."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            if base == PACKAGE:  # from dk_detection import ops: the room is the name
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0]
            if isinstance(name, ast.Constant) and not name.value.startswith("."):
                yield node.lineno, name.value


def room_of(module: str) -> str:
    """dk_detection.ops.deform_conv2d -> ops; dk_detection -> __init__."""
    return (module.split(".") + ["__init__"])[1]


def sources() -> Iterator[tuple[str, str, bool]]:
    """Source, dotted name and whether it is a package's __init__, of every module of the package."""
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield file.read_text(encoding="utf-8"), ".".join(parts[:-1] if is_package else parts), is_package


def rooms() -> networkx.DiGraph:
    """A node for each room, for the tools and for the compiled code, and an edge to each room that it imports."""
    graph = networkx.DiGraph()
    for source, module, is_package in sources():
        _add(graph, room_of(module), imports(source, module, is_package))
    for file in sorted((ROOT / "tools").glob("*.py")):
        _add(graph, "tools", imports(file.read_text(encoding="utf-8"), file.stem, is_package=False))
    # It holds lazy names of the others and nothing else.
    graph.remove_node("__init__")
    return networkx.relabel_nodes(graph, {COMPILED: "csrc"})


def _add(graph: networkx.DiGraph, room: str, names: Iterator[tuple[int, str]]) -> None:
    graph.add_node(room)
    for _, name in names:
        if name.split(".")[0] == PACKAGE and room_of(name) != room:
            graph.add_edge(room, room_of(name))


def rows_of(graph: networkx.DiGraph) -> list[list]:
    """The nodes in rows, importers above what they import; in the last row those without arrows.

    An edge over several rows gets a node (from, to, row) in each row between, so that it passes between the others.
    """
    alone = sorted(networkx.isolates(graph))
    graph.remove_nodes_from(alone)
    rows = [sorted(row) for row in networkx.topological_generations(graph)]
    row_of = {room: index for index, row in enumerate(rows) for room in row}
    for start, end in sorted(graph.edges):
        path = [start, *((start, end, index) for index in range(row_of[start] + 1, row_of[end])), end]
        graph.remove_edge(start, end)
        networkx.add_path(graph, path)
        for node in path[1:-1]:
            rows[node[2]].append(node)
    # Each node goes to the mean place of its neighbours in the row before, then in the row behind, some times over.
    for _ in range(8):
        for neighbours, order in ((graph.predecessors, rows), (graph.successors, rows[::-1])):
            for before, row in pairwise(order):
                place = {node: (i + 0.5) / len(before) for i, node in enumerate(before)}
                near = {node: [place[n] for n in neighbours(node) if n in place] or [0.5] for node in row}
                row.sort(key=lambda node: (sum(near[node]) / len(near[node]), str(node)))
    return [*rows, alone] if alone else rows


def draw(graph: networkx.DiGraph) -> str:
    """The drawing of a graph without cycles, as SVG. An arrow that follows from others is left out."""
    graph = networkx.transitive_reduction(graph)
    rows = rows_of(graph)
    columns = max(map(len, rows))
    width = columns * (WIDTH + GAP_X) - GAP_X + 2 * MARGIN
    height = len(rows) * (HEIGHT + GAP_Y) - GAP_Y + 2 * MARGIN
    middle = {
        node: (width * (2 * i + 1) / (2 * len(row)), MARGIN + y * (HEIGHT + GAP_Y) + HEIGHT / 2)
        for y, row in enumerate(rows)
        for i, node in enumerate(row)
    }
    arrows, boxes = [], []
    for start, end in sorted(graph.edges, key=str):
        (x1, y1), (x2, y2) = middle[start], middle[end]
        y1 += HEIGHT / 2 * isinstance(start, str)
        head = isinstance(end, str)
        y2 -= (HEIGHT / 2 + 6) * head
        bend = (y2 - y1) / 2
        path = f"M{x1:.1f},{y1:.1f} C{x1:.1f},{y1 + bend:.1f} {x2:.1f},{y2 - bend:.1f} {x2:.1f},{y2:.1f}"
        arrows.append(f'<path d="{path}"' + (' marker-end="url(#head)"' if head else "") + "/>")
    for node, (x, y) in middle.items():
        if isinstance(node, str):
            left, top = x - WIDTH / 2, y - HEIGHT / 2
            boxes.append(f'<rect x="{left:.1f}" y="{top:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>')
            boxes.append(f'<text x="{x:.1f}" y="{y + 4.5:.1f}">{node}</text>')
    head = '<marker id="head" markerWidth="7" markerHeight="6" refX="1" refY="3" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            'font-family="sans-serif" font-size="13" text-anchor="middle">',
            f'<defs>{head}<path d="M0,0 L7,3 L0,6 z" fill="#c0392b"/></marker></defs>',
            '<rect width="100%" height="100%" fill="white"/>',
            '<g fill="none" stroke="#c0392b">',
            *arrows,
            "</g>",
            '<g fill="#e8eef7" stroke="#7f8fa9">',
            *(box for box in boxes if box.startswith("<rect")),
            "</g>",
            *(box for box in boxes if box.startswith("<text")),
            "</svg>",
        ]
    )


def main() -> None:
    Path(__file__).with_suffix(".svg").write_text(draw(rooms()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
