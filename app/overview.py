"""How the run is doing: status, last numbers, curves, and how trajectories end. Follows a run that is going on."""
from pathlib import Path

import streamlit as st

from tirlab.app.common import badge, plain, span, the_run
from tirlab.plots import outcomes, training_curves

TILES = {   # metric -> title, format, what it is
    "reward": ("Reward", "%.3f", "Mean over the trajectories of the step"),
    "tools/call_frequency": ("Calls a trajectory", "%.2f", "Tool calls, mean over the trajectories of the step"),
    "tools/failure_frequency": ("Failed calls", "percent", "Share of the tool calls of the step that failed"),
    "entropy": ("Entropy", "%.3f", "Of the next-token distribution, mean over tokens, in nats"),
    "completions/mean_length": ("Tokens", "%.0f", "Length of a completion, mean over the trajectories of the step"),
}
CHART = {"displayModeBar": False}

run = the_run()
meta = run.meta()
model = str(meta.get("model") or "unknown model")
st.subheader(plain(run.path.resolve().name), anchor=False)
st.caption(plain(f"{Path(model).name if Path(model).is_absolute() else model} · {run.path.resolve()}"))


def tiles(metrics):
    "The last value of each number, how it changed over the last tenth of the run, and its course."
    train = metrics[metrics.split == "train"]
    shown = [name for name in TILES if name in train and train[name].notna().any()]
    for column, name in zip(st.columns(max(len(shown), 1)), shown):
        title, form, what = TILES[name]
        values = train[name].dropna()
        before = values.iloc[-1 - max(len(values) // 10, 1)] if len(values) > 1 else None
        change = None if before is None else round(float(values.iloc[-1] - before), 0 if form == "%.0f" else 4) + 0.0   # no -0
        column.metric(title, float(values.iloc[-1]), change, format=form, delta_color="off", border=True, help=what,
                      chart_data=values.tail(200).tolist() if len(values) > 1 else None)


def live():
    "Everything that changes while the run goes on."
    status, now = badge(run), run.meta()
    if now.get("error"):
        st.error(plain(str(now["error"])), icon=":material/error:")
    elif status == "interrupted":
        st.caption(f"Stopped at step {now.get('step', 0)} before it was done. What it wrote until then is here.")
    elif status == "stalled":
        st.caption("It says that it is running, but has not been heard of for a while: a very long step, or its process died.")
    metrics, index = run.metrics(), run.index()
    if metrics.empty and index.empty:
        st.info("Nothing was logged yet. This page fills by itself as soon as the first step is done.", icon=":material/hourglass_empty:")
    else:
        tiles(metrics)
        left, right = st.columns([3, 2], gap="large")
        left.plotly_chart(training_curves(metrics), config=CHART, key="curves")
        right.markdown("**How trajectories end**")
        right.plotly_chart(outcomes(index[index.split == "train"]), config=CHART, key="outcomes")
        right.caption(f"{len(index):,} trajectories · {int(index.calls.sum()):,} tool calls, {int(index.failed_calls.sum()):,} of them failed"
                      f" · {int(index.tokens.sum()):,} tokens · ran for {span(now.get('heartbeat', 0) - now.get('created', 0))}")
        if run.skipped:
            right.caption(f"{run.skipped} damaged or foreign lines were left out.")
    if status != st.session_state.setdefault("status", status):   # it ended, or came back: tick accordingly
        st.session_state.status = status
        st.rerun()


ticking = run.status() in ("running", "stalled")
st.fragment(live, run_every=1.0 if ticking else None)()

with st.expander("Configuration and versions", icon=":material/tune:"):
    left, right = st.columns(2)
    left.json(meta.get("config") or {}, expanded=1)
    right.json({k: v for k, v in meta.items() if k != "config"}, expanded=1)
