"""What MkDocs does to a page before it is made: links to files of the repository that are no pages become their paths.

A site holds `docs/` alone. On a page in a checkout such a link leads to the file; in the site it would lead nowhere.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)+[^)#\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Raises:
    PluginError: a link out of `docs/` whose file does not exist.
    """
    docs = Path(config["docs_dir"]).resolve()
    here = docs / Path(page.file.src_uri).parent

    def plain(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        if target.is_relative_to(docs):
            return link[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {link[2]}: no such file")
        path = str(target.relative_to(docs.parent))
        return f"{link[1]} (`{path}`)" if path not in link[1] else f"`{path}`"

    return LINK.sub(plain, markdown)
