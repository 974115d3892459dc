#!/usr/bin/env python3
"""Check a built site: every local link and anchor exists, and nothing is loaded from elsewhere. Usage: scripts/docs/links.py SITE"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

LOADED = {("script", "src"), ("link", "href"), ("img", "src"), ("iframe", "src"), ("source", "src")}
NOT_LOADED = {"canonical", "next", "prev", "edit"}   # `rel` of a <link> that no browser fetches


class Page(HTMLParser):
    "The anchors of a page, the targets that it links to, and what a browser loads with it."
    def __init__(self, path):
        super().__init__()
        self.anchors, self.links, self.loaded = set(), [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs.get("id"), attrs.get("name") if tag == "a" else None}
        for key in ("href", "src"):
            if attrs.get(key): self.links.append(attrs[key])
            if attrs.get(key) and (tag, key) in LOADED and attrs.get("rel") not in NOT_LOADED: self.loaded.append(attrs[key])


def faults(site):
    "Yield one line for each local target that does not exist and for each file that would be fetched from a network."
    pages = {p.relative_to(site).as_posix(): Page(p) for p in sorted(site.rglob("*.html"))}
    if not pages: yield f"{site} holds no page"
    for name, page in pages.items():
        for url in page.loaded:
            if re.match(r"https?:|//", url): yield f"{name}: loads {url}"
        for url in page.links:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or name == "404.html": continue
            path = unquote(urlsplit(urljoin(name, parts.path or name.rpartition("/")[2])).path)
            if path in ("", ".") or path.endswith("/"): path += "index.html"
            if not (site / path).exists(): yield f"{name}: there is no {url}"
            elif parts.fragment and path in pages and unquote(parts.fragment) not in pages[path].anchors: yield f"{name}: there is no anchor {url}"
    for style in site.rglob("*.css"):
        for url in re.findall(r"url\(['\"]?(https?:[^)'\"]+)|@import\s+['\"](https?:[^'\"]+)", style.read_text("utf-8")):
            yield f"{style.relative_to(site)}: loads {''.join(url)}"


if __name__ == "__main__":
    found = sorted(set(faults(Path(sys.argv[1]))))
    print("\n".join(found) or f"{sum(1 for _ in Path(sys.argv[1]).rglob('*.html'))} pages, all links hold")
    sys.exit(bool(found))
