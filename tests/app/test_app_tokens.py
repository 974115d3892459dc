"""The replay page without a browser: what it hands over for every state of a run. In a browser: test_app_browser.py."""
import json

import numpy as np
import pyarrow as pa
import pytest
import test_app
from trace_rows import CONTROL, make_row, make_run

from tirlab.app.messages import formulas, inert, outside_code
from tirlab.traces.run import Run, RunWriter, TraceRow, trace_id


def app(monkeypatch, run, **query):
    "The replay page, run once."
    return test_app.app(monkeypatch, run, "trajectory.py", **query)


def words(test):
    "All Markdown of a page, as it reads."
    return "\n".join(str(e.value) for kind in ("info", "caption", "markdown", "subheader", "text") for e in getattr(test, kind)).replace("\\", "")


def shown(test):
    "What the page hands to the browser: facts, and the table of tokens."
    sent = test.get("bidi_component")[0].proto.mixed
    data = json.loads(sent.json)
    return data["facts"], pa.ipc.open_stream(sent.arrow_blobs[data["tokens"]["__streamlit_arrow_ref__"]].data).read_all()


def asked(test, name):
    "A parameter of the page's address."
    value = test.query_params.get(name)
    return value[0] if isinstance(value, list) else value


def scored(row, names=CONTROL, **changes):
    "A row in which everything was measured."
    n, own, rng = len(row.ids), row.mask == 1, np.random.default_rng(0)
    control = np.where(own[:, None], -rng.gamma(4, 1.5, (n, len(names))), np.nan)
    kept = {f: getattr(row, f) for f in TraceRow.__dataclass_fields__}
    return TraceRow(**kept | {"surprise": np.where(own, rng.uniform(0, 1.2, n), np.nan), "control": control} | changes)


def write(path, rows, **meta):
    "A run folder of these rows."
    writer = RunWriter(path, {"model": "tiny", "control_tokens": CONTROL, "probed_tokens": CONTROL} | meta)
    for step in sorted({r.step for r in rows}):
        writer.append_index(writer.write_tokens(step, [r for r in rows if r.step == step]))
    writer.close()
    return path


def test_a_trajectory_by_its_link(tmp_path, monkeypatch):
    make_run(tmp_path / "run", steps=2)
    test = app(monkeypatch, tmp_path / "run", id=trace_id(2, 0, 5), metric="entropy", turn="2", token="7")
    facts, table = shown(test)
    row = Run(tmp_path / "run").trajectory(trace_id(2, 0, 5))
    assert facts["id"] == row.id and row.id in words(test) and "step 2" in words(test)
    assert facts["at"] == {"metric": "entropy", "turn": 2, "token": 7}
    assert [m["name"] for m in facts["metrics"]] == ["logprob", "entropy", "advantage", "ratio", "mismatch", "sampling_logprob"]
    assert table["text"].to_pylist() == row.text and table["id"].to_pylist() == row.ids.tolist() and table["mask"].to_pylist() == row.mask.tolist()
    np.testing.assert_array_equal(table["logprob"].to_numpy(), row.logprob)          # NaN where not measured, and not null
    np.testing.assert_allclose(table["ratio"].to_numpy(), np.exp(row.logprob - row.sampling_logprob), rtol=1e-5)
    assert [t["kind"] for t in facts["turns"]] == row.turn_kinds and [t["reward"] for t in facts["turns"]] == row.turn_rewards
    test.button(key="Next").click().run()
    assert (asked(test, "id"), asked(test, "metric"), asked(test, "token")) == (trace_id(2, 0, 6), "entropy", None)
    assert shown(test)[0]["id"] == trace_id(2, 0, 6)
    test.segmented_control(key=f"same prompt as {trace_id(2, 0, 6)}").set_value(row.id).run()
    assert shown(test)[0]["id"] == row.id


def test_all_that_was_measured_is_a_metric(tmp_path, monkeypatch):
    row = scored(make_row(1, 0))
    facts, table = shown(app(monkeypatch, write(tmp_path / "run", [row]), id=row.id))
    names = [m["name"] for m in facts["metrics"]]
    assert "surprise" in names and [n for n in names if n.startswith("p:")] == [f"p:{c}" for c in CONTROL]
    assert {m["group"] for m in facts["metrics"]} == {"Policy", "Control tokens"} and all(len(facts["scales"][n]["colors"]) == 32 for n in names)
    np.testing.assert_allclose(table["p:<tool_call>"].to_numpy(), np.exp(row.control[:, 2].astype("float32")), rtol=1e-5)
    assert facts["jumps"]["least"][0] == np.nanargmin(row.logprob)


@pytest.mark.parametrize("names", [[], ["a"]])
def test_probed_tokens_whose_names_are_lost_are_no_metric(tmp_path, monkeypatch, names):
    row = scored(make_row(1, 0))
    facts, _ = shown(app(monkeypatch, write(tmp_path / "run", [row], control_tokens=names, probed_tokens=names), id=row.id))
    assert not [m for m in facts["metrics"] if m["name"].startswith("p:")]


