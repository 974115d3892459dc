"""Pages about a run as a whole: steps and groups, control tokens, several runs, search, what was dropped."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from test_app import PAGES, app, words
from trace_rows import CONTROL, add_steps, make_row, make_run

from tirlab.traces.annotations import read_bookmarks
from tirlab.app import common, find
from tirlab.traces.run import Run, RunWriter, open_run, trace_id


def html(test):
    "All HTML of a page."
    return "\n".join(e.proto.body for e in test.get("html"))


def facts(test, page):
    "The facts of a page's test hook."
    mark = re.search(rf'class="tirlab-ready" data-page="{page}"([^>]*)>', html(test))
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', mark[1]))


def links(test):
    "Query of each link to another page."
    return [e.proto.query_string for e in test.get("page_link")]


@pytest.fixture
def eventful(tmp_path):
    "Four steps with an alarm, a round of supervision, probed control tokens, dropped, hinted and replayed rollouts."
    writer = make_run(tmp_path / "run", steps=3, status="running")
    writer.log(2, {"sft/steps": 4, "sft/rows": 7, "sft/tokens": 800}, "sft")
    for step in (1, 2, 3):
        writer.log(step, {f"probe/tool_call/{where}_{what}": .5 for where in ("sampled", "turn_start", "forbidden") for what in ("mean", "p10", "p50", "p90", "max")}
                   | {"probe/void_rate": .1, "grad_norm": 1.0})
    rows = []
    for i, (origin, dropped) in enumerate([("hinted", None), ("replay", "void turn 1; group zero variance"), ("demonstration", None), ("sampled", "void turn 0")] + [("sampled", None)] * 4):
        row = make_row(4, i, skill=.5)
        control = np.full((len(row.ids), len(CONTROL)), -6.0)
        control[min(3 + i, len(row.ids) - 1), 0] = np.log(.9 - .1 * i)
        rows.append(make_row(4, i, skill=.5, origin=origin, dropped=dropped, task=f"task-{i // 4}", control=control, reward=1.0 if i >= 4 else float(i == 0)))
    writer.append_index(writer.write_tokens(4, rows))
    writer.beat(4, force=True)
    alarm = {"step": 3, "signal": "probe/void_rate", "value": .4, "usual": .05, "score": 1.2, "culprits": [{"id": trace_id(3, 0, 2), "position": 5, "value": 1.0}]}
    (tmp_path / "run/alarms.jsonl").write_text("".join(json.dumps(alarm | {"step": s}) + "\n" for s in (1, 2, 2, 3)) + "[1]\nnot ours\n" + '{"step": 4, "si')
    return tmp_path / "run"


def test_alarms_lead_to_what_did_it(eventful, monkeypatch):
    test = app(monkeypatch, eventful)
    assert "3 alarms" in words(test) and "probe/void_rate" in words(test)
    assert f"id={trace_id(3, 0, 2)}&token=5" in links(test) and "step=3" in links(test)
    assert facts(test, "overview") == {"step": "4", "trajectories": "32"}


def test_a_step_and_its_groups(eventful, monkeypatch):
    test = app(monkeypatch, eventful, "steps.py")
    table = test.dataframe[0].value
    assert facts(test, "steps")["step"] == "4" and table.n.tolist() == [4, 4] and table.zero_variance.tolist() == [False, True]
    assert "void turn 0" in table.dropped[0] and all(word in table.off_policy[0] for word in ("hinted", "replayed", "demonstration"))
    assert facts(test, "steps")["group"] == "0"                                        # the one that teaches something
    page = html(test)
    assert page.count('class="shape"') == 4 and page.count('class="spark"') == 4 and "The best of this prompt" in page and "Differs from the best at token" in page
    assert "hinted" in words(test) and "void turn 1" in words(test) and "reward 1" in words(test)
    test.button[0].click().run()                                                       # the step before
    assert facts(test, "steps")["step"] == "3" and test.query_params["step"] == "3"
    assert facts(app(monkeypatch, eventful, "steps.py", step="4", group="1"), "steps")["group"] == "1"
    assert "There is no step 99" in words(app(monkeypatch, eventful, "steps.py", step="99"))


def test_a_step_follows_the_run_until_one_is_chosen(tmp_path, monkeypatch):
    writer = make_run(tmp_path / "run", steps=2, status="running")
    following, reading = app(monkeypatch, tmp_path / "run", "steps.py"), app(monkeypatch, tmp_path / "run", "steps.py", step="2")
    assert following.toggle[0].value and not reading.toggle[0].value
    add_steps(writer, [3])
    assert facts(following.run(), "steps")["step"] == "3" and facts(reading.run(), "steps")["step"] == "2"


def test_lost_tokens_cost_the_cards_and_not_the_page(eventful, monkeypatch):
    for file in (eventful / "tokens").glob("step-000004*"):
        file.write_bytes(b"PAR1 half of it")
    test = app(monkeypatch, eventful, "steps.py")
    assert len(test.dataframe[0].value) == 2 and "damaged" in words(test) and 'class="shape"' not in html(test)


def test_control_tokens(eventful, monkeypatch):
    test = app(monkeypatch, eventful, "control.py")
    spikes = test.dataframe[0].value
    assert len(test.get("plotly_chart")) == 1 and spikes.token[0] == CONTROL[0] and spikes.id[0] == trace_id(4, 0, 0) and spikes.position[0] == 3
    assert spikes.probability.is_monotonic_decreasing and int(facts(test, "control")["spikes"]) == len(spikes)


def test_control_tokens_that_were_not_probed(tmp_path, monkeypatch):
    make_run(tmp_path / "run", steps=1)
    test = app(monkeypatch, tmp_path / "run", "control.py")
    assert "not probed" in test.info[0].value and "No spikes were recorded" in words(test)


def test_two_runs(tmp_path, monkeypatch):
    make_run(tmp_path / "calm", steps=3, config={"learning_rate": 6e-4})
    make_run(tmp_path / "wild", steps=2, seed=1, config={"learning_rate": 2e-3})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/meta.json").write_text("{")
    test = app(monkeypatch, tmp_path / "calm", "compare.py")
    assert set(test.multiselect(key="with").options) == {"wild", "broken"}
    test.multiselect(key="with").set_value(["wild", "broken"]).run()
    assert not test.exception and "not a tirlab run" in words(test).replace("\\", "") and test.expander[0].label == "1 setting differs"
    assert test.dataframe[0].value.loc["learning_rate"].tolist() == ["0.0006", "0.002"]


def test_a_run_is_chosen_where_there_are_several(tmp_path, monkeypatch):
    make_run(tmp_path / "calm", steps=3)
    make_run(tmp_path / "wild", steps=2)
    monkeypatch.setattr("tirlab.app.common.sys.argv", ["main.py", str(tmp_path / "calm"), str(tmp_path / "wild")])
    from streamlit.testing.v1 import AppTest
    from test_app import APP
    test = AppTest.from_file(str(APP / "main.py"), default_timeout=60).run()
    assert "24 trajectories" in words(test)
    test.selectbox[0].set_value("wild").run()
    assert "16 trajectories" in words(test) and test.query_params["run"] == "wild"
    test.switch_page("steps.py").run()
    assert facts(test, "steps")["step"] == "2"


def test_one_prompt_through_all_steps(tmp_path, monkeypatch):
    writer = RunWriter(tmp_path / "run", {"model": "tiny"})
    for step in (1, 2, 5):
        writer.append_index(writer.write_tokens(step, [make_row(step, i, task="sums") for i in range(4)]))
    test = app(monkeypatch, tmp_path / "run", "compare.py", task="sums")
    assert test.selectbox(key="task").value == "sums" and set(test.dataframe[0].value.step) == {1, 2, 5}


def test_search_in_any_turn_of_any_step(eventful, monkeypatch):
    test = app(monkeypatch, eventful, "trajectories.py")
    test.text_input(key="text").set_value("syntaxerror").run()                         # a tool said it
    shown, found = test.dataframe[0].value, facts(test, "trajectories")
    assert found["searched"] == "32" and found["over"] == "true" and int(found["shown"]) == len(shown) > 3
    assert shown.found.str.contains("⟦SyntaxError⟧").all() and set(shown.place) == {"turn 1, tool output"} and shown.step.is_monotonic_decreasing
    row, link = open_run(eventful), dict(part.split("=") for part in shown.link[0].partition("?")[2].split("&"))
    assert link["turn"] == "1" and row.trajectory(link["id"]).text[int(link["token"])].startswith("SyntaxError")
    test.selectbox(key="where").set_value("model").run()
    assert "No trajectory matches" in test.info[0].value
    test.text_input(key="text").set_value("(").run()
    assert "no regular expression" in test.info[0].value
    test.selectbox(key="where").set_value("beginnings, id, task")
    test.text_input(key="text").set_value(r"answer: \d+").run()                        # the list, as it is in memory
    assert int(facts(test, "trajectories")["shown"]) == 32 == len(test.dataframe[0].value)
    again = app(monkeypatch, eventful, "trajectories.py", text="syntaxerror", where="prompt")
    assert "No trajectory matches" in again.info[0].value and again.selectbox(key="where").value == "prompt"
    test.text_input(key="text").set_value("").run()
    assert any("text=syntaxerror&where=model" in query for query in links(test))


def test_a_search_is_stopped_and_goes_on(eventful, monkeypatch):
    go_on = find.Job.go_on
    monkeypatch.setattr(find.Job, "go_on", lambda job, seconds: (go_on(job, 0), setattr(job, "stopped", not job.over and job.done == 16)))
    test = app(monkeypatch, eventful, "trajectories.py", text="answer")
    assert facts(test, "trajectories")["over"] == "false" and facts(test, "trajectories")["searched"] == "16"
    before = int(facts(test, "trajectories")["shown"])
    next(b for b in test.run().button if b.label == "Go on").click().run()
    assert facts(test, "trajectories")["over"] == "true" and facts(test, "trajectories")["searched"] == "32" and int(facts(test, "trajectories")["shown"]) > before


def test_lost_files_are_named_and_the_rest_is_searched(eventful, monkeypatch):
    next((eventful / "tokens").glob("step-000002*")).write_bytes(b"PAR1 half of it")
    test = app(monkeypatch, eventful, "trajectories.py", text="answer")
    assert "step\\-000002" in words(test) and len(test.dataframe[0].value) >= 24


def test_bookmarks_stay_with_the_run(eventful, monkeypatch):
    from tirlab.traces.annotations import bookmark
    bookmark(eventful, trace_id(3, 0, 2), "loses *syntax* here", "metric=entropy&token=12")
    test = app(monkeypatch, eventful, "trajectories.py")
    assert test.expander[0].label == "1 bookmark" and r"loses \*syntax\* here" in words(test) and f"id={trace_id(3, 0, 2)}&metric=entropy&token=12" in links(test)
    (eventful / "bookmarks.json").write_text("{")
    assert "move it away" in app(monkeypatch, eventful, "trajectories.py").warning[0].value
    (eventful / "bookmarks.json").unlink()
    assert read_bookmarks(eventful) == {}


def test_dropped_with_reasons(eventful, tmp_path, monkeypatch):
    test = app(monkeypatch, eventful, "dropped.py")
    assert "2 of 32 trajectories" in words(test) and len(test.dataframe[0].value) == 2
    test.button_group(key="reason").set_value(["group zero variance"]).run()
    assert test.dataframe[0].value.dropped.tolist() == ["void turn 1; group zero variance"]
    make_run(tmp_path / "clean", steps=1)
    assert "No trajectory was dropped" in app(monkeypatch, tmp_path / "clean", "dropped.py").info[0].value


@pytest.mark.parametrize("name, pages", [("index.jsonl", ("overview", "steps", "trajectories", "compare", "dropped")), ("metrics.jsonl", ("overview", "control", "compare")),
                                         ("steps.jsonl", ("overview", "steps", "control", "dropped")), ("alarms.jsonl", ("overview", "control"))])
def test_a_damaged_file_leaves_the_rest(eventful, monkeypatch, name, pages):
    (eventful / name).write_bytes(b'\x00\xff\xfe not a line\n{"step": "x"}\n[]\nnull\n{"step": 1, "hal')
    for page in pages:
        test = app(monkeypatch, eventful, f"{page}.py")                                # no exception
        if page == "overview":
            assert "32 trajectories" in words(test)
        if name == "index.jsonl" and page in ("steps", "trajectories"):
            assert re.search("not in the index|No trajectory was written", test.info[0].value)


class Screen:
    "What `watch` needs of Streamlit, without a browser: the page that a message is for, the fragment, and whether the page was drawn anew."

    def __init__(self, monkeypatch):
        self.page, self.tick, self.every, self.anew = "steps", None, None, 0
        monkeypatch.setattr(common, "get_script_run_ctx", lambda: SimpleNamespace(page_script_hash=self.page))
        monkeypatch.setattr(common.st, "rerun", lambda: setattr(self, "anew", self.anew + 1))
        monkeypatch.setattr(common.st, "fragment", self.fragment)

    def fragment(self, tick, run_every):
        self.tick, self.every = tick, run_every
        return tick


@pytest.mark.parametrize("page, follows", [(page, page in ("overview.py", "steps.py", "control.py", "dropped.py")) for page in PAGES])
def test_what_is_written_while_a_page_is_drawn_is_seen(tmp_path, monkeypatch, page, follows):
    "Every page reads the run only after it has begun to watch."
    writer, done, watched = make_run(tmp_path / "run", steps=2, status="running"), [], []

    def watch(run, seen, show=lambda: None):
        before = len(done)
        watched.append((seen, seen(), show()))
        done[before:] = ["watch"]
    for name, place in (("steps", Run), ("metrics", Run), ("index", Run), ("current_run", common)):
        monkeypatch.setattr(place, name, lambda *of, read=getattr(place, name), name=name: (done.append(name), read(*of))[1])
    monkeypatch.setattr(common, "watch", watch)
    app(monkeypatch, tmp_path / "run", page)
    assert [b for a, b in zip(done, done[1:]) if a == "current_run"] == ["watch"] * done.count("current_run")
    seen, was, _ = watched[-1]
    add_steps(writer, [3])
    assert (seen() != was) == follows


def test_the_page_is_drawn_anew_when_the_run_goes_on(tmp_path, monkeypatch):
    writer, screen = make_run(tmp_path / "run", steps=2, status="running"), Screen(monkeypatch)
    run, shown = Run(tmp_path / "run"), []
    common.watch(run, lambda: len(run.steps()), lambda: shown.append(1))
    screen.tick()
    assert screen.every and not screen.anew and len(shown) == 2
    add_steps(writer, [3])
    screen.tick()
    assert screen.anew == 1


def test_a_tick_of_the_page_that_was_left_costs_one_drawing(tmp_path, monkeypatch):
    make_run(tmp_path / "run", steps=2, status="running")
    screen = Screen(monkeypatch)
    common.watch(Run(tmp_path / "run"), lambda: None)
    screen.page = "overview"
    screen.tick()                                                          # sent before the browser knew better: to go there would be to go back
    assert not screen.anew
    screen.page = "steps"
    screen.tick()
    assert screen.anew == 1


def test_a_run_that_ended_is_not_asked_again(tmp_path, monkeypatch):
    make_run(tmp_path / "run", steps=2)
    screen = Screen(monkeypatch)
    common.watch(Run(tmp_path / "run"), lambda: None)
    assert screen.every is None

