"""The pages of the documentation, and what they show."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Snippet:
    """A block of code. `language` is what stands behind its fence; an indented block is of commands."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


def snippets(page: Path) -> Iterator[Snippet]:
    """The blocks of code of a page, in order."""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            language = token.info.strip() if token.type == "fence" else "console"
            yield Snippet(page, token.map[0] + 1, language, token.content)
