"""Compare several runs: their curves, the settings in which they differ, and one prompt through all steps."""
import os
import re
from pathlib import Path

import streamlit as st

from tirlab.traces.annotations import config_diff
from tirlab.app.common import NOTHING_YET, chosen_run, go_to, open_cached, plain, ready, run_name, run_paths, stop, current_run, watch
from tirlab.plots.bands import bands, seed_groups
from tirlab.plots.runs import compare, task_rewards
from tirlab.traces.run import RunError

METRICS = {"reward": "Reward", "entropy": "Entropy, nats a token", "grad_norm": "Gradient norm", "rollout/turns": "Turns a rollout", "probe/void_rate": "Void turns",
           "tools/call_frequency": "Calls a trajectory", "tools/failure_frequency": "Failed calls", "completions/mean_length": "Tokens a completion"}
SIBLINGS, TASKS = 40, 300   # folders beside the run, tasks to choose from: at most

run = current_run()
watch(run, lambda: None)


@st.cache_data(ttl=20, show_spinner=False)
def beside(path: str) -> dict[str, str]:
    "Return name -> folder of the runs in the folder above, the newest first."
    here = Path(path).resolve()
    lone = run_name(here) != here.name   # a run named by date in an output folder of its own: the others are in the folders beside that
    found = [*here.parent.glob("*/meta.json"), *(here.parent.parent.glob("*/run-*/meta.json") if lone else ())]
    newest = sorted(dict.fromkeys(found), key=lambda p: -p.stat().st_mtime)[:SIBLINGS]
    return {run_name(p.parent): str(p.parent) for p in newest if p.parent != here}


def opened() -> dict:
    "Return name -> run of the chosen runs; the current one is always among them."
    known = {chosen_run(): str(run.path)} | run_paths() | {k: v for k, v in beside(str(run.path)).items() if v not in run_paths().values()}
    others = [name for name in known if name != chosen_run()]
    started = [name for name in run_paths() if name != chosen_run()]
    chosen = st.multiselect("Compared with", others, default=started, key="with", bind="query-params", placeholder="choose runs",
                            help="The runs this app was started for, and those in the same folder") if others else []
    runs = {}
    for name in [chosen_run(), *chosen]:
        try:
            runs[name] = open_cached(known[name])
            runs[name].meta()
        except RunError as e:
            runs.pop(name, None)
            st.caption(plain(str(e)))
    if not others:
        st.caption("There is no other run in the folder above; start the app with several: `tirlab app RUN RUN`.")
    return runs


def group_name(names: list[str]) -> str:
    "Return what the names of the runs of a group have in common; the first where that is nothing."
    if len(names) == 1:
        return names[0]
    common = re.sub(r"[-_ /.]*(seed)?[-_ /.]*$", "", os.path.commonprefix(names))
    return common or names[0]


def curves(runs):
    "Show the metrics of all runs."
    logged = {name: r.metrics() for name, r in runs.items()}
    names = sorted({c for m in logged.values() for c in m if c not in ("step", "time", "split") and m[c].notna().any()})
    if not names:
        st.info("None of these runs has logged anything yet.", icon=":material/hourglass_empty:")
        return
    usual = [m for m in METRICS if m in names][:4] or names[:2]
    chosen = st.multiselect("Metrics", names, default=usual, key="metrics", bind="query-params") or usual
    panels, groups = {m: METRICS.get(m, m) for m in chosen}, seed_groups({name: r.meta() for name, r in runs.items()})
    several = any(len(g) > 1 for g in groups)
    together = several and st.toggle("One band for the seeds of a setting", value=True, key="bands", bind="query-params",
                                     help="Runs that differ in nothing but their seed become one line, their mean, with a band from the smallest to the largest")
    figure = bands({group_name(g): [logged[n] for n in g] for g in groups}, panels) if together else compare(logged, panels)
    st.plotly_chart(figure, config={"displayModeBar": False}, key="curves", alt="Metrics of several runs")


def differences(runs):
    "Show the settings in which the runs differ."
    if len(runs) < 2:
        return
    table = config_diff({name: r.meta() for name, r in runs.items()})
    label = f"{len(table)} setting{'s' * (len(table) != 1)} differ{'s' * (len(table) == 1)}" if len(table) else "The same settings"
    with st.expander(label, icon=":material/difference:", expanded=0 < len(table) <= 12):
        if len(table):
            st.dataframe(table, width="stretch", height=min(38 + 35 * len(table), 430), column_config={"_index": st.column_config.TextColumn("Setting", width=260)})
        else:
            st.caption("Model, settings and versions are equal; the runs differ by chance, or by the code.")


@st.cache_data(max_entries=8, show_spinner=False)
def tasks_of(path: str, size: int, _index) -> dict[str, str]:
    "Return task -> its prompt, for tasks of at least two steps, the most frequent first."
    known = _index[_index.task.notna()]
    by = known.groupby("task", sort=False).agg(steps=("step", "nunique"), prompt=("prompt", "first"))
    by = by[by.steps > 1].sort_values("steps", ascending=False, kind="stable").head(TASKS)
    return {task: f"{prompt}  ({steps} steps)" for task, steps, prompt in by.itertuples()}


def one_prompt(runs):
    "Show the rewards of one prompt through training."
    indices = {name: r.index() for name, r in runs.items()}
    tasks = {}
    for name, index in indices.items():
        tasks = tasks | tasks_of(str(runs[name].path), len(index), index)
    st.markdown("##### One prompt through all steps")
    if (asked := st.query_params.get("task")) and asked not in tasks:   # a link to a prompt of a single step
        tasks = tasks | {asked: asked}
    if not tasks:
        st.caption("No prompt came back in a later step yet, or the tasks of this run have no names.")
        return
    task = st.selectbox("Prompt", list(tasks), format_func=tasks.get, key="task", bind="query-params", label_visibility="collapsed")
    rows = {name: index[index.task == task] for name, index in indices.items()}
    st.plotly_chart(task_rewards(rows), config={"displayModeBar": False}, key="task rewards", alt="Rewards of one prompt by step")
    first = rows[chosen_run()] if chosen_run() in rows else next(iter(rows.values()))
    shown = first.sort_values(["step", "id"], ignore_index=True)[["step", "reward", "last_turn", "stop", "turns", "calls", "origin", "id"]]
    st.caption(f"Its {len(shown)} rollouts in {plain(chosen_run())}. Click a row to open it.")
    event = st.dataframe(shown, hide_index=True, height=min(38 + 35 * len(shown), 320), on_select="rerun", selection_mode="single-cell", key="task table",
                         column_config={"last_turn": st.column_config.TextColumn("Last turn", width=420), "reward": st.column_config.NumberColumn("Reward", format="%.2f")})
    if (cells := event.selection.cells) and cells[0][0] < len(shown):
        go_to("trajectory", id=shown.id.iloc[cells[0][0]])


runs = opened()
if not runs:
    stop(NOTHING_YET, ":material/hourglass_empty:")
curves(runs)
differences(runs)
one_prompt(runs)
ready("compare", runs=len(runs))
