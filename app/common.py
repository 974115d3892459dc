"""Parts that all pages share: the current run, its status as a badge, links between pages, bookmarks, and one form for messages."""
import html
import re
import sys
import time
from pathlib import Path

import streamlit as st
from streamlit.runtime.scriptrunner import get_script_run_ctx

from tirlab.traces.annotations import bookmark, read_bookmarks
from tirlab.traces.run import Run, RunError, open_run

STATUS = {   # status -> icon, colour, label
    "running": (":material/play_circle:", "green", "running"),
    "finished": (":material/check_circle:", "blue", "finished"),
    "interrupted": (":material/stop_circle:", "orange", "interrupted"),
    "failed": (":material/error:", "red", "crashed"),
    "stalled": (":material/hourglass_disabled:", "orange", "stalled: no heartbeat"),
}
NOTHING_YET = "No trajectory was written yet. Trajectories appear here as soon as the first step is done."


@st.cache_resource(max_entries=16, show_spinner=False)
def open_cached(path: str) -> Run:
    "Open a run folder, once for all pages and readers."
    return open_run(path)


def run_name(path: Path) -> str:
    "Return the name of a run: that of its folder, with the folder above where the name is a mere date and time; of one of several seeds that of the seed, with the folder above."
    if seed := next((p for p in (path, path.parent) if re.fullmatch(r"seed-\d+", p.name)), None):
        return f"{seed.parent.name}/{seed.name}"
    return f"{path.parent.name}/{path.name}" if re.fullmatch(r"run-\d{8}-\d{6}(-\d+)?", path.name) else path.name


def run_paths() -> dict[str, str]:
    "Return name -> folder of each run this app was started for; where two have one name, the second is named by its whole path."
    found = {}
    for path in dict.fromkeys(Path(p).resolve() for p in sys.argv[1:]):
        found[str(path) if run_name(path) in found else run_name(path)] = str(path)
    return found


def current_run() -> Run:
    "Return the run that the page shows; stop the page with one sentence if there is none."
    paths = run_paths()
    try:
        if not paths:
            raise RunError("No run folder was given: start the app with `tirlab app RUN`.")
        run = open_cached(paths.get(chosen_run(), next(iter(paths.values()))))
        run.meta()
    except RunError as e:
        open_cached.clear()
        stop(str(e), ":material/folder_off:")
    return run


def chosen_run() -> str:
    "Return the name of the current run: from the address, otherwise the one chosen before."
    paths = run_paths()
    for name in (st.query_params.get("run"), st.session_state.get("chosen run")):
        if name in paths:
            st.session_state["chosen run"] = name
            return name
    return next(iter(paths), "")


def choose_run():
    "Show a box to choose a run above each page, where there are several."
    if len(paths := run_paths()) > 1:
        def switch():
            name = st.session_state["run box"]
            st.session_state["chosen run"] = name
            st.query_params.clear()
            st.query_params["run"] = name
        names = list(paths)
        st.session_state["run box"] = chosen_run()
        st.selectbox("Run", names, key="run box", on_change=switch, label_visibility="collapsed", width=420)


def params(**values) -> dict[str, str]:
    "Return the query of a page: the values that are not None, and the run where there are several."
    mine = {"run": chosen_run()} if len(run_paths()) > 1 else {}
    return mine | {k: str(v) for k, v in values.items() if v is not None}


def go_to(page: str, **query):
    "Open a page: `go_to('steps', step=3)`."
    st.switch_page(f"{page}.py", query_params=params(**query))


def link(page: str, label: str, icon: str | None = None, help: str | None = None, **query):
    "Show a link to a page: `link('steps', 'Step 3', step=3)`."
    st.page_link(f"{page}.py", label=plain(label), icon=icon, help=help, query_params=params(**query), width="content")


def link_trajectory(id: str, label: str | None = None, **query):
    "Show a link to a trajectory; `metric`, `turn` and `token` say where in it."
    link("trajectory", label or id, icon=":material/forum:", id=id, **query)


def ready(page: str, **facts):
    "Test hook: the page has rendered. Tests and screenshots wait for `.tirlab-ready[data-page=...]`, with facts such as data-step."
    attributes = "".join(f' data-{k}="{html.escape(str(v))}"' for k, v in facts.items())
    st.html(f'<span class="tirlab-ready" data-page="{page}"{attributes}></span>')


def stop(text: str, icon: str = ":material/info:"):
    "Show one sentence and end the page."
    st.info(plain(text), icon=icon)
    st.stop()


def plain(text: str) -> str:
    "Escape text so that Markdown shows it as it is."
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|~<>$:&" else c for c in text)


def query_int(name: str) -> int | None:
    "Return a whole number from the address of the page, None if there is none."
    text = st.query_params.get(name, "")
    return int(text) if text.isdigit() and len(text) < 12 else None


def span(seconds: float) -> str:
    "Format a span of time: 5 s, 3 min, 2 h, 4 days."
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def badge(run: Run) -> str:
    "Show the status of the run, and return it."
    meta, status = run.meta(), run.status()
    icon, color, label = STATUS.get(status, (":material/help:", "gray", plain(str(status))))
    beat = meta.get("heartbeat", meta.get("created", 0))
    last = "last heartbeat" if status in ("running", "stalled") else "ended"
    with st.container(horizontal=True, vertical_alignment="center", gap="small", width="content"):
        st.badge(label, icon=icon, color=color)
        st.caption(f"step {meta.get('step', 0)} · {last} {span(time.time() - beat)} ago", width="content")
    return status


def watch(run: Run, seen, show=lambda: None):
    """Redraw the page of a live run as soon as the value of `seen()` changes. A tick draws only `show()`, so nothing flickers and no click is lost.

    Call it first on every page: then it also notices what is written while the page is drawn, and the tick is the same fragment on all pages. That matters when
    the reader opens another page: a late tick of the page that was left makes Streamlit empty the new one, and the next tick has to draw it again."""
    was, page, emptied = seen(), get_script_run_ctx().page_script_hash, False

    def tick():
        nonlocal emptied
        if get_script_run_ctx().page_script_hash != page:
            emptied = True
        elif emptied or seen() != was:
            st.rerun()
        show()
    st.fragment(tick, run_every=.3 if run.status() in ("running", "stalled") else None)()


def bookmarks(run: Run) -> dict[str, dict]:
    "Return the bookmarks of a run; show a warning where they cannot be read."
    try:
        return read_bookmarks(run.path)
    except RunError as e:
        st.warning(plain(str(e)), icon=":material/bookmark_remove:")
        return {}


def bookmark_button(run: Run, id: str, view=lambda: ""):
    "Show a form to bookmark a trajectory with a note, or to remove the bookmark; `view` returns the query of the current view."
    kept = bookmarks(run)

    def keep(note):
        try:
            bookmark(run.path, id, note, view())
        except RunError as e:
            st.session_state["bookmark trouble"] = str(e)
    with st.popover("Bookmarked" if id in kept else "Bookmark", icon=":material/bookmark_added:" if id in kept else ":material/bookmark_add:"):
        key = f"note of {id}"
        st.text_area("Note, kept in the run folder", kept.get(id, {}).get("note", ""), key=key)
        with st.container(horizontal=True):
            st.button("Save", key=f"keep {id}", type="primary", on_click=lambda: keep(st.session_state[key]))
            if id in kept:
                st.button("Remove", key=f"remove {id}", on_click=lambda: keep(None))
    if trouble := st.session_state.pop("bookmark trouble", None):
        st.warning(plain(trouble), icon=":material/bookmark_remove:")
