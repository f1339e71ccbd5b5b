"""MkDocs hook: files outside docs/ are links in the repository, and names in the site, which does not hold them."""

import re
from typing import Any

OUTSIDE = re.compile(r"\[(?P<name>[^\]]+)\]\((?:\.\./[^)]*|[^):]*\.ipynb)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(lambda link: f"`{link['name'].strip('`*')}`", markdown)
