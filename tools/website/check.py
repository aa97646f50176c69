"""Is every link of the built site whole, does nothing come from elsewhere, and is every public name there?"""

import html.parser
import pathlib
import urllib.parse
from collections.abc import Iterable
from functools import cache

_LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class _Reader(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in _LOADING and _LOADING[tag] in given:
            self.loaded.append(given[_LOADING[tag]])


@cache
def _read(page: pathlib.Path) -> _Reader:
    reader = _Reader()
    reader.feed(page.read_text())
    return reader


def problems(site: pathlib.Path, names: Iterable[str] = ()) -> list[str]:
    """What is wrong with a built site.

    Args:
        site: the folder with its pages.
        names: full names that must have a place of their own in a page of `api`.

    Returns:
        A sentence for each broken link, each file that a page would fetch from elsewhere, and each name that is missing.
    """
    pages, found = sorted(site.rglob("*.html")), []
    for page in pages:
        reader, shown = _read(page), page.relative_to(site)
        for link in reader.links + reader.loaded:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in reader.loaded and parts.scheme != "data":
                    found.append(f"{shown} fetches {link}")
                continue
            target = (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                found.append(f"{shown} links to {link}, which is not there")
            elif parts.fragment and target.suffix == ".html" and urllib.parse.unquote(parts.fragment) not in _read(target).ids:
                found.append(f"{shown} links to {link}: that page has no such place")
    described = {name for page in pages if page.parent.name == "api" for name in _read(page).ids}
    return found + [f"{name} is not in the API reference" for name in sorted(set(names) - described)]


def main(site: pathlib.Path, names: Iterable[str]) -> int:
    """Prints what is wrong; returns 1 if something is."""
    names = list(names)
    found = problems(site, names)
    print("\n".join(found) or f"{len(list(site.rglob('*.html')))} pages, {len(names)} public names, no broken link")
    return bool(found)
