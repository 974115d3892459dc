"""Show a run at a glance: status, last numbers, alarms, and nine panels over the steps. The page follows a live run; a click opens the step."""
from pathlib import Path

import streamlit as st

from tirlab.traces.annotations import read_alarms, sft_rounds
from tirlab.app.common import badge, go_to, link, link_trajectory, plain, ready, run_name, run_paths, span, current_run, watch
from tirlab.plots.runs import overview

TILES = {   # metric -> title, format, what it is
    "reward": ("Reward", "%.3f", "Mean over the trajectories of the step"),
    "positive": ("Success", "percent", "Share of the trajectories of the step with a reward above 0"),
    "tools/call_frequency": ("Calls a trajectory", "%.2f", "Tool calls, mean over the trajectories of the step"),
    "tools/failure_frequency": ("Failed calls", "percent", "Share of the tool calls of the step that failed"),
    "probe/void_rate": ("Void turns", "percent", "Share of the turns of the step that neither call nor answer"),
    "entropy": ("Entropy", "%.3f", "Of the next-token distribution, mean over tokens, in nats"),
    "completions/mean_length": ("Tokens", "%.0f", "Length of a completion, mean over the trajectories of the step"),
}
SHOWN = 3   # alarms that are shown at once

run = current_run()


def seen():
    "Return what the page depends on; it is redrawn when that changes."
    follow = st.session_state.get("follow", True)
    return run.status(), run.meta().get("warning"), *((len(run.metrics()), len(run.steps())) if follow else ()), follow


def head():
    "Show the name and the status of the run."
    meta = run.meta()
    model, name = str(meta.get("model") or "unknown model"), run_name(run.path.resolve())
    if len(run_paths()) < 2:   # with several, the box above names it
        st.subheader(plain(name), anchor=False)
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        status = badge(run)
        st.caption(plain(f"{Path(model).name if Path(model).is_absolute() else model} · {run.path.resolve()}"), width="content")
    if meta.get("error"):
        st.error(plain(str(meta["error"])), icon=":material/error:")
    elif meta.get("warning"):
        st.warning(plain(str(meta["warning"])), icon=":material/warning:")
    elif status == "interrupted":
        st.caption(f"Stopped at step {meta.get('step', 0)} before it was finished. The page shows what it had written by then.")
    elif status == "stalled":
        st.caption("The last heartbeat is some time ago: either the step is very long, or the process has died.")


watch(run, seen, head)
meta = run.meta()
ticking = run.status() in ("running", "stalled")


def tiles(metrics, steps):
    "Show the last value of each number, and its change over the last tenth of the run."
    train = metrics[metrics.split == "train"]
    if len(steps):
        train = train.merge(steps.loc[steps.split == "train", ["step", "positive"]], on="step", how="outer") if len(train) else steps
    shown = [name for name in TILES if name in train and train[name].notna().any()]
    for column, name in zip(st.columns(max(len(shown), 1), gap="small"), shown):
        title, form, what = TILES[name]
        values = train[name].dropna()
        before = values.iloc[-1 - max(len(values) // 10, 1)] if len(values) > 1 else None
        change = None if before is None else round(float(values.iloc[-1] - before), 0 if form == "%.0f" else 4) + 0.0   # no -0
        column.metric(title, float(values.iloc[-1]), change, format=form, delta_color="off", border=True, help=what)


def alarm_line(alarm):
    "Show one alarm, with links to the trajectories that caused it."
    digits = lambda v: "?" if v is None else f"{v:.3g}"
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.markdown(f"**Step {alarm['step']}:** `{alarm['signal'].replace('`', '')}` is {digits(alarm['value'])}, usually {digits(alarm['usual'])}", width="content")
        link("steps", "Open step", icon=":material/stacks:", step=alarm["step"])
        for c in alarm["culprits"][:3]:
            link_trajectory(c["id"], f"{c['id']}, token {c['position'] + 1}", token=c["position"])


def banner(alarms):
    "Show the newest alarms; fold the others."
    if not alarms:
        return
    with st.container(border=True, key="alarms"):
        st.markdown(f":orange-badge[:material/warning: {len(alarms)} alarm{'s' * (len(alarms) > 1)}] A signal left its usual range; the trajectories that caused it are linked.")
        for alarm in alarms[:-SHOWN - 1:-1]:
            alarm_line(alarm)
        if len(alarms) > SHOWN:
            with st.expander(f"{len(alarms) - SHOWN} earlier", icon=":material/history:"):
                for alarm in alarms[-SHOWN - 1:-SHOWN - 26:-1]:
                    alarm_line(alarm)


def totals(steps, now):
    "Show the totals of the run."
    counts = {name: int(steps[name].sum()) for name in ("trajectories", "calls", "failed_calls", "tokens")}
    total = (f"{counts['trajectories']:,} trajectories · {counts['calls']:,} tool calls, {counts['failed_calls']:,} of them failed · {counts['tokens']:,} tokens"
             f" · ran for {span(now.get('heartbeat', 0) - now.get('created', 0))}")
    st.caption(total + (f" · {run.skipped} damaged or foreign lines were skipped." if run.skipped else ""))


def chosen(event) -> int | None:
    "Return the step that was clicked."
    points = event.selection.points if event else []
    return round(points[0]["x"]) if points and isinstance(points[0].get("x"), (int, float)) else None


@st.cache_resource(max_entries=8, show_spinner=False)
def panels(path: str, size: tuple, _metrics, _steps, _alarms):
    "Return the figure, made once for the same data."
    return overview(_metrics, _steps, sft_rounds(_metrics), _alarms).update_layout(uirevision="run")


def main():
    metrics, steps, alarms = run.metrics(), run.steps(), read_alarms(run.path)
    if metrics.empty and steps.empty:
        st.info("Nothing was logged yet. This page fills itself as soon as the first step is done.", icon=":material/hourglass_empty:")
        return
    if ticking and not st.session_state.get("follow", True):   # stay at the step at which following was switched off
        until = st.session_state.setdefault("frozen at", max(metrics.step.max(), steps.step.max()) if len(steps) else metrics.step.max())
        metrics, steps = metrics[metrics.step <= until], steps[steps.step <= until]
    else:
        st.session_state.pop("frozen at", None)
    banner(alarms)
    tiles(metrics, steps)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.caption("Click a line to open its step. Grey: every other round of RL. Narrow band: supervised training. Dotted: an alarm.", width="content")
        if ticking:
            st.toggle("Follow live", True, key="follow", persist_state="session", help="Off: the panels stay as they are while you read")
    size = meta.get("created"), len(metrics), len(steps), int(steps.trajectories.sum()), len(alarms)
    fig = panels(str(run.path), size, metrics, steps, alarms)
    event = st.plotly_chart(fig, config={"displayModeBar": False}, key="panels", on_select="rerun", selection_mode="points",
                            alt="Nine panels of the run over its steps")
    if (step := chosen(event)) is not None:
        go_to("steps", step=step)
    totals(steps, meta)


main()
with st.expander("Configuration and versions", icon=":material/settings:"):
    left, right = st.columns(2)
    left.json(meta.get("config") or {}, expanded=1)
    right.json({k: v for k, v in meta.items() if k != "config"}, expanded=1)
ready("overview", step=meta.get("step", 0), trajectories=int(run.steps().trajectories.sum()))
