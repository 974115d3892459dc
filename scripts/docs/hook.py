"""MkDocs hook: adds the notebooks as they are and the generated pages, makes the navigation, and turns notebooks into plain pages."""
import html
import os
import re
import sys
from pathlib import Path

from bs4 import BeautifulSoup
from latex2mathml.converter import convert
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.toc import get_toc

sys.path.insert(0, str(Path(__file__).parent))
import api

ROOT = api.ROOT
REPOSITORY = "https://github.com/tirlab/tirlab/blob/main/"
GUIDES = ["from_trl.md", "from_verl.md", "environments.md", "reading_a_collapse.md", "results.md", "limits.md"]
PROJECT = {"contributing.md": "CONTRIBUTING.md", "benchmarks.md": "benchmarks/README.md"}
log = get_plugin_logger(__name__)


def notebooks(folder):
    "Paths of a folder's notebooks from the documentation's root, which is `nbs/`."
    return [p.relative_to(ROOT / "nbs").as_posix() for p in sorted((ROOT / "nbs" / folder).glob("*.ipynb"))]


def folders(): return [p.name for p in sorted((ROOT / "nbs").glob("[0-9][0-9]_*")) if p.is_dir()]


def on_config(config):
    "Make the navigation from the folders of notebooks."
    lessons = [{f.partition("_")[2]: notebooks(f)} for f in folders()]
    studies = [{"Experiments": notebooks("experiments")}, {"On a GPU": notebooks("gpu")}]
    reference = ["names.md", *({p: f"api/{p}.md"} for p in api.packages())]
    config.nav = [{"Home": "index.ipynb"}, {"Guides": [*GUIDES]}, {"Lessons": lessons}, {"Experiments": studies},
                  {"API": reference}, {"Project": [*PROJECT]}]
    return config


@event_priority(100)   # before mkdocs-jupyter, which claims the notebooks
def on_files(files, config):
    "Add notebooks, generated pages and the project's own Markdown to the files of `docs/`."
    lessons = ["index.ipynb", *(path for folder in [*folders(), "experiments", "gpu"] for path in notebooks(folder))]
    made = [File(path, str(ROOT / "nbs"), config.site_dir, config.use_directory_urls) for path in lessons]
    made += [File.generated(config, uri, abs_src_path=str(ROOT / path)) for uri, path in PROJECT.items()]
    made += [File.generated(config, f"api/{p}.md", content=api.api_page(p)) for p in api.packages()]
    made.append(File.generated(config, "names.md", content=api.names_page()))
    return Files([*files, *made])


def moved(target, page, files):
    "A link as it stands in a file of the repository, as a path from the page; the repository's address for what is not in the site."
    path, anchor = (target.split("#", 1) + [""])[:2]
    if not path or re.match(r"[a-z]+:|//", path): return None
    source = Path(page.file.abs_src_path)
    wanted = os.path.normpath(source.parent / path)
    for file in files:
        if file.abs_src_path == wanted:
            return os.path.relpath(file.src_uri, os.path.dirname(page.file.src_uri)) + f"#{anchor}" * bool(anchor)
    if Path(wanted).exists() and Path(wanted).is_relative_to(ROOT): return REPOSITORY + Path(wanted).relative_to(ROOT).as_posix()
    log.warning(f"{source.relative_to(ROOT)}: there is no {target}")
    return None


def on_page_markdown(markdown, page, config, files):
    "Follow links of hand-written pages into the repository."
    if not page.file.abs_src_path or page.file.src_uri.endswith(".ipynb"): return markdown
    return re.sub(r"(?<=\]\()[^)\s]+", lambda m: moved(m[0], page, files) or m[0], markdown)


def tidy(cell):
    "Turn one cell of code of a notebook page into what a Markdown page has; drop hidden cells and nbdev's directives."
    lines = cell.select_one(".clipboard-copy-txt")
    lines = lines.text.strip().splitlines() if lines else []
    directives = [line[2:].split() for line in lines if line.startswith("#|")]
    if ["hide"] in directives or ["echo:", "false"] in directives or len(lines) == len(directives):
        for part in cell.select(".jp-Cell-inputWrapper"): part.decompose()
        if ["hide"] in directives: return cell.decompose()
    for part in cell.select(".zeroclipboard-container, .clipboard-copy-txt"): part.decompose()
    for pre in cell.select(".highlight-ipynb > pre"):
        for comment in pre.select(".c1"):
            if comment.text.startswith("#|"):
                if comment.next_sibling: comment.next_sibling.replace_with(str(comment.next_sibling).replace("\n", "", 1))
                comment.decompose()
        pre.parent["class"] = ["highlight"]
        pre.name = "code"
        pre.wrap(BeautifulSoup().new_tag("pre"))


def on_page_content(content, page, config, files):
    "Take mkdocs-jupyter's styles and scripts away, follow the notebook's links, and write formulas as MathML."
    if not page.file.src_uri.endswith(".ipynb"): return content
    content = content[content.index('<div class="jupyter-wrapper">'):]   # what stands before are 600 kB of styles
    soup = BeautifulSoup(re.sub(r"<script.*?</script>", "", content, flags=re.S), "html.parser")
    for cell in soup.select(".jp-CodeCell > .jp-CodeCell"): tidy(cell)
    for tag, key in ("a", "href"), ("img", "src"):
        for link in soup.find_all(tag, attrs={key: True}):
            if link.get("class") == ["anchor-link"]:
                link["class"], link.string = ["headerlink"], "¶"
            elif not link[key].startswith("data:") and (there := moved(link[key], page, files)):
                link[key] = re.sub(r"\.(ipynb|md)(?=#|$)", ".html", there) if not there.startswith("https:") else there
    page.toc = get_toc(contents(soup))
    return mathematics(str(soup))


def contents(soup):
    "The table of contents that MkDocs wants, from a page's headings."
    top = {"level": 0, "children": []}
    path = [top]
    for heading in soup.select("h1[id], h2[id], h3[id]"):
        level, name = int(heading.name[1]), heading.text.removesuffix("¶")
        while path[-1]["level"] >= level: path.pop()
        path[-1]["children"].append({"level": level, "id": heading["id"], "name": name, "html": html.escape(name), "children": []})
        path.append(path[-1]["children"][-1])
    return top["children"]


def mathematics(content):
    "Replace formulas between dollars by MathML, which browsers show without a script; code is left alone."
    parts = re.split(r"(<(pre|code|svg|style)\b.*?</\2>|<[^>]*>)", content, flags=re.S)
    texts = parts[::3]
    def formula(m): return convert(html.unescape(m[1] or m[2]), display="block" if m[1] else "inline")
    texts = [re.sub(r"\$\$(.+?)\$\$|(?<![\w$\\])\$([^$\n]+?)\$(?!\w)", formula, text, flags=re.S) for text in texts]
    return "".join(text + tag for text, tag in zip(texts, [*parts[1::3], ""]))
