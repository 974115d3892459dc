"""The app over run folders in every state they can be in."""
import json
import re
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from trace_rows import add_steps, make_row, make_run

import tirlab.app
from tirlab.app.launch import command, launch
from tirlab.traces.run import RunError, RunWriter, trace_id

APP = Path(tirlab.app.__file__).parent
PAGES = ("overview.py", "steps.py", "trajectories.py", "trajectory.py", "control.py", "compare.py", "dropped.py")


@cache
def registered():
    "The pages that the app registers as it runs, here without a run folder."
    return AppTest.from_file(str(APP / "main.py"), default_timeout=60).run()._registered_pages


def app(monkeypatch, run, page="overview.py", **query):
    "A page of the app, run once."
    monkeypatch.setattr(sys, "argv", ["main.py"])
    pages = registered()
    monkeypatch.setattr(sys, "argv", ["main.py", *([str(run)] if run else [])])
    test = AppTest.from_file(str(APP / "main.py"), default_timeout=60)
    test._registered_pages = pages   # else the overview would have to be drawn before each page
    test.query_params.update(query)
    test.switch_page(page).run()
    assert not test.exception
    return test


def words(test):
    "All Markdown of a page."
    return "\n".join(str(e.value) for kind in ("info", "error", "caption", "markdown", "subheader") for e in getattr(test, kind))


@pytest.mark.parametrize("page, run, says", [*((p, "newer", "upgrade tirlab") for p in PAGES), ("overview.py", "nowhere", "no run folder at"),
                                             ("trajectory.py", "foreign", "is not a run folder"), ("steps.py", None, "No run folder was given")])
def test_no_run_is_one_plain_sentence(tmp_path, monkeypatch, page, run, says):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/thesis.tex").write_text("mine")
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer/meta.json").write_text('{"format": "tirlab-run", "schema_version": 9}')
    test = app(monkeypatch, run and tmp_path / run, page)
    assert says in test.info[0].value.replace("\\", "") and len(test.info) == 1 and not test.error


@pytest.mark.parametrize("page", PAGES)
def test_empty_run(tmp_path, monkeypatch, page):
    RunWriter(tmp_path / "run", {"model": "tiny"})
    test = app(monkeypatch, tmp_path / "run", page)
    assert {"overview.py": "Nothing was logged yet", "compare.py": "None of these runs has logged"}.get(page, "No trajectory was written") in test.info[0].value


def test_overview(tmp_path, monkeypatch):
    make_run(tmp_path / "run", steps=4)
    test = app(monkeypatch, tmp_path / "run")
    assert [m.label for m in test.metric] == ["Reward", "Success", "Calls a trajectory", "Failed calls", "Entropy", "Tokens"]
    assert "finished" in words(test) and "32 trajectories" in words(test)
    assert len(test.get("plotly_chart")) == 1


@pytest.mark.parametrize("status, error, says", [("interrupted", None, "before it was finished"), ("failed", "out of *memory*", r"out of \*memory\*")])
def test_runs_that_ended_early(tmp_path, monkeypatch, status, error, says):
    make_run(tmp_path / "run", steps=2, status=status, error=error)
    test = app(monkeypatch, tmp_path / "run")
    assert {"failed": "crashed"}.get(status, status) in words(test) and says in words(test) and len(test.metric) == 6


def test_a_silent_run_says_so(tmp_path, monkeypatch):
    writer = make_run(tmp_path / "run", steps=1, status="running")
    monkeypatch.setattr("time.time", lambda: writer.meta["heartbeat"] + 3600)
    assert "no heartbeat" in words(app(monkeypatch, tmp_path / "run"))


def test_it_follows_a_run_that_goes_on(tmp_path, monkeypatch):
    writer = make_run(tmp_path / "run", steps=1, status="running")
    overview, table = app(monkeypatch, tmp_path / "run"), app(monkeypatch, tmp_path / "run", "trajectories.py")
    assert "8 trajectories" in words(overview) and "step 1 " in words(overview)
    add_steps(writer, [2, 3])
    with open(tmp_path / "run/metrics.jsonl", "a") as f:
        f.write('{"step": 4, "rew')                              # and a step is being written
    overview.run()
    assert "24 trajectories" in words(overview) and "step 3 " in words(overview) and "running" in words(overview)
    writer.close()
    overview.run()
    assert "finished" in words(overview)
    table.run()
    assert len(table.dataframe[0].value) == 24


