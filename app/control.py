"""Show control tokens over training: how likely each was where it belongs and where it does not, and its spikes."""
import streamlit as st

from tirlab.traces.annotations import read_alarms, sft_rounds
from tirlab.app.common import NOTHING_YET, go_to, ready, stop, current_run, watch
from tirlab.plots.runs import control_names, control_quantiles
from tirlab.traces.search import control_spikes

COLUMNS = {
    "step": st.column_config.NumberColumn("Step", format="%d", width=70),
    "token": st.column_config.TextColumn("Control token", width=160),
    "probability": st.column_config.ProgressColumn("Probability", format="%.3g", min_value=0, max_value=1, width=220),
    "position": st.column_config.NumberColumn("Token of the completion", format="%d", width=170, help="Counted from 0"),
    "id": st.column_config.TextColumn("Trajectory", width=160),
}

run = current_run()
watch(run, lambda: (len(run.metrics()), len(run.steps())))
meta, metrics, steps = run.meta(), run.metrics(), run.steps()
if metrics.empty and steps.empty:
    stop(NOTHING_YET, ":material/hourglass_empty:")


def quantiles():
    "Show the figure, with a choice of control tokens above it."
    if not (names := control_names(metrics)):
        st.info("Control tokens were not probed in this run: train with `probe='on'` to record how likely they were at every position.", icon=":material/tune:")
        return
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        chosen = st.pills("Control tokens", names, selection_mode="multi", default=names[:4], key="tokens", bind="query-params")
        log = st.toggle("Logarithmic", True, key="log", help="Collapse begins at a probability of a thousandth, which a linear axis does not show", bind="query-params")
    st.caption("Line: median over positions. Band: the middle four fifths. Dotted: the maximum.")
    fig = control_quantiles(metrics, chosen or names[:4], log, sft_rounds(metrics), read_alarms(run.path)).update_layout(uirevision=f"{chosen} {log}")
    st.plotly_chart(fig, config={"displayModeBar": False}, key="quantiles", alt="Quantiles of the probability of control tokens")


def spikes():
    "Show where a control token was likely and another token was written."
    tokens = [t for t in (meta.get("probed_tokens") or meta.get("control_tokens") or []) if isinstance(t, str)]
    found = control_spikes(steps, tokens, most=10_000)
    st.markdown("##### Spikes: a control token was likely, and another token was written")
    if found.empty:
        st.caption("No spikes were recorded: the run was written by an older tirlab, or control tokens were not probed.")
        return 0
    wanted = st.pills("Control token", sorted(found.token.unique()), selection_mode="multi", key="spike tokens", label_visibility="collapsed")
    shown = (found[found.token.isin(wanted)] if wanted else found).head(200).reset_index(drop=True)
    st.caption("The most probable first; three are kept for each step and control token. Click a row to open the trajectory at that token.")
    height = min(38 + 35 * len(shown), 420)
    event = st.dataframe(shown, column_config=COLUMNS, hide_index=True, height=height, on_select="rerun", selection_mode="single-cell", key="spikes")
    if (cells := event.selection.cells) and cells[0][0] < len(shown):
        line = shown.iloc[cells[0][0]]
        go_to("trajectory", id=line.id, metric=f"p:{line.token}", token=int(line.position))
    return len(found)


quantiles()
ready("control", spikes=spikes(), steps=len(steps))
