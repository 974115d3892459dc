"""Runs that differ in nothing but their seed: one band on the compare page, and a folder of runs opens as its runs."""
import sys

from streamlit.testing.v1 import AppTest
from test_app import APP, app
from trace_rows import make_run

from tirlab.app.common import run_name
from tirlab.app.launch import folders


def make_seeds(folder, seeds=(0, 1, 2), **config):
    "Runs of several seeds, as `seeds=0,1,2` writes them."
    for s in seeds: make_run(folder / f"seed-{s}/run-20250101-00000{s}", steps=3, seed=s, config=dict(advantage="gtpo", seed=s, output_dir=str(folder / f"seed-{s}")) | config)
    return folder


def test_a_folder_of_runs_is_its_runs(tmp_path):
    found = folders(make_seeds(tmp_path / "gtpo"))
    assert sorted(run_name(p) for p in found) == ["gtpo/seed-0", "gtpo/seed-1", "gtpo/seed-2"]
    assert folders([found[0], tmp_path]) == [found[0], *(p for p in found if p != found[0])]


def test_seeds_become_a_band(tmp_path, monkeypatch):
    runs = [*folders(make_seeds(tmp_path / "gtpo")), *folders(make_seeds(tmp_path / "grpo", (0, 1), advantage="grpo"))]
    monkeypatch.setattr(sys, "argv", ["main.py", *map(str, runs)])
    test = AppTest.from_file(str(APP / "main.py"), default_timeout=60).run()
    test.switch_page("compare.py").run()
    assert not test.exception
    figure = lambda: str(test.get("plotly_chart")[0].proto)
    assert "gtpo (3 seeds)" in figure() and "grpo (2 seeds)" in figure()
    test.toggle(key="bands").set_value(False).run()
    assert "3 seeds" not in figure() and "seed-1" in figure()


def test_one_seed_has_no_band(tmp_path, monkeypatch):
    make_run(tmp_path / "calm", config=dict(advantage="gtpo", seed=0))
    make_run(tmp_path / "wild", config=dict(advantage="grpo", seed=0))
    test = app(monkeypatch, tmp_path / "calm", "compare.py")
    test.multiselect(key="with").set_value(["wild"]).run()
    assert not test.exception and not [t for t in test.toggle if t.key == "bands"]