def test_a_run_of_metrics_only(tmp_path, monkeypatch):
    RunWriter(tmp_path / "run", {}).log(1, {"loss": float("nan"), "reward": 1.0})
    assert [m.label for m in app(monkeypatch, tmp_path / "run").metric] == ["Reward"]


def test_table_filters(tmp_path, monkeypatch):
    writer = make_run(tmp_path / "run", steps=3, status="running")
    rows = [make_row(3, i, split="eval", environment="lookup") for i in range(2)]
    writer.append_index(writer.write_tokens(3, rows, "eval"))
    test = app(monkeypatch, tmp_path / "run", "trajectories.py")
    table = test.dataframe[0].value
    assert len(table) == 26 and table.step.iloc[0] == 3
    test.slider(key="steps").set_value((2, 2)).run()
    assert set(test.dataframe[0].value.step) == {2}
    test.slider(key="steps").set_value((1, 3))
    test.multiselect(key="environment").set_value(["lookup"]).run()
    assert set(test.dataframe[0].value.split) == {"eval"}
    test.multiselect(key="environment").set_value([])
    test.slider(key="reward").set_value((1.0, 1.0))
    test.toggle(key="failed").set_value(True).run()
    shown = test.dataframe[0].value
    assert (shown.reward == 1).all() and (shown.failed_calls > 0).all() and len(shown)
    test.multiselect(key="environment").set_value(["lookup"])
    test.slider(key="steps").set_value((1, 1)).run()
    assert "No trajectory matches" in test.info[0].value


def test_a_broken_link_and_lost_tokens(tmp_path, monkeypatch):
    make_run(tmp_path / "run", steps=1)
    assert "choose one" in app(monkeypatch, tmp_path / "run", "trajectory.py", id="nothing").info[0].value
    shutil.rmtree(tmp_path / "run/tokens")
    assert "are gone" in app(monkeypatch, tmp_path / "run", "trajectory.py", id=trace_id(1, 0, 0)).info[0].value


EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script></div>'


def test_what_a_policy_writes_is_never_markup(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path / "run", {"model": EVIL, "control_tokens": [EVIL]})
    row = make_row(1, ids=[1, 2], text=[EVIL, "\u202eevil"], mask=[1, 0], turn=[0, 0], logprob=[-1, float("nan")], entropy=None,
                   advantage=None, sampling_logprob=None, prompt_text=[EVIL], answer=EVIL, stop=EVIL, environment=EVIL, turn_kinds=[EVIL], origin=EVIL)
    writer.append_index(writer.write_tokens(1, [row]))
    writer.close("failed", EVIL)
    for page in PAGES:
        test = app(monkeypatch, tmp_path / "run", page, **({"id": row.id} if page == "trajectory.py" else {}))
        assert not re.search(r"(?<!\\)<(img|script)", words(test)) and ("img src" in words(test)) == (page in ("overview.py", "steps.py", "trajectory.py"))


def test_launch_refuses_in_one_sentence(tmp_path):
    with pytest.raises(RunError, match="no run folder"):
        launch(tmp_path / "nowhere")
    make_run(tmp_path / "run", steps=1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(RunError, match="in use"):
            launch(tmp_path / "run", port=s.getsockname()[1])


def test_the_app_needs_no_trainer(tmp_path):
    code = "import sys, tirlab.traces.run, tirlab.app.common, tirlab.app.launch, tirlab.plots.figures; sys.exit(any(m in sys.modules for m in ('torch', 'trl')))"
    subprocess.run([sys.executable, "-c", code], check=True)
    (tmp_path / "meta.json").write_text(json.dumps({"format": "tirlab-run", "schema_version": 1}))
    assert "--server.address=127.0.0.1" in command(tmp_path, 1) and "--browser.gatherUsageStats=false" in command(tmp_path, 1)