def test_nothing_scored_and_nothing_written(tmp_path, monkeypatch):
    nothing = {name: None for name in ("logprob", "entropy", "advantage", "sampling_logprob")}
    plain, empty = make_row(1, 0, **nothing), TraceRow(id=trace_id(1, 0, 1), step=1)
    run = write(tmp_path / "run", [plain, empty])
    facts, table = shown(app(monkeypatch, run, id=plain.id))
    assert facts["metrics"] == [] and facts["jumps"] == {"least": []} and len(table) == len(plain.ids)
    facts, table = shown(app(monkeypatch, run, id=empty.id, token="99", turn="x"))
    assert facts["turns"] == [] and len(table) == 0 and facts["at"]["turn"] is None


def test_how_it_came_to_be(tmp_path, monkeypatch):
    rows = [make_row(1, 0, origin="hinted", hint="Add first. <b>Then</b> multiply."), make_row(1, 1, origin="demonstration"), make_row(1, 2, origin="replay"),
            make_row(1, 3, origin="reflection"), make_row(1, 4, dropped="void turn")]
    run = write(tmp_path / "run", rows)
    for row, says in zip(rows, ["hinted", "demonstration", "replay", "reflection", "dropped or masked: void turn"]):
        page = words(app(monkeypatch, run, id=row.id))
        assert says in page and "reward" in page and "advantage" in page and ("<b>Then</b>" in page) == (row.hint is not None)


def test_the_shift_against_a_checkpoint(tmp_path, monkeypatch):
    row = make_row(1, 0)
    other = np.where(np.arange(len(row.ids)) == 3, row.logprob - 4, row.logprob)
    monkeypatch.setattr(Run, "scores", lambda self: {"step-9": {"model": "tiny"}, "gone": {}}, raising=False)
    monkeypatch.setattr(Run, "scored", lambda self, name, id: other if name == "step-9" else None, raising=False)
    facts, table = shown(app(monkeypatch, write(tmp_path / "run", [row]), id=row.id, metric="shift:step-9"))
    assert facts["metrics"][-1] == {"name": "shift:step-9", "label": "Shift (step-9 − recorded)", "group": "Against a checkpoint"}
    assert facts["jumps"]["shift:step-9"] == [3] and table["shift:step-9"][3].as_py() == pytest.approx(-4, abs=1e-5)
    assert facts["turns"][0]["kl"]["step-9"] == pytest.approx(np.exp(-4) - 1 + 4, abs=1e-4) and facts["turns"][1]["kl"]["step-9"] == pytest.approx(0, abs=1e-9)


def test_messages(tmp_path, monkeypatch):
    said = 'Then \\(x^2\\) costs $5. ![a](http://evil.example/a.png) <script>x</script>\n```python\nprint("$1")\n```\n'
    row = TraceRow(id=trace_id(1, 0, 0), step=1, ids=[1, 2, 3], text=[said, "{'error': 'no'}", "Done."], mask=[1, 0, 1], turn=[0, 0, 1], turn_kinds=["tool_call", "response"])
    run = write(tmp_path / "run", [row])
    test = app(monkeypatch, run, id=row.id, view="messages")
    assert not test.get("bidi_component") and "&lt;script&gt;" in "".join(e.proto.body for e in test.get("html")) and "error" in words(test)
    ways = {way: app(monkeypatch, run, id=row.id, view="messages", **{"as": way}) for way in ("markdown", "latex", "code")}
    marked, math = ("\n".join(m.value for m in ways[w].markdown) for w in ("markdown", "latex"))
    assert "costs \\$5" in marked and 'print("$1")' in marked and "$x^2$" in math
    assert "![" not in marked + math and not any(m.allow_html for w in ways.values() for m in w.markdown)
    assert [c.value for c in ways["code"].code] == ['print("$1")', "{'error': 'no'}", "Done."]
    test.button(key="turn+").click().run()
    assert asked(test, "turn") == "2" and "Turn 2" in words(test) and "Turn 1" not in words(test)
    test.segmented_control(key="choice view").set_value("tokens").run()
    assert shown(test)[0]["at"]["turn"] == 2 and asked(test, "view") == "tokens"


def test_text_is_made_harmless():
    assert inert("a\u202eb\x00c![x](y)") == "a⟨202E⟩b⟨0⟩c!\u2060[x](y)"
    assert formulas(r"\[a\] and \(b\), \boxed{7} and $\boxed{8}$") == "\n$$a$$\n and $b$, $\\boxed{7}$ and $\\boxed{8}$"
    assert outside_code("a `a` a\n```\na\n``` a", lambda s: s.replace("a", "b")) == "b `a` b\n```\na\n``` b"
