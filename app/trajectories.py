"""Search the trajectories of the run, and open one; all filters stand in the address. The bookmarks are here too."""
import time

import numpy as np
import streamlit as st

from tirlab.app.common import NOTHING_YET, bookmarks, go_to, link_trajectory, plain, ready, span, stop, current_run, watch
from tirlab.app.find import WHERE, link_last_search, show_found
from tirlab.plots.runs import STATES
from tirlab.traces.search import places

COLUMNS = {
    "step": st.column_config.NumberColumn("Step", format="%d", width=60),
    "group": st.column_config.NumberColumn("Group", format="%d", width=60, help="Trajectories of one prompt share it"),
    "reward": st.column_config.NumberColumn("Reward", format="%.2f", width=70),
    "prompt": st.column_config.TextColumn("Prompt", width=250),
    "last_turn": st.column_config.TextColumn("Last turn", width=260),
    "answer": st.column_config.TextColumn("Reference", width=90),
    "stop": st.column_config.TextColumn("Stop", width=90, help="Why it ended"),
    "turns": st.column_config.NumberColumn("Turns", format="%d", width=60),
    "calls": st.column_config.NumberColumn("Calls", format="%d", width=60),
    "failed_calls": st.column_config.NumberColumn("Failed", format="%d", width=60, help="Tool calls that failed"),
    "model_tokens": st.column_config.NumberColumn("Tokens", format="%d", width=65, help="Written by the model"),
    "mean_logprob": st.column_config.NumberColumn("Mean logprob", format="%.2f", width=100, help="Over what the model wrote, in nats"),
    "origin": st.column_config.TextColumn("Origin", width=90),
    "dropped": st.column_config.TextColumn("Dropped", width=120, help="Why it was dropped from the loss, or tokens of it masked"),
    "environment": st.column_config.TextColumn("Environment", width=110),
    "split": st.column_config.TextColumn("Split", width=60),
    "id": st.column_config.TextColumn("Id", width=115),
}
MOST = 500   # rows that are sent to the browser
BOUND = {"bind": "query-params"}

run = current_run()
watch(run, lambda: len(run.steps()) > 0)
index = run.index()
if index.empty:
    stop(NOTHING_YET, ":material/hourglass_empty:")


@st.cache_data(max_entries=8, show_spinner=False)
def choices(path: str, size: int, name: str) -> list:
    "Return the different values of a column."
    return sorted(str(v) for v in index[name].dropna().unique())


def words(name: str, label: str) -> list:
    "Show a filter on the values of a column; none chosen means any."
    options = choices(str(run.path), len(index), name)
    return st.multiselect(label, options, key=name, width=200, placeholder="all", **BOUND) if len(options) > 1 else []


def filters() -> dict:
    "Show the filters, and return them as arguments of `find`."
    first, last = int(index.step.min()), int(index.step.max())
    rewards, found = index.reward[np.isfinite(index.reward)], {}   # a slider has no place for infinity
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        found["text"] = st.text_input("Text", key="text", width=300, icon=":material/search:", placeholder="regular expression", **BOUND,
                                      help="In every turn of every trajectory that the other filters leave, newest step first")
        found["where"] = st.selectbox("In", list(WHERE), key="where", width=190, help="Whose text is searched; beginnings of prompt and last turn, the reference, the id and the task are in memory", **BOUND)
        if last > first:
            found["steps"] = st.slider("Steps", first, last, (first, last), key="steps", width=230, **BOUND)
        if rewards.nunique() > 1:
            low, high = float(rewards.min()), float(rewards.max())
            chosen = st.slider("Reward", low, high, (low, high), key="reward", width=180, **BOUND)
            found["reward"] = None if chosen == (low, high) else chosen
        for name, label in (("stop", "Stop"), ("split", "Split"), ("origin", "Origin"), ("environment", "Environment")):
            found[name] = words(name, label)
        found["kinds"] = st.multiselect("Turn kind", list(STATES), key="kinds", format_func=lambda k: k.replace("_", " "), width=200, placeholder="all", **BOUND)
        found["failed"] = st.toggle("Tool errors", key="failed", help="A tool call failed", **BOUND)
        found["dropped"] = st.toggle("Dropped or masked", key="dropped", help="Dropped from the loss, or tokens of it masked", **BOUND)
    return found


def show_bookmarks():
    "Show the bookmarks of the run."
    kept = bookmarks(run)
    if not kept:
        return
    with st.expander(f"{len(kept)} bookmark{'s' * (len(kept) > 1)}", icon=":material/bookmark:", key="bookmarks"):
        for id, mark in reversed(kept.items()):
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                view = dict(p.split("=", 1) for p in mark["view"].split("&") if "=" in p)
                link_trajectory(id, **{k: v for k, v in view.items() if k not in ("id", "run")})
                st.caption(plain(f"{mark['note'] or 'no note'} · {span(time.time() - mark['time'])} ago"), width="content")


@st.fragment(run_every=2.0 if run.status() in ("running", "stalled") else None)
def news(shown: int):
    "Offer the trajectories written since; the table itself does not change while somebody reads it."
    if (more := len(run.index()) - shown) > 0 and st.button(f"Show {more} new trajectories", icon=":material/refresh:", key="more"):
        st.rerun()


show_bookmarks()
query = filters()
text, where = query.pop("text"), query.pop("where")
if text and WHERE[where] != "index":
    show_found(run, index, text, where, query)
    st.stop()
link_last_search(run)
try:
    matching = places(index, text=text, **query)
except ValueError as e:
    stop(str(e), ":material/regular_expression:")
count, page = len(matching), index.take(matching[:MOST]).reset_index(drop=True)
with st.container(horizontal=True, vertical_alignment="center"):
    some = f", the newest {MOST:,} are shown" if count > MOST else ""
    st.caption(f"{count:,} of {len(index):,} trajectories{some}. Click a row to open it.", width="content")
    news(len(index))
if page.empty:
    ready("trajectories", shown=0)
    stop("No trajectory matches these filters.", ":material/filter_alt_off:")

several = {name for name in ("split", "environment", "origin") if len(choices(str(run.path), len(index), name)) > 1}
shown = [c for c in COLUMNS if c in page and page[c].notna().any() and (c not in ("split", "environment", "origin") or c in several)]
words_of = {c: page[c].fillna("") for c in ("dropped", "answer", "stop", "origin") if c in shown}   # an empty cell rather than "None"
event = st.dataframe(page[shown].assign(**words_of), column_order=shown, column_config=COLUMNS, hide_index=True, height=640, on_select="rerun",
                     selection_mode="single-cell", key="table")
cells = event.selection.cells
if cells and cells[0][0] < len(page):
    go_to("trajectory", id=page.id.iloc[cells[0][0]])
ready("trajectories", shown=count)
