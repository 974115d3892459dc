"""One trajectory, turn by turn, its tokens coloured by a metric."""
import streamlit as st

from tirlab.app.common import plain, stop, the_run
from tirlab.plots import SCALES, has_metric, token_html
from tirlab.traces import RunError

LABELS = {"logprob": "Log-probability", "entropy": "Entropy", "advantage": "Advantage", "mismatch": "Trainer − sampler"}
GOOD_STOPS = ("answer",)

run = the_run()
index = run.index().sort_values(["step", "split", "group", "id"], ignore_index=True)
if index.empty:
    stop("No trajectory was written yet. They appear here as soon as the first step is done.", ":material/hourglass_empty:")
chosen = st.query_params.get("id") or index.id.iloc[-1]
try:
    row = run.trajectory(chosen)
except RunError as e:
    stop(str(e), ":material/link_off:")
here = int(index.index[index.id == chosen][0])


def show(name: str):
    "Turn to another trajectory; the address of the page goes along."
    st.query_params["id"] = name


def go(label: str, icon: str, to: int, side: str = "left"):
    "A button that turns to the trajectory at a place in the list."
    there = index.id.iloc[to:to + 1].tolist() if to >= 0 else []
    st.button(label, icon=icon, icon_position=side, disabled=not there, on_click=show, args=there, key=label)


def siblings():
    "The other trajectories of the same prompt, with what each earned."
    group = index[(index.step == row.step) & (index.split == row.split) & (index.group == row.group)].reset_index(drop=True)
    if len(group) < 2:
        return
    rewards = group.reward.map(lambda r: "–" if r != r else f"{r:g}")
    names = {name: f"#{k}: {reward}" for k, (name, reward) in enumerate(zip(group.id, rewards), 1)}   # no two alike, as the widget needs
    key = f"same prompt as {chosen}"
    st.segmented_control("Same prompt, with reward", list(names), default=chosen, format_func=names.get, key=key, required=True,
                         on_change=lambda: show(st.session_state[key]))


def header():
    "Where it comes from, what it earned and how it ended."
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.subheader(plain(row.id), anchor=False, width="content")
        if row.reward is not None:
            best = row.reward > 0 and row.reward == index.reward.max()
            st.badge(f"reward {row.reward:g}", icon=":material/star:", color="green" if best else "gray")
        st.badge(plain(row.stop or "unknown stop"), icon=":material/flag:", color="blue" if row.stop in GOOD_STOPS else "orange")
        if row.failed_calls:
            st.badge(f"{row.failed_calls} of {row.calls} calls failed", icon=":material/build:", color="red")
        elif row.calls:
            st.badge(f"{row.calls} call{'s' * (row.calls > 1)}", icon=":material/build:", color="gray")
        for name, usual in (("split", "train"), ("origin", "sampled"), ("phase", "rl"), ("dropped", None)):
            if getattr(row, name) != usual:
                st.badge(plain(getattr(row, name)), color="violet")
    parts = [row.environment] * bool(row.environment) + [f"step {row.step}", f"group {row.group}"]
    parts += [f"{int(row.mask.sum())} tokens written, {len(row.ids)} in all", f"tools took {row.tool_seconds:.2f} s"]
    parts += [f"{name} {value + 0.0:g}" for name, value in row.rewards.items() if value is not None]
    st.caption(plain(" · ".join(parts)))


with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
    go("Previous", ":material/arrow_back:", here - 1)
    st.page_link("trajectories.py", label=f"{here + 1:,} of {len(index):,}", icon=":material/list:")
    go("Next", ":material/arrow_forward:", here + 1, "right")
header()
line = index.iloc[here]
reference = f"  \n**Reference:** {plain(row.answer)}" if row.answer is not None else ""
st.markdown(f"**Asked:** {plain(str(line.prompt))}{reference}")

with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
    metrics = [name for name in SCALES if has_metric(row, name)]
    metric = st.segmented_control("Colour tokens by", metrics, default=metrics[0], format_func=LABELS.get, key="metric", required=True,
                                  persist_state="session") if metrics else "logprob"
    siblings()
if not metrics:
    st.caption("No number was stored for the tokens of this trajectory.")
st.html(token_html(row, metric, tuple(run.meta().get("control_tokens") or ())))
