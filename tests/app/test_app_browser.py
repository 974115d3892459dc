"""The app in a real browser: it follows a run, works offline and leaves nothing behind; what the replay page shows, how it is steered, and that nothing a policy wrote is ever run."""
import re
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from ports import own_port
from test_app_tokens import scored, write
from trace_rows import CONTROL, add_steps, make_row, make_run

from tirlab.plots.colors import SCALES, class_color, color_class
from tirlab.traces.run import TraceRow, trace_id

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Debian's chromium")
RUNS = "window.ran = (window.ran || 0) + 1"
EVIL = [f"<script>{RUNS}</script>", "</span>", "</div></section>", f'<img src=x onerror="{RUNS}">', f"<svg/onload='{RUNS}'>", '"><b onmouseover=alert(1)>', "\u202etxt.exe",
        "\u200fשלום", "a\x00b", "\ufffd", b"\xe2\x82".decode("utf-8", "replace"), "\ud800", "`;alert(1)//${alert(1)}", "\n", "x" * 1_000_000, ""]
AS_TEXT = [*EVIL[:6], "⟨202E⟩txt.exe", "⟨200F⟩שלום", "a⟨0⟩b", "\ufffd", "\ufffd", "\ufffd", EVIL[12], "↵\n", EVIL[14], "∅"]
NAME = f"<img src=x onerror='{RUNS}'>"
MARKDOWN = f"[a](javascript:{RUNS.replace(' ', '')}) ![b](http://evil.example/b.png) <img src=http://evil.example/c.png onerror='{RUNS}'> $\\href{{javascript:{RUNS}}}{{x}}$"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "One server of two runs, one that goes on and one with three trajectories: an ordinary one, an evil one, and one to be read as Markdown; and one browser."
    from playwright.sync_api import Error, expect, sync_playwright
    where = tmp_path_factory.mktemp("browser")
    ordinary = scored(make_row(1, 1), names=[NAME, *CONTROL[1:]])
    n = len(EVIL)
    evil = TraceRow(id=trace_id(2, 0, 0), step=2, ids=range(n), text=EVIL, mask=[1] * n, turn=[0] * n, logprob=-np.arange(n) / 4, turn_kinds=[NAME], stop=NAME, prompt_text=EVIL[:6],
                    prompt_ids=range(6), hint=NAME, origin=NAME, control=-np.ones((n, 6)))
    marked = TraceRow(id=trace_id(3, 0, 0), step=3, ids=[1, 2], text=[MARKDOWN, MARKDOWN], mask=[1, 0], turn=[0, 0], turn_kinds=["response"])
    replay = write(where / "replay", [ordinary, evil, marked], probed_tokens=[NAME, *CONTROL[1:]], control_tokens=[NAME, *CONTROL])
    writer, port = make_run(where / "live", steps=2, status="running"), own_port()
    code = "import sys; from tirlab.app.launch import launch; sys.exit(launch(sys.argv[2:], port=int(sys.argv[1]), headless=True))"
    server = subprocess.Popen([sys.executable, "-c", code, str(port), str(where / "live"), str(replay)], stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://127\.0\.0\.1:\d+", server.stdout.readline())[0]
        with sync_playwright() as p:
            browser = p.chromium.launch_persistent_context(str(where / "profile"), executable_path=BROWSER, args=FLAGS)
            expect.set_options(timeout=20_000)
            page = browser.new_page()
            page.set_default_timeout(60_000)
            asked, dialogs = [], []
            page.on("request", lambda r: asked.append(r.url))
            page.on("dialog", lambda d: (dialogs.append(d.message), d.dismiss()))
            for _ in range(300):                                  # until the server listens
                try:
                    page.goto(f"{url}/_stcore/health")
                    break
                except Error:
                    page.wait_for_timeout(100)
            yield SimpleNamespace(page=page, url=url, writer=writer, ordinary=ordinary, evil=evil, marked=marked, asked=asked, dialogs=dialogs)
            browser.close()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(20)
    with socket.socket() as s:
        assert s.connect_ex(("127.0.0.1", port)) != 0             # nothing is left behind


def outside(served):
    "Addresses elsewhere that were asked for."
    return [u for u in served.asked if not u.startswith((served.url, served.url.replace("http", "ws"), "data:", "blob:"))]


@pytest.fixture
def page(served):
    "A page of the browser, with what it is to show."
    page = served.page
    page.url_of = lambda **query: f"{served.url}/trajectory?run=replay&" + "&".join(f"{k}={v}" for k, v in query.items())
    page.asked, page.dialogs, page.ordinary, page.evil, page.marked = served.asked, served.dialogs, served.ordinary, served.evil, served.marked
    return page


def test_it_follows_a_run_and_works_offline(served):
    from playwright.sync_api import expect
    page, writer = served.page, served.writer
    page.goto(served.url)
    expect(page.get_by_text("16 trajectories")).to_be_visible(timeout=60_000)
    add_steps(writer, [3])
    expect(page.get_by_text("24 trajectories")).to_be_visible()      # it follows by itself
    page.wait_for_function("document.querySelector('.js-plotly-plot')?.calcdata?.[0].length == 3")
    page.wait_for_timeout(500)
    page.locator(".js-plotly-plot .nsewdrag").first.click()                         # the point in the middle leads to its step
    expect(page.locator(".tirlab-ready[data-page=steps]")).to_be_attached()
    for _ in range(5):                                                              # and stays there while the run goes on
        page.wait_for_timeout(300)
        assert re.search(r"steps\?.*step=2$", page.url)
    page.get_by_text("Follow live").click()                                         # and the newest one is followed again
    add_steps(writer, [4])
    expect(page.locator(".tirlab-ready[data-page=steps][data-step='4']")).to_be_attached()
    page.get_by_role("link", name="Search").first.click()
    page.get_by_role("textbox", name="Text").fill("what is")
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile("text=what"))                               # what was asked for stands in the address
    page.reload()
    expect(page.get_by_role("textbox", name="Text")).to_have_value("what is")
    grid = page.locator(".stDataFrameGlideDataEditor").first
    expect(grid).to_be_visible()
    page.wait_for_timeout(500)
    grid.click(position={"x": 200, "y": 52})              # a cell of the first row
    expect(page.locator(".tm[data-painted]")).to_be_visible()                       # what is in it: below
    assert "id=000004-0-00" in page.url
    assert not outside(served)                                   # it works offline


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
