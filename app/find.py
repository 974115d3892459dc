"""Search the whole text of a run while the reader watches: places appear as they are found, and a button stops it."""
import time
from dataclasses import dataclass, field
from typing import Iterator
from urllib.parse import urlencode

import pandas as pd
import streamlit as st

from tirlab.app.common import go_to, link, params, plain, ready, stop
from tirlab.traces.run import Run
from tirlab.traces.search import Hit, Searched, places, search_parts

WHERE = {"anywhere": "any", "prompt": "prompt", "model": "model", "tool output": "observation", "beginnings, id, task": "index"}   # shown, and in the address -> whose text; the last is in memory
TICK, EVERY = .25, 2.0   # seconds of reading between two drawings of the bar, of the table
MOST = 1000     # places that are kept and sent to the browser
COLUMNS = {
    "step": st.column_config.NumberColumn("Step", format="%d", width=60),
    "reward": st.column_config.NumberColumn("Reward", format="%.2f", width=70),
    "place": st.column_config.TextColumn("Place", width=150),
    "found": st.column_config.TextColumn("Found", width=620, help="The match stands between ⟦ and ⟧"),
    "prompt": st.column_config.TextColumn("Prompt", width=230),
    "stop": st.column_config.TextColumn("Stop", width=90, help="Why the rollout ended"),
    "link": st.column_config.LinkColumn("Link", width=130, display_text=r"id=([^&]*)", help="Opens the trajectory at the turn, in a new tab"),
}


@dataclass
class Job:
    "A search, kept while the reader clicks about: the page is run again at each click, and the search goes on where it was."
    key: tuple                 # what is searched for, and where
    facts: pd.DataFrame        # rows of the index, by id: prompt and stop of what is searched
    parts: Iterator[Searched]
    seen: int                  # trajectories in the run when it began
    hits: list[Hit] = field(default_factory=list)   # the first MOST
    places: int = 0            # found, kept or not
    done: int = 0              # trajectories searched
    lost: list[str] = field(default_factory=list)   # files that cannot be read
    stopped: bool = False      # by the reader
    over: bool = False
    shown: int = 0             # hits in the table
    version: int = 0           # of the table

    def go_on(self, seconds: float):
        "Read on for some time, one part at least."
        end = time.monotonic() + seconds
        while not self.over:
            part = next(self.parts, None)
            self.over = part is None
            if part is not None:
                self.done, self.places = self.done + part.trajectories, self.places + len(part.hits)
                self.hits += part.hits[:MOST - len(self.hits)]
                self.lost += [part.unreadable] * bool(part.unreadable)
            if time.monotonic() >= end:
                return


def job_of(run: Run, index: pd.DataFrame, text: str, where: str, query: dict) -> Job:
    "Return the search that the filters ask for: the one that is under way, or a new one. Raises: ValueError for an invalid expression."
    key = (str(run.path), text, where, repr(sorted(query.items())))
    job = st.session_state.get("search job")
    if job is None or job.key != key:
        rows = index[["id", "step", "reward", "file", "row", "prompt", "stop"]].take(places(index, **query))
        job = Job(key, rows.set_index("id")[["prompt", "stop"]], search_parts(run, text, WHERE[where], regex=True, rows=rows), len(index))
        st.session_state["search job"] = job
    return job


def link_last_search(run: Run):
    "Show a link to the last search of this run, whose places are still known."
    job = st.session_state.get("search job")
    if job is not None and job.key[0] == str(run.path):
        link("trajectories", f"Last search: {job.key[1]}", icon=":material/history:", text=job.key[1], where=job.key[2])


def place(hit: Hit) -> dict:
    "Return the query that opens a trajectory at a place; a prompt has no turn."
    return {"id": hit.id} | ({} if hit.turn is None else {"turn": hit.turn + 1, "token": hit.token})


def line(hit: Hit, prompt: str, stop: str) -> dict:
    "Return a place as a row of the table."
    of = "prompt" if hit.turn is None else f"turn {hit.turn + 1}, {'model' if hit.where == 'model' else 'tool output'}"
    return {"step": hit.step, "reward": hit.reward, "place": of, "found": " ".join(f"{hit.before}⟦{hit.match}⟧{hit.after}".split()), "prompt": prompt, "stop": stop,
            "link": f"trajectory?{urlencode(params(**place(hit)))}"}


def table(job: Job, box):
    "Show the places in the table, and open the one that was clicked. Each version of the table has a key of its own, as one run of the page may draw several."
    hits = job.hits[:job.shown]
    facts = job.facts.loc[[h.id for h in hits]]
    lines = [line(*of) for of in zip(hits, facts.prompt, facts.stop)]
    event = box.dataframe(pd.DataFrame(lines, columns=list(COLUMNS)), column_config=COLUMNS, hide_index=True, height=640, on_select="rerun", selection_mode="single-cell",
                          key=f"found {job.version}")
    cells = event.selection.cells
    if cells and cells[0][0] < len(hits) and cells[0][1] != "link":
        job.version += 1   # nothing is chosen when the reader comes back
        go_to("trajectory", **place(hits[cells[0][0]]))


def share(job: Job) -> float:
    "Return the part of the search that is done."
    return min(job.done / max(len(job.facts), 1), 1.0)


def status(job: Job) -> str:
    "Return how far the search is."
    found = f"{job.places:,} place{'s' * (job.places != 1)}; {job.done:,} of {len(job.facts):,} trajectories searched"
    return found + f"; the first {MOST:,} places are shown" * (job.places > MOST)


def stop_button(job: Job):
    "Show the button that stops the search, or lets it go on."
    if job.stopped:
        st.button("Go on", key="go on", icon=":material/play_arrow:", on_click=lambda: setattr(job, "stopped", False))
    else:
        st.button("Stop", key="stop search", icon=":material/stop:", on_click=lambda: setattr(job, "stopped", True))


def show_found(run: Run, index: pd.DataFrame, text: str, where: str, query: dict):
    "Show what is found in the whole text of the trajectories that the filters leave, while it is searched."
    try:
        job = job_of(run, index, text, where, query)
    except ValueError as e:
        stop(str(e), ":material/regular_expression:")
    head, box = st.empty(), st.empty()
    drawn = time.monotonic() if job.shown else 0.0
    if job.shown:
        table(job, box)
    if not job.over:
        with head.container(horizontal=True, vertical_alignment="center", gap="medium"):
            bar = st.progress(share(job), status(job), width=560)
            stop_button(job)
        while not (job.over or job.stopped):   # a click ends the run of the page at the next drawing, and the search is kept
            job.go_on(TICK)
            bar.progress(share(job), status(job))
            if len(job.hits) > job.shown and (job.over or time.monotonic() - drawn > EVERY):
                job.shown, job.version, drawn = len(job.hits), job.version + 1, time.monotonic()
                table(job, box)
    if job.over:
        head.caption(f"{status(job)}. Click a row to open the trajectory at its turn." if job.hits else status(job), width="content")
    if job.over and not job.hits:
        box.info("No trajectory matches these filters.", icon=":material/filter_alt_off:")
    if job.lost:
        st.caption(plain(f"Not searched, because they cannot be read: {', '.join(job.lost[:3])}" + f" and {len(job.lost) - 3:,} more files" * (len(job.lost) > 3)))
    if (more := len(run.index()) - job.seen) > 0:
        st.button(f"Search {more:,} new trajectories, too", key="search again", icon=":material/refresh:", on_click=lambda: st.session_state.pop("search job", None))
    ready("trajectories", shown=job.places, searched=job.done, over=str(job.over).lower())
