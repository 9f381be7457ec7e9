"""Markdown that is made from stored results: tables, and documents with places to fill.

A place stands between `<!-- NAME -->` and `<!-- end -->`.
"""

import re


def pipe(*rows: list[str]) -> str:
    """Rows as a Markdown table, the first one its head; all columns but the first on the right."""
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def folded(title: str, *parts: str) -> str:
    """Parts that a reader opens, below a title: by GitHub and by the site alike."""
    return "\n\n".join([f"<details markdown>\n<summary>{title}</summary>", *parts, "</details>"])


def has_place(text: str, name: str) -> bool:
    return _place(name).search(text) is not None


def fill(text: str, name: str, content: str, *, block: bool = True) -> str:
    """The text with `content` in every place of this name; block: in paragraphs of its own."""
    inside = f"\n\n{content}\n\n" if block else content
    return _place(name).sub(lambda _: f"<!-- {name} -->{inside}<!-- end -->", text)


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- {name} -->.*?<!-- end -->", re.S)
