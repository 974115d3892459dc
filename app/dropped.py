"""Show the trajectories that were dropped from the loss, or tokens of which were masked, with the reason."""
import numpy as np
import pandas as pd
import streamlit as st

from tirlab.app.common import NOTHING_YET, go_to, ready, stop, current_run, watch
from tirlab.plots.runs import dropped_rollouts, reason_kinds

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

run = current_run()
watch(run, lambda: len(run.steps()))
index, steps = run.index(), run.steps()
if index.empty:
    stop(NOTHING_YET, ":material/hourglass_empty:")
dropped = index[index.dropped.notna()]
if dropped.empty:
    ready("dropped", shown=0)
    stop("No trajectory was dropped or masked: all of them are in the loss.", ":material/check_circle:")

kinds = dropped.dropped.map({r: reason_kinds(r) for r in dropped.dropped.unique()})
counts = pd.Series([k for ks in kinds for k in ks]).value_counts()
st.caption(f"{len(dropped):,} of {len(index):,} trajectories were dropped from the loss, or tokens of them masked. One may have several reasons.")
st.plotly_chart(dropped_rollouts(steps), config={"displayModeBar": False}, key="reasons", alt="Dropped rollouts of each step, by reason")
labels = {k: f"{k} ({n:,})" for k, n in counts.items()}
chosen = st.pills("Reasons", list(labels), selection_mode="multi", format_func=labels.get, key="reason", bind="query-params", label_visibility="collapsed")
shown = dropped[[any(k in chosen for k in ks) for ks in kinds]] if chosen else dropped
shown = shown.iloc[np.argsort(-shown.step.to_numpy(), kind="stable")].reset_index(drop=True)
page = shown.head(MOST)
st.caption(f"{len(shown):,} trajectories" + f", the newest {MOST:,} are shown" * (len(shown) > MOST) + ". Click a row to open it.")
event = st.dataframe(page[list(COLUMNS)], column_config=COLUMNS, hide_index=True, height=520, on_select="rerun", selection_mode="single-cell",
                     key="dropped table")
if (cells := event.selection.cells) and cells[0][0] < len(page):
    go_to("trajectory", id=page.id.iloc[cells[0][0]])
ready("dropped", shown=len(shown))
