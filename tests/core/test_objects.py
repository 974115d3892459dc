"""Functions and classes that are named by text: FILE.py:NAME and package.module:NAME."""

import os
import pickle
import subprocess
import sys

import pytest

from tirlab.core.objects import load_objects, qualified_name
from tirlab.core.settings import SettingError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "A folder with a few files, which is the current one."
    files = {"own_shop.py": "import own_prices\nclass Shop:\n    def price(self): return own_prices.TEA\n", "own_prices.py": "TEA = 3\n", "raises.py": "raise RuntimeError('no luck')\n",
             "leaves.py": "raise SystemExit(3)\n", "typo.py": "def f(:\n", "empty.py": "", "statistics.py": "mine = True\n", "with-hyphen.py": "x = 1\n"}
    for name, text in files.items(): (tmp_path / name).write_text(text)
    (tmp_path / "own_pack").mkdir()
    (tmp_path / "own_pack" / "inside.py").write_text("def f(): return 7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if str(getattr(m, "__file__", None) or "").startswith(str(tmp_path))]: del sys.modules[name]


def test_a_file_beside_its_neighbours(folder):
    shop, = load_objects("own_shop.py:Shop", "environment")
    assert shop().price() == 3 and load_objects(str(folder / "own_shop.py") + ":Shop", "environment") == [shop], "one class, however the file is named"
    assert load_objects("own_shop.py:Shop.price, own_prices.py:TEA", "tools") == [shop.price, 3]
    assert pickle.loads(pickle.dumps(shop)) is shop and qualified_name(shop) == "own_shop:Shop"
    assert load_objects("own_shop:Shop", "environment") == [shop]


def test_a_module_of_the_current_folder(folder): assert load_objects("own_pack.inside:f", "reward")[0]() == 7


def test_a_file_named_as_a_module_that_exists(folder):
    import statistics
    assert load_objects("statistics.py:mine", "x") == [True] and not hasattr(statistics, "mine") and load_objects("statistics:mean", "x") == [statistics.mean]
    assert load_objects("with-hyphen.py:x", "x") == [1]


@pytest.mark.parametrize("text, words", [
    ("nowhere.py:f", "no file"), ("own_shop.py:Shp", "nearest name in it is Shop"), ("own_shop.py:Shop.cost", "has no Shop.cost"), ("empty.py:f", "empty"),
    ("raises.py:f", "RuntimeError: no luck"), ("leaves.py:f", "SystemExit: 3"), ("typo.py:f", "SyntaxError"), ("no_such_module_here:f", "no module"),
    ("own_pack.nothing:f", "no module"), ("f", "FILE.py:NAME"), ("own_shop.py:", "FILE.py:NAME"), (":f", "FILE.py:NAME"), ("own_shop.py:Shop,,", "FILE.py:NAME"), ("", "FILE.py:NAME"),
])
def test_what_cannot_be_loaded(text, words, folder):
    with pytest.raises(SettingError) as caught: load_objects(text, "reward")
    assert (caught.value.field, caught.value.value) == ("reward", text) and words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_failed_can_be_mended(folder):
    with pytest.raises(SettingError): load_objects("typo.py:f", "reward")
    (folder / "typo.py").write_text("def f(): return 1\n")
    assert load_objects("typo.py:f", "reward")[0]() == 1


def test_a_console_script_finds_modules_of_the_current_folder(folder):
    "Its path begins with the folder of the script, not with the current one."
    code = "import sys; sys.path[:] = [p for p in sys.path if p not in ('', '.')]\nfrom tirlab.core.objects import load_objects\nprint(load_objects('own_shop:Shop', 'environment')[0]().price())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, cwd=folder)
    assert done.stdout.strip() == "3", done.stderr
