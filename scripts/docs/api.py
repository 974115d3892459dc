"""API pages and the page of names as Markdown, read from the source of the modules: nothing is imported."""
import ast
import json
import re
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prose(text):
    "Escape what Markdown or HTML would read as markup, except in code between backticks."
    parts = re.split(r"(`[^`]*`)", " ".join((text or "").split()))
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"[\\*_\[\]#]", r"\\\g<0>", parts[i])
        parts[i] = parts[i].replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("$", "&#36;")
    return "".join(parts)


def first_sentence(doc):
    "Return a docstring up to the first full stop that ends a sentence, without that stop."
    return re.split(r"(?<!e\.g)(?<!i\.e)\.(?=\s|$)|\n\n", (doc or "").strip())[0]


def paragraphs(doc):
    "Return a docstring as Markdown, `Raises:` and `Source:` in paragraphs of their own."
    parts = re.split(r"\s*\b(Raises|Source|Returns):\s", doc or "")
    return "\n\n".join([prose(parts[0]), *(f"**{k}:** {prose(v)}" for k, v in zip(parts[1::2], parts[2::2]))])


def comments(path):
    "Return the comment on each line of a file as a dict: line number -> text."
    with tokenize.open(path) as file:
        return {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(file.readline) if t.type == tokenize.COMMENT}


def code(node):
    "Return an annotation or a default as a code span; nothing for nothing."
    return f"`{ast.unparse(node)}`" if node is not None else ""


def table(first, rows):
    "Return a Markdown table of (name, type, default, meaning), without the columns in which every row is empty."
    keep = [i for i in range(4) if any(row[i] for row in rows)]
    lines = [(first, "type", "default", "meaning"), ("---",) * 4, *rows]
    return "\n".join("| " + " | ".join(line[i] for i in keep) + " |" for line in lines) if rows else ""


def parameters(function, notes, method=False):
    "Return the rows of a function's parameters: name, type, default and the comment behind each."
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = dict(zip([x.arg for x in plain[len(plain) - len(a.defaults):]], a.defaults, strict=True))
    defaults |= {x.arg: d for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True) if d}
    named = [("", x) for x in plain[method:]] + [("*", a.vararg)] + [("", x) for x in a.kwonlyargs] + [("**", a.kwarg)]
    return [(f"`{star}{x.arg}`", code(x.annotation), code(defaults.get(x.arg)), prose(notes.get(x.end_lineno, "")))
            for star, x in named if x]


def signature(function, method=False):
    "Return a call as one writes it: names and defaults, without types."
    def bare(x): return ast.arg(x.arg) if x else None
    a = function.args
    plain = [bare(x) for x in [*a.posonlyargs, *a.args][method:]]
    args = ast.arguments([], plain, bare(a.vararg), [bare(x) for x in a.kwonlyargs], a.kw_defaults, bare(a.kwarg), a.defaults)
    return f"{'async ' * isinstance(function, ast.AsyncFunctionDef)}{function.name}({ast.unparse(args)})"


def fields(cls, notes):
    "Return the rows of a dataclass's fields; the meaning is a field's `help` or the comment behind it."
    rows = []
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id.startswith("_"): continue
        meaning, default = notes.get(node.end_lineno, ""), node.value
        if isinstance(default, ast.Call) and ast.unparse(default.func).endswith("field"):
            given = {k.arg: k.value for k in default.keywords}
            if isinstance(given.get("metadata"), ast.Dict): meaning = ast.literal_eval(given["metadata"]).get("help", meaning)
            default = given.get("default", given.get("default_factory"))
        rows.append((f"`{node.target.id}`", code(node.annotation), code(default), prose(meaning)))
    return rows


def is_function(node): return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)


def patched(tree):
    "Return methods that are added to a class with `@patch`, by the class's name."
    methods = {}
    for node in filter(is_function, tree.body):
        if any(ast.unparse(d).startswith("patch") for d in node.decorator_list) and node.args.args:
            methods.setdefault(ast.unparse(node.args.args[0].annotation).strip("'"), []).append(node)
    return methods


def method_signature(method):
    "Return how a method is called, or its name alone where it is a property."
    decorators = {ast.unparse(d) for d in method.decorator_list}
    if {"property", "cached_property", "functools.cached_property"} & decorators or "patch(as_prop=True)" in decorators: return method.name
    return signature(method, method="staticmethod" not in decorators)


def class_entry(cls, notes, methods):
    "Return Markdown on a class: its docstring, fields or constructor, and one line on each public method."
    inside = [*filter(is_function, cls.body)]
    init = next((m for m in inside if m.name == "__init__"), None)
    parts = [paragraphs(ast.get_docstring(cls))]
    bases = [b for b in map(ast.unparse, cls.bases) if b not in ("object", "BaseException")]
    if bases: parts.append("Extends " + ", ".join(f"`{b}`" for b in bases) + ".")
    if init and ast.get_docstring(init): parts.append(paragraphs(ast.get_docstring(init)))
    parts.append(table("parameter", parameters(init, notes, method=True)) if init else table("field", fields(cls, notes)))
    public = [m for m in [*inside, *methods] if not m.name.startswith("_") and ast.get_docstring(m)]
    lines = [f"- `{method_signature(m)}`: {prose(ast.get_docstring(m))}" for m in public]
    return "\n\n".join(filter(None, [*parts, "\n".join(lines)]))


