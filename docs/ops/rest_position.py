"""Draws where the taps of a 3x3 kernel rest in scopes of three sizes. Writes the SVG beside itself."""

from pathlib import Path

KERNEL, SCOPES, CELL, MARGIN = 3, (3, 4, 5), 36, 24


def scope(size: int, left: float, top: float) -> list[str]:
    style = f'width="{CELL}" height="{CELL}" fill="#e8eef7" stroke="#7f8fa9"'
    cells = [
        f'<rect x="{left + CELL * x:g}" y="{top + CELL * y:g}" {style}/>' for y in range(size) for x in range(size)
    ]
    # Cell (y, x) is a value at the middle of its square.
    rest = [CELL * ((size - KERNEL) / 2 + i + 0.5) for i in range(KERNEL)]
    taps = [f'<circle cx="{left + x:g}" cy="{top + y:g}" r="5" fill="#c0392b"/>' for y in rest for x in rest]
    middle = left + CELL * size / 2
    label = f'<text x="{middle:g}" y="{top + CELL * size + 20:g}" text-anchor="middle">scope {size}x{size}</text>'
    return [*cells, *taps, label]


def main() -> None:
    width = MARGIN + sum(CELL * size + MARGIN for size in SCOPES)
    height = MARGIN + CELL * max(SCOPES) + 20 + MARGIN / 2
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        'font-family="sans-serif" font-size="14">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    left = MARGIN
    for size in SCOPES:
        lines += scope(size, left, MARGIN + CELL * (max(SCOPES) - size) / 2)
        left += CELL * size + MARGIN
    Path(__file__).with_suffix(".svg").write_text("\n".join([*lines, "</svg>"]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
