"""What the pages share: the run, its status as a badge, and one way of saying that something is missing."""
import sys
import time

import streamlit as st

from tirlab.traces import Run, RunError, open_run

STATUS = {   # status -> icon, colour, what it means
    "running": (":material/play_circle:", "green", "running"),
    "finished": (":material/check_circle:", "blue", "finished"),
    "interrupted": (":material/stop_circle:", "orange", "interrupted"),
    "failed": (":material/error:", "red", "failed"),
    "stalled": (":material/hourglass_disabled:", "orange", "no sign of life"),
}


@st.cache_resource(max_entries=8, show_spinner=False)
def _open(path: str) -> Run:
    return open_run(path)


def the_run() -> Run:
    "The run this app was started for. Stops the page with a plain sentence if there is none."
    try:
        if len(sys.argv) < 2:
            raise RunError("No run folder was given: start the app with `tirlab app RUN`.")
        run = _open(sys.argv[1])
        run.meta()
    except RunError as e:
        _open.clear()
        stop(str(e), ":material/folder_off:")
    return run


def stop(text: str, icon: str = ":material/info:"):
    "Say one sentence and end the page."
    st.info(plain(text), icon=icon)
    st.stop()


def plain(text: str) -> str:
    "Text that Markdown shows as it is."
    return "".join(f"\\{c}" if c in r"\`*_{}[]()#+-.!|~<>$:&" else c for c in text)


def span(seconds: float) -> str:
    "A span of time in words: 5 s, 3 min, 2 h, 4 days."
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def badge(run: Run) -> str:
    "Show how the run is, and return its status."
    meta, status = run.meta(), run.status()
    icon, color, words = STATUS.get(status, (":material/help:", "gray", status))
    beat = meta.get("heartbeat", meta.get("created", 0))
    heard = "last sign of life" if status in ("running", "stalled") else "ended"
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.badge(words, icon=icon, color=color)
        st.caption(f"step {meta.get('step', 0)} · {heard} {span(time.time() - beat)} ago", width="content")
    return status
