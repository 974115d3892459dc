"""The project holds together: its settings, notebooks, floors, documentation and wheel."""
import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in ROOT.glob("nbs/**/*.ipynb") if ".ipynb_checkpoints" not in p.parts)
MODULES = sorted(p for p in ROOT.glob("tirlab/*/*.py") if p.stem != "__init__")
APP = sorted(p for p in ROOT.glob("app/**/*.py"))
structure = runpy.run_path(str(ROOT / "scripts/structure"))


def tracked():
    "The files of the project: what git knows or would add; without git, everything but what is built."
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode == 0: return [ROOT / name for name in git.stdout.splitlines() if (ROOT / name).is_file()]
    return [p for p in ROOT.rglob("*") if p.is_file() and p.relative_to(ROOT).parts[0] not in (".venv", ".git", "build", "runs")]


# One truth in two files

def test_settings_ini_is_made_from_pyproject():
    made = subprocess.run([sys.executable, ROOT / "scripts/settings_ini", "--check"], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {name for names in project["optional-dependencies"].values() for name in names}
    pinned = [line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    assert not {*project["dependencies"], *wanted} - set(pinned)


# Packages, notebooks and modules

@pytest.mark.parametrize("module", MODULES, ids=structure["dotted"])
def test_every_module_has_its_notebook(module):
    notebook = re.search(r"File to edit: \.\./\.\./nbs/(\S+)\.$", module.read_text(), re.M)[1]
    assert re.fullmatch(rf"\d\d_{module.parent.name}/\d\d_{module.stem}\.ipynb", notebook) and (ROOT / "nbs" / notebook).exists()


def test_every_exporting_notebook_has_its_module():
    exporting = [n for n in NOTEBOOKS if "#| default_exp" in n.read_text()]
    assert len(exporting) == len(MODULES) and not [n for n in exporting if n.parent.parent != ROOT / "nbs"]


def test_the_house_keeps_its_rules():
    "Imports go down, in no circle, and take no private names; modules, export cells and notebooks are small."
    assert not list(structure["offences"]())


@pytest.mark.parametrize("source, expected", [
    ("from tirlab.core.tiny import tiny_policy", [("core", "tiny", ["tiny_policy"])]),
    ("from ..core.tiny import tiny_policy as t", [("core", "tiny", ["tiny_policy"])]),
    ("from .locks import _LIBC", [("here", "locks", ["_LIBC"])]),
    ("from tirlab.core import tiny", [("core", "tiny", [])]),
    ("def f():\n    import tirlab.core.tiny", [("core", "tiny", [])]),
    ("from tirlab import core", [("core", None, [])]),
    ("import torch, os.path\nfrom pathlib import Path", []),
])
def test_every_way_to_import_is_seen(tmp_path, source, expected):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/module.py").write_text(source)
    assert list(structure["imports_of"](tmp_path / "here/module.py")) == expected


def test_a_circle_is_found():
    assert structure["circles"]([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]) == ["b", "c"] and structure["circles"]([("a", "b"), ("b", "c")]) == []


@pytest.mark.parametrize("package", ["core", "sandbox", "envs"])
def test_data_and_sandbox_need_no_torch(package):
    modules = [m for m in (ROOT / "tirlab" / package).glob("*.py") if m.stem != "tiny"]   # the tiny policy is a model
    for module in modules: assert not re.search(r"^\s*(import|from) torch\b", module.read_text(), re.M), module


def test_what_the_sandboxs_child_imports_is_tiny():
    assert (ROOT / "tirlab/sandbox/__init__.py").read_text() == ""


# Documentation

NO_VERBS = {"A", "All", "An", "How", "Inside,", "Mean", "None", "Number", "One", "Share", "The", "What", "Where", "Whether", "Which"}


def undocumented(source):
    "Public functions of `__all__` without a docstring that begins with a verb, and their parameters without a comment on the same line."
    tree, lines = ast.parse(source), source.splitlines()
    public = next((ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"), [])
    for f in tree.body:
        if not isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) or f.name not in public: continue
        first = (ast.get_docstring(f) or "").partition(" ")[0]
        if not first: yield f"{f.name} has no docstring"
        elif first in NO_VERBS: yield f"{f.name}: the docstring begins with {first}, not with a verb"
        a = f.args
        for arg in [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]:
            if "#" not in lines[arg.end_lineno - 1][arg.end_col_offset:]: yield f"{f.name}: parameter {arg.arg} has no comment"


@pytest.mark.parametrize("module", MODULES, ids=structure["dotted"])
def test_public_functions_are_documented(module):
    missing = list(undocumented(module.read_text()))
    assert not missing, "\n".join(missing)


def test_missing_documentation_is_found():
    source = '__all__ = ["f", "h"]\ndef f(\n    a,  # a number\n    b=1,\n): return a\ndef g(x): pass\ndef h(): "The number."\n'
    assert list(undocumented(source)) == ["f has no docstring", "f: parameter b has no comment", "h: the docstring begins with The, not with a verb"]


def test_readme_is_made_from_the_index(tmp_path):
    def code(source, *outputs): return {"cell_type": "code", "source": source, "metadata": {}, "execution_count": None, "outputs": list(outputs)}
    def data(kind, value): return {"output_type": "display_data", "metadata": {}, "data": {kind: value}}
    prose = "# Title\n![run](images/run.png) [room](02_sandbox.ipynb) [up](../CONTRIBUTING.md) [net](https://example.org/a.b) [here](#title)"
    cells = [{"cell_type": "markdown", "source": prose, "metadata": {}}, code("#| hide\nsecret = 1"),
             code("#| eval: false\n1 + 1\n", data("text/plain", "2")), code("#| echo: false\nplot()", data("image/png", "AAAA"))]
    (tmp_path / "scripts").mkdir(), (tmp_path / "nbs").mkdir()
    shutil.copy(ROOT / "scripts/readme", tmp_path / "scripts/readme")
    (tmp_path / "nbs/index.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    def readme(*args): return subprocess.run([sys.executable, tmp_path / "scripts/readme", *args], capture_output=True, check=False).returncode
    assert readme("--check") == 1 and readme() == 0 and readme("--check") == 0
    assert (tmp_path / "README.md").read_text().partition("-->\n\n")[2] == """# Title
![run](nbs/images/run.png) [room](nbs/02_sandbox.ipynb) [up](CONTRIBUTING.md) [net](https://example.org/a.b) [here](#title)

```python
1 + 1
```

```
2
```

![](nbs/images/index-1.png)
"""
    (tmp_path / "nbs/images/index-1.png").write_bytes(b"other")
    assert readme("--check") == 1


# What a stranger gets

def test_the_tree_is_nobodys_machine():
    "No path and no package index of the machine on which something was written."
    pip = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    urls = re.findall(r"https?://[^\s'\"]+", pip + " ".join(v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_"))))
    hosts = {urlparse(u).hostname for u in urls} - {"pypi.org", "files.pythonhosted.org", None}
    places = {str(ROOT), sys.prefix if sys.prefix != sys.base_prefix else None, os.path.dirname(os.path.dirname(os.path.realpath(sys.executable)))}
    exact = [re.escape(s) for s in sorted(hosts | {p for p in places if p and p not in ("/", "/usr", "/usr/local")})]
    pattern = re.compile("|".join([*exact, r"/(?:root|home|Users)/[\w.]", r"[A-Z]:\\+Users", r"--(?:extra-)?index-url", r"--find-links"]))
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".safetensors", ".png", ".parquet"): continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in pattern.finditer(path.read_text("utf-8", "replace"))]
    assert not found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Build wheel and sdist from the files of the project; return their paths."
    folder = tmp_path_factory.mktemp("dist")
    for path in tracked():
        (folder / "copy" / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "copy" / path.relative_to(ROOT))
    code = "import sys; from setuptools import build_meta; out = sys.argv[1]; build_meta.build_sdist(out); build_meta.build_wheel(out)"
    done = subprocess.run([sys.executable, "-c", code, folder], cwd=folder / "copy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_and_sdist_hold_modules_app_and_policy(built):
    code = [*ROOT.glob("tirlab/**/*.py"), *(p for p in ROOT.glob("tirlab/tiny_policy/*") if p.is_file())]
    app = [*APP, *ROOT.glob("app/*.js"), *ROOT.glob("app/*.css")]
    wheel, sdist = (set(zipfile.ZipFile(built[0]).namelist()), {n.partition("/")[2] for n in tarfile.open(built[1]).getnames()})
    in_wheel = {*(str(p.relative_to(ROOT)) for p in code), *(f"tirlab/{p.relative_to(ROOT)}" for p in app)}
    in_sdist = {*(str(p.relative_to(ROOT)) for p in code + app), "README.md", "LICENSE", "pyproject.toml"}
    assert in_wheel <= wheel, f"not in the wheel: {sorted(in_wheel - wheel)}"
    assert in_sdist <= sdist, f"not in the sdist: {sorted(in_sdist - sdist)}"
    assert any(name.endswith("/LICENSE") for name in wheel)


@pytest.mark.slow
def test_the_wheel_trains_in_an_environment_of_its_own(built, tmp_path):
    "Install the wheel without the checkout; the packages it depends on are those of this environment."
    venv, env = tmp_path / "venv", {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    subprocess.run([sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "-q", "--no-deps", "--no-index", built[0]], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    def run(*words): return subprocess.run([venv / "bin" / words[0], *words[1:]], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert run("python", "-c", "import tirlab.app; print(tirlab.__file__, tirlab.app.__file__)").stdout.count(str(site)) == 2
    done = run("tirlab", "demo", "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert (Path(tmp_path, json.loads(done.stdout.splitlines()[-1])["run_dir"]) / "index.jsonl").exists()
