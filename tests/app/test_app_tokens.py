"""The replay page: its states without a browser, and in one what it shows, how it is steered, and that nothing a policy wrote is ever run."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ports import own_port
from streamlit.testing.v1 import AppTest
from trace_rows import CONTROL, make_row, make_run

import tirlab.app
from tirlab.app.launch import command
from tirlab.app.messages import formulas, inert, outside_code
from tirlab.plots.colors import SCALES, class_color, color_class
from tirlab.traces.run import Run, RunWriter, TraceRow, trace_id

APP = Path(tirlab.app.__file__).parent


def app(monkeypatch, run, **query):
    "The replay page, run once."
    monkeypatch.setattr(sys, "argv", ["main.py", str(run)])
    test = AppTest.from_file(str(APP / "main.py"), default_timeout=60)
    test.run().switch_page("trajectory.py")
    test.query_params.update(query)
    test.run()
    assert not test.exception
    return test


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


def test_turn_rewards_stand_in_the_header_by_name(tmp_path, monkeypatch):
    row = make_row(1, 0)
    scores = {"repeats": [-0.1 * j for j in range(len(row.turn_kinds))], "<b>": [0.5] * len(row.turn_kinds)}
    path = write(tmp_path / "run", [make_row(1, 0, turn_scores=scores), make_row(1, 1)])
    assert dict(Run(path).trajectory(row.id).turn_scores) == scores
    facts, _ = shown(app(monkeypatch, path, id=row.id))
    assert [t["scores"] for t in facts["turns"]] == [{name: values[j] for name, values in scores.items()} for j in range(len(row.turn_kinds))]
    facts, _ = shown(app(monkeypatch, path, id=trace_id(1, 0, 1)))
    assert all(t["scores"] == {} for t in facts["turns"])


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


# In a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()
RUNS = "window.ran = (window.ran || 0) + 1"
EVIL = [f"<script>{RUNS}</script>", "</span>", "</div></section>", f'<img src=x onerror="{RUNS}">', f"<svg/onload='{RUNS}'>", '"><b onmouseover=alert(1)>', "\u202etxt.exe",
        "\u200fשלום", "a\x00b", "\ufffd", b"\xe2\x82".decode("utf-8", "replace"), "\ud800", "`;alert(1)//${alert(1)}", "\n", "x" * 1_000_000, ""]
AS_TEXT = [*EVIL[:6], "⟨202E⟩txt.exe", "⟨200F⟩שלום", "a⟨0⟩b", "\ufffd", "\ufffd", "\ufffd", EVIL[12], "↵\n", EVIL[14], "∅"]
NAME = f"<img src=x onerror='{RUNS}'>"
MARKDOWN = f"[a](javascript:{RUNS.replace(' ', '')}) ![b](http://evil.example/b.png) <img src=http://evil.example/c.png onerror='{RUNS}'> $\\href{{javascript:{RUNS}}}{{x}}$"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A browser on a run with three trajectories: an ordinary one, an evil one, and one to be read as Markdown."
    if not BROWSER: pytest.skip("needs Debian's chromium")
    from playwright.sync_api import Error, sync_playwright
    where = tmp_path_factory.mktemp("replay")
    ordinary = scored(make_row(1, 1), names=[NAME, *CONTROL[1:]])
    n = len(EVIL)
    evil = TraceRow(id=trace_id(2, 0, 0), step=2, ids=range(n), text=EVIL, mask=[1] * n, turn=[0] * n, logprob=-np.arange(n) / 4, turn_kinds=[NAME], stop=NAME, prompt_text=EVIL[:6],
                    prompt_ids=range(6), hint=NAME, origin=NAME, control=-np.ones((n, 6)))
    marked = TraceRow(id=trace_id(3, 0, 0), step=3, ids=[1, 2], text=[MARKDOWN, MARKDOWN], mask=[1, 0], turn=[0, 0], turn_kinds=["response"])
    run, port = write(where / "run", [ordinary, evil, marked], probed_tokens=[NAME, *CONTROL[1:]], control_tokens=[NAME, *CONTROL]), own_port()
    arguments = command(run, port, headless=True)
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with sync_playwright() as p:
            browser = p.chromium.launch_persistent_context(str(where / "profile"), executable_path=BROWSER, args=FLAGS)
            page = browser.new_page()
            page.set_default_timeout(30_000)
            page.url_of = lambda **query: f"http://127.0.0.1:{port}/trajectory?" + "&".join(f"{k}={v}" for k, v in query.items())
            page.asked, page.dialogs = [], []
            page.on("request", lambda r: page.asked.append(r.url))
            page.on("dialog", lambda d: (page.dialogs.append(d.message), d.dismiss()))
            for _ in range(150):                                  # until the server listens
                try:
                    page.goto(page.url_of(id=ordinary.id))
                    break
                except Error:
                    page.wait_for_timeout(200)
            page.ordinary, page.evil, page.marked = ordinary, evil, marked
            yield page
            browser.close()
    finally:
        server.terminate()
        server.wait(20)


def to(page, **query):
    "Open a link, and wait until its tokens are painted and all of them are there."
    page.goto(page.url_of(**query))
    page.locator(f".tm[data-painted][data-whole][data-id='{query['id']}']").wait_for()
    return page.locator(".tm")


def harmless(page):
    "Nothing that was written has run or was loaded."
    return page.evaluate("window.ran") is None and not page.dialogs and not [u for u in page.asked if "evil" in u or u.endswith("/x")]


def test_tokens_are_text_and_nothing_runs(page):
    tm = to(page, id=page.evil.id)
    spans = tm.locator(".b > span")
    assert spans.evaluate_all("all => all.map(e => e.textContent)") == AS_TEXT
    for k in (0, 3, 6, 8, 9, len(EVIL) - 1):                           # the card, its neighbours, the tip on hover
        spans.nth(k).hover()
        spans.nth(k).evaluate("e => e.click()")
        assert tm.locator(".big").inner_text().startswith(AS_TEXT[k][:60].strip())
    assert "61 E2" not in tm.locator(".card").inner_text() and spans.nth(8).get_attribute("data-s") is None
    spans.nth(8).evaluate("e => e.click()")
    assert "61 00 62" in tm.locator(".card").inner_text()
    spans.nth(9).evaluate("e => e.click()")
    assert "not valid UTF-8" in tm.locator(".card").inner_text()
    tm.locator("details.prompt summary").click()
    assert tm.locator("details.prompt .text:not(:empty)").inner_text() == "".join(EVIL[:6])   # filled when it is opened
    assert tm.locator("script, img, svg, [onerror], [onmouseover]").count() == 0
    tm.locator("select").select_option(f"p:{NAME}")
    assert NAME in tm.locator(".card").inner_text() and NAME.replace("_", " ") in tm.locator("header").inner_text()
    page.get_by_role("button", name="Hint").click()
    page.get_by_test_id("stText").get_by_text(NAME).wait_for()
    assert harmless(page)


def test_markdown_runs_and_loads_nothing(page):
    for way in ("raw", "markdown", "latex", "code"):
        page.goto(page.url_of(id=page.marked.id, view="messages", **{"as": way}))
        page.get_by_text("c.png").first.wait_for()
        assert page.locator(".stMarkdown img, .stHtml img, a[href^=javascript]").count() == 0
    assert harmless(page)


def test_a_metric_is_switched_in_the_browser(page):
    tm, row = to(page, id=page.ordinary.id), page.ordinary
    tm.locator('[data-do="fold"]').click()                             # tool output is folded, and its tokens are there when it is opened
    for name in ("logprob", "advantage", "mismatch"):
        before = int(tm.get_attribute("data-painted"))
        if tm.get_attribute("data-metric") != name: tm.locator("select").select_option(name)
        page.locator(f".tm[data-metric={name}]").wait_for()
        values = row.logprob - row.sampling_logprob if name == "mismatch" else getattr(row, name)
        wanted = ["o" if not m else "u" if k < 0 else f"c{k}" for m, k in zip(row.mask, color_class(values, SCALES[name]))]
        assert tm.locator(".b > span").evaluate_all("all => all.map(e => e.className.split(' ')[0])") == wanted
        assert int(tm.get_attribute("data-painted")) == before + (name != "logprob") and f"metric={name}" in page.url
    k = next(c for c in wanted if c[0] == "c")
    color = tm.locator(f".b > span.{k}").first.evaluate("e => getComputedStyle(e).backgroundColor")
    numbers = [re.findall(r"[\d.]+", c) for c in (color, class_color(int(k[1:]), SCALES["mismatch"]))]
    assert np.allclose(*(np.array(n, float) for n in numbers), atol=.005)
    assert tm.locator(".legend").get_attribute("aria-label") == "Trainer minus sampler, nats: from −0.5 or less to 0.5 or more"
    assert tm.locator(".hatched .b > span").count() == (row.mask == 0).sum() and tm.locator("details.err").count() == len(row.turn_kinds) - 2


def test_keys_and_a_link_to_exactly_this(page):
    tm, row = to(page, id=page.ordinary.id, metric="logprob"), page.ordinary
    turn = tm.locator("[data-is=turn]")
    for key, number in (("l", 2), ("h", 1), ("h", 1), ("l", 2)):
        page.keyboard.press(key)
        assert turn.inner_text() == f"Turn {number} of {len(row.turn_kinds)}" and f"turn={number}" in page.url
    page.keyboard.press("u")
    least = int(np.nanargmin(row.logprob))
    assert f"token={least}" in page.url and str(row.ids[least]) in tm.locator(".card").inner_text()
    page.keyboard.press("m")
    tm.locator(".pane").focus()
    page.keyboard.press("ArrowRight")
    assert f"token={least + 1}" in page.url and "metric=entropy" in page.url
    page.wait_for_timeout(1000)                                        # the server has heard of it by now
    link = page.url
    assert int(re.search(r"turn=(\d+)", link)[1]) == row.turn[least + 1] + 1
    page.get_by_role("radio", name="Messages").or_(page.get_by_role("button", name="Messages")).first.click()
    page.wait_for_url(lambda url: "view=messages" in url)              # the server rewrites the address, and has kept the rest
    assert page.url == link + "&view=messages"
    page.goto("about:blank")
    page.goto(link)
    tm.locator("[data-s]").wait_for()
    assert page.url == link and tm.get_attribute("data-metric") == "entropy" and tm.locator(".b > span[data-s]").evaluate("e => e.at") == least + 1
    page.keyboard.press("Shift+L")
    page.locator(f".tm[data-id='{page.evil.id}']").wait_for()
    assert f"id={page.evil.id}" in page.url and "token=" not in page.url
    page.go_back()
    page.locator(f".tm[data-id='{row.id}']").wait_for()


def test_play(page):
    tm = to(page, id=page.ordinary.id, turn=1)
    page.keyboard.press("k")
    later = tm.locator("section[data-later]")
    assert later.count() == len(page.ordinary.turn_kinds) - 1
    page.locator(".tm section[data-later]").first.wait_for(state="detached")   # it went on to the end, and stopped
    tm.get_by_label("Play", exact=True).wait_for()
