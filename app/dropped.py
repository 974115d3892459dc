"""What was sampled and not learnt from, wholly or in part, and why."""
import numpy as np
import pandas as pd
import streamlit as st

from tirlab.app.common import NOTHING_YET, go_to, ready, stop, the_run, watch
from tirlab.plots.runs import left_out, reason_kinds

COLUMNS = {
    "step": st.column_config.NumberColumn("Step", format="%d", width=60),
    "group": st.column_config.NumberColumn("Group", format="%d", width=60, help="Trajectories of one prompt share it"),
    "dropped": st.column_config.TextColumn("Reason", width=260),
    "reward": st.column_config.NumberColumn("Reward", format="%.2f", width=70),
    "prompt": st.column_config.TextColumn("Prompt", width=300),
    "last_turn": st.column_config.TextColumn("Last turn", width=300),
    "stop": st.column_config.TextColumn("Stop", width=90, help="Why it ended"),
    "turns": st.column_config.NumberColumn("Turns", format="%d", width=60),
    "id": st.column_config.TextColumn("Id", width=125),
}
MOST = 1000   # rows that are sent to the browser

run = the_run()
watch(run, lambda: len(run.steps()))
index, steps = run.index(), run.steps()
if index.empty:
    stop(NOTHING_YET, ":material/hourglass_empty:")
lost = index[index.dropped.notna()]
if lost.empty:
    ready("dropped", shown=0)
    stop("Nothing was left out of the loss: every trajectory of this run was learnt from.", ":material/check_circle:")

kinds = lost.dropped.map(dict((r, reason_kinds(r)) for r in lost.dropped.unique()))
counts = pd.Series([k for ks in kinds for k in ks]).value_counts()
st.caption(f"{len(lost):,} of {len(index):,} trajectories were left out of the loss, wholly or in part. One may have several reasons.")
st.plotly_chart(left_out(steps), config={"displayModeBar": False}, key="reasons", alt="Dropped rollouts of each step, by reason")
labels = {k: f"{k} ({n:,})" for k, n in counts.items()}
chosen = st.pills("Reasons", list(labels), selection_mode="multi", format_func=labels.get, key="reason", bind="query-params", label_visibility="collapsed")
shown = lost[[any(k in chosen for k in ks) for ks in kinds]] if chosen else lost
shown = shown.iloc[np.argsort(-shown.step.to_numpy(), kind="stable")].reset_index(drop=True)
page = shown.head(MOST)
st.caption(f"{len(shown):,} trajectories" + f", the newest {MOST:,} are shown" * (len(shown) > MOST) + ". Click a row to open it.")
event = st.dataframe(page[list(COLUMNS)], column_config=COLUMNS, hide_index=True, height=520, on_select="rerun", selection_mode="single-cell", key="dropped table")
if (cells := event.selection.cells) and cells[0][0] < len(page):
    go_to("trajectory", id=page.id.iloc[cells[0][0]])
ready("dropped", shown=len(shown))
