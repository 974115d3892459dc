"""The documentation: its pages can be made, its examples run, and a broken link is found."""
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(ROOT.glob("docs/*.md"))


def script(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / f"scripts/docs/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api, links = script("api"), script("links")


# Pages by hand

def examples(page): return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if examples(p)], ids=lambda p: p.stem)
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", place)
    for code in examples(page): exec(compile(code, str(page), "exec"), vars(place))


def prose(path):
    "The Markdown of a page or of a notebook, without code."
    text = path.read_text()
    if path.suffix == ".ipynb": text = "\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("nbs/**/*.ipynb")), ROOT / "CONTRIBUTING.md"], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    "What `make docs` finds as well, without building the site. API pages are made."
    targets = [t for t in re.findall(r"\]\(([^)#\s]+)", prose(page)) if not re.match(r"[a-z]+:|api/", t)]
    assert not [t for t in targets if not (page.parent / t).exists()]


# Pages that are made

@pytest.mark.parametrize("package", api.packages())
def test_an_api_page_has_every_public_name(package):
    page = api.api_page(package)
    anchors = re.findall(r"^### `(\w+)` \{ #(\w+)\.(\w+) \}", page, re.M)
    assert sorted(anchors) == sorted((name, m.name, name) for m in api.modules(package) for name in m.public)


def test_the_page_of_names_has_every_name_of_all_with_a_line():
    import tirlab.all
    rows = re.findall(r"^\| \[`(\w+)`\]\(api/\w+\.md#[\w.]+\) \| (.*) \|$", api.names_page(), re.M)
    assert sorted(name for name, _ in rows) == sorted(tirlab.all.__all__)
    assert not [name for name, line in rows if not line]


def test_docments_become_a_table(tmp_path):
    source = tmp_path / "pack" / "mod.py"
    source.parent.mkdir()
    source.write_text('''
__all__ = ["f", "C", "N"]
N = 3   # how many
async def f(
    a: int,               # (B, T) one | two
    *rest,                # more
    key: str = "<x>",     # named
) -> list[str]:           # what comes out
    "Return `a_b` of <tool_call>. Raises: ValueError. Source: arXiv 1."
class C(dict):
    "Hold something."
    x: int = field(default=1, metadata={"help": "A number."})
    def get(self, i=0): "Return one."
    def _hidden(self): "Not here."
''')
    module = api.Module(source)
    assert module.public == ["N", "f", "C"] and [module.summary(n) for n in module.public] == ["how many", "Return `a_b` of &lt;tool\\_call>", "Hold something"]
    entry = module.entry("f")
    for part in ("async f(a, *rest, key='<x>')", "| `a` | `int` |  | (B, T) one &#124; two |", "| `*rest` |", "| `key` | `str` | `'<x>'` | named |",
                 "**Raises:** ValueError", "**Source:** arXiv 1.", "**Returns** `list[str]`: what comes out"): assert part in entry
    entry = module.entry("C")
    assert "Extends `dict`." in entry and "| `x` | `int` | `1` | A number. |" in entry and "- `get(i=0)`: Return one." in entry and "hidden" not in entry


def test_broken_links_are_found(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "index.html").write_text('<p id="top"><a href="sub/a.html#there">a</a> <a href="#top">up</a> <a href="https://example.org">net</a><link rel="canonical" href="https://example.org">')
    (tmp_path / "sub/a.html").write_text('<p id="there"><a href="../index.html">home</a>')
    assert list(links.faults(tmp_path)) == []
    (tmp_path / "sub/a.html").write_text('<a href="../gone.html">1</a><a href="../index.html#gone">2</a><script src="https://example.org/a.js"></script>')
    (tmp_path / "a.css").write_text("@import 'https://example.org/font.css';")
    assert [f.partition(": ")[2] for f in links.faults(tmp_path)] == ["there is no anchor sub/a.html#there", "loads https://example.org/a.js", "there is no ../gone.html",
                                                                   "there is no anchor ../index.html#gone", "loads https://example.org/font.css"]
    assert list(links.faults(tmp_path / "empty"))