def function_entry(function, notes):
    "Return Markdown on a function: how it is called, its docstring, its parameters and what it returns."
    rows = parameters(function, notes)
    meaning = prose(notes.get(function.returns.end_lineno, "")) if function.returns else ""
    returned = f"**Returns** {code(function.returns)}{': ' * bool(meaning)}{meaning}" if function.returns else ""
    parts = [f"```python\n{signature(function)}\n```", paragraphs(ast.get_docstring(function)), table("parameter", rows), returned]
    return "\n\n".join(filter(None, parts))


def constant_entry(node, notes):
    "Return Markdown on a constant: its value, if that is short, and the comment behind it."
    value = ast.unparse(node)
    return "\n\n".join(filter(None, [f"```python\n{value}\n```" if len(value) < 300 else "", prose(notes.get(node.end_lineno, ""))]))


class Module:
    "A module's source: its public names in the order of definition, each with its syntax tree."
    def __init__(self, path):
        self.path, self.tree, self.notes = path, ast.parse(path.read_text()), comments(path)
        self.name, self.package = path.stem, path.parent.name
        found = re.search(r"File to edit: (?:\.\./)+(nbs/\S+\.ipynb)", path.read_text())
        self.notebook = ROOT / found[1] if found else None
        self.nodes = {}
        for node in self.tree.body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [node.name] if hasattr(node, "name") else [t.id for t in targets if isinstance(t, ast.Name)]
            self.nodes |= dict.fromkeys(names, node)
        listed = self.nodes.get("__all__")
        self.public = [n for n in self.nodes if listed and n in ast.literal_eval(listed.value)]

    def entry(self, name, methods=()):
        node = self.nodes[name]
        if isinstance(node, ast.ClassDef): return class_entry(node, self.notes, methods)
        return (function_entry if is_function(node) else constant_entry)(node, self.notes)

    def summary(self, name):
        "Return the one line that a list of names gives: the first sentence of the docstring, or a constant's comment."
        node = self.nodes[name]
        documented = is_function(node) or isinstance(node, ast.ClassDef)
        return prose(first_sentence(ast.get_docstring(node)) if documented else self.notes.get(node.end_lineno, ""))


@cache
def modules(package):
    "Return the modules of a package, by name."
    return [Module(p) for p in sorted((ROOT / "tirlab" / package).glob("*.py")) if not p.stem.startswith("_")]


def packages():
    "Names of the packages, in the order of their notebooks' folders."
    return [p.name.partition("_")[2] for p in sorted((ROOT / "nbs").glob("[0-9][0-9]_*")) if p.is_dir()]


def lesson_of(module):
    "Return title, summary line and path from the documentation's root of the notebook that a module was made from."
    cells = json.loads(module.notebook.read_text())["cells"]
    text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    title, about = re.search(r"^# (.+)", text, re.M), re.search(r"^> (.+)", text, re.M)
    return title and title[1] or module.name, about[1] if about else "", module.notebook.relative_to(ROOT / "nbs").as_posix()


def api_page(package):
    "Return the Markdown of a package's API page."
    found = [m for m in modules(package) if m.public]
    if all(m.notebook for m in found): found.sort(key=lambda m: m.notebook.name)
    methods = {}
    for module in found:
        for cls, functions in patched(module.tree).items(): methods.setdefault(cls, []).extend(functions)
    parts = [f"# {package}"]
    for m in found:
        parts.append(f"## {package}.{m.name} {{ #{m.name} }}")
        if m.notebook:
            title, about, path = lesson_of(m)
            parts.append(f"{about.rstrip('.')}{'' if about.endswith('?') else '.'} " * bool(about) + f"Lesson: [{title}](../{path}).")
        for name in m.public:
            parts += [f"### `{name}` {{ #{m.name}.{name} }}", m.entry(name, methods.get(name, ()))]
    return "\n\n".join(parts) + "\n"


def names_in_all():
    "Return what `tirlab.all` imports as (package, module, name), in its order."
    tree = ast.parse((ROOT / "tirlab/all.py").read_text())
    return [(*node.module.split(".")[1:], a.asname or a.name) for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names]


def names_page():
    "Return the Markdown of the page that lists the names of `tirlab.all`, each with one line."
    names = names_in_all()
    sources = {(m.package, m.name): m for p in packages() for m in modules(p)}
    text = (f"# Names in tirlab.all\n\n`from tirlab.all import *` gives these {len(names)} names. What is not here is imported from its "
            "package, e.g. `from tirlab.rewards.outcome import turn_rewards`; the API pages list everything.\n")
    order = [p for p in packages() if any(n[0] == p for n in names)]
    for package in order:
        text += f"\n## {package}\n\n| name | what it is |\n| --- | --- |\n"
        for p, module, name in names:
            if p != package: continue
            text += f"| [`{name}`](api/{p}.md#{module}.{name}) | {sources[p, module].summary(name)} |\n"
    return text
