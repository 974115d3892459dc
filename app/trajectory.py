"""Show one trajectory, turn by turn: its origin, its rewards, and a map of its tokens or its messages."""
import numpy as np
import streamlit as st

from tirlab.app.common import NOTHING_YET, bookmark_button, current_run, link, plain, query_int, ready, stop, watch
from tirlab.app.messages import choice, messages
from tirlab.app.tokens import token_map
from tirlab.traces.rows import unit_of
from tirlab.traces.run import RunError

GOOD_STOPS = ("answer",)
ORIGINS = {   # origin of an off-policy rollout -> icon, what it means
    "hinted": (":material/lightbulb:", "Off-policy: sampled with a hint in the prompt, learnt without it"),
    "demonstration": (":material/school:", "Off-policy: not sampled from this policy, learnt by imitation"),
    "replay": (":material/replay:", "Off-policy: a rollout of an earlier step, replayed"),
    "reflection": (":material/psychology:", "Off-policy: written with an analysis of failed rollouts"),
}

run = current_run()
watch(run, lambda: len(run.steps()) > 0)
index = run.index()
if index.empty:
    stop(NOTHING_YET, ":material/hourglass_empty:")
order = np.argsort(index.step.to_numpy(), kind="stable")   # by step, and in a step as they were written
chosen = st.query_params.get("id") or index.id.iloc[order[-1]]
try:
    row = run.trajectory(chosen)
except RunError as e:
    stop(str(e), ":material/link_off:")
mine = np.flatnonzero((index.id == chosen).to_numpy())[0]
here = int(np.flatnonzero(order == mine)[0])


def show(name: str):
    "Open another trajectory, and keep the rest of the address."
    kept = {k: v for k, v in st.query_params.to_dict().items() if k not in ("turn", "token")}
    st.query_params.from_dict(kept | {"id": name})   # all at once: each change would add an entry to the browser's history


def go(label: str, icon: str, to: int, key: str, side: str = "left"):
    "Show a button that opens the trajectory at a place in the list."
    there = [index.id.iloc[order[to]]] if 0 <= to < len(order) else []
    st.button(label, icon=icon, icon_position=side, disabled=not there, on_click=show, args=there, key=label, shortcut=key)


def siblings():
    "Show the other trajectories of the same prompt, with their rewards."
    group = index[(index.step == row.step) & (index.split == row.split) & (index.group == row.group)].reset_index(drop=True)
    if len(group) < 2:
        return
    rewards = group.reward.map(lambda r: "–" if r != r else f"{r:g}")
    names = {name: f"#{k}: {reward}" for k, (name, reward) in enumerate(zip(group.id, rewards), 1)}   # no two alike, as the widget needs
    key = f"same prompt as {chosen}"
    st.caption("Same prompt:", width="content", help="The other rollouts of this prompt, with the reward of each")
    more = {"format_func": names.get, "key": key, "on_change": lambda: show(st.session_state[key]), "label_visibility": "collapsed"}
    if len(names) > 8:
        st.selectbox("Same prompt, with reward", list(names), index=list(names).index(chosen), width=130, **more)
    else:
        st.segmented_control("Same prompt, with reward", list(names), default=chosen, required=True, **more)


def badges():
    "Show reward, advantage, stop reason, origin and whether it was dropped as badges."
    if row.reward is not None:
        best = row.reward > 0 and row.reward == index.reward.max()
        st.badge(f"reward {row.reward:g}", icon=":material/star:", color="green" if best else "gray")
    known = [a for a in row.turn_advantages if a is not None and a == a]
    if known:
        width = f" to {max(known):+.2f}" * (max(known) - min(known) > .005)
        st.badge(f"advantage {min(known):+.2f}{width}".replace("-", "−"), icon=":material/trending_up:", color="gray")
    st.badge(plain(row.stop or "unknown stop"), icon=":material/flag:", color="blue" if row.stop in GOOD_STOPS else "orange")
    if row.failed_calls:
        st.badge(f"{row.failed_calls} of {row.calls} calls failed", icon=":material/build:", color="red")
    elif row.calls:
        st.badge(f"{row.calls} call{'s' * (row.calls > 1)}", icon=":material/build:", color="gray")
    for name, usual in (("split", "train"), ("phase", "rl")):
        if getattr(row, name) != usual:
            st.badge(plain(getattr(row, name)), color="violet")
    if row.origin != "sampled":
        icon, means = ORIGINS.get(row.origin, (None, None))
        st.badge(plain(row.origin), icon=icon, color="violet", help=means)
    if row.dropped:
        st.badge(f"dropped or masked: {plain(row.dropped)}", icon=":material/block:", color="red", help="It was dropped from the loss, or tokens of it were masked")
    if row.notes:
        with st.popover("Notes", icon=":material/notes:"):
            st.text(row.notes)
    if row.hint:
        with st.popover("Hint", icon=":material/lightbulb:"):
            st.text(row.hint)


def header():
    "Show the id, the badges and the facts of the trajectory."
    facts, turning = st.columns([7, 4], vertical_alignment="top")
    with facts, st.container(horizontal=True, vertical_alignment="center", gap="small"):
        st.subheader(plain(row.id), anchor=False, width="content")
        badges()
    with turning, st.container(horizontal=True, horizontal_alignment="right", vertical_alignment="center", gap="small"):
        go("Previous", ":material/arrow_back:", here - 1, "Shift+H")
        st.caption(f"{here + 1:,} of {len(index):,}", width="content")
        go("Next", ":material/arrow_forward:", here + 1, "Shift+L", "right")
    parts = [row.environment] * bool(row.environment) + [f"step {row.step}", f"group {row.group}"]
    parts += [f"{int(row.mask.sum())} tokens written, {len(row.ids)} in all"] * bool((row.ids >= 0).all())                # an imported record may have
    parts += [f"tools took {row.tool_seconds:.2f} s"] if row.tool_seconds == row.tool_seconds else []                    # neither of the two
    parts += [f"{name} {value + 0.0:g}" for name, value in row.rewards.items() if value is not None]
    line, reference = index.iloc[mine], f" **Reference:** {plain(row.answer)}" if row.answer is not None else ""
    st.caption(f"{plain(' · '.join(parts))}  \n**Prompt:** {plain(str(line.prompt))}{reference}")


def view_in_address() -> dict:
    "Return the metric, turn and token that the address names."
    return {"metric": st.query_params.get("metric"), "turn": query_int("turn"), "token": query_int("token")}


def moved(at: dict):
    "Write the reader's new position into the address, so that the server knows what the browser shows."
    if at["id"] != st.query_params.get("id", chosen):   # a late event of the previous trajectory
        return
    now = st.query_params.to_dict() | {name: at[name] for name in ("id", "metric", "turn", "token")}
    st.query_params.from_dict({name: str(value) for name, value in now.items() if value not in (None, "")})
    st.session_state["seen at"] = view_in_address()
    st.session_state["token metric"] = at["metric"]


def place() -> dict:
    "Return where the map opens. It stays the same while the reader moves in it, because a changed value would send all tokens again."
    now = view_in_address()
    name = f"{run.path} {chosen}"
    if st.session_state.get("opened", (None,))[0] != name or st.session_state.get("seen at") != now:
        st.session_state["opened"] = (name, now | {"metric": now["metric"] or st.session_state.get("token metric")})
        st.session_state["seen at"] = now
    return st.session_state["opened"][1]


header()
with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
    view = choice("view", ["tokens", "messages"], format_func={"tokens": unit_of(row, 2).capitalize(), "messages": "Messages"}.get)
    siblings()
    link("steps", f"Step {row.step}, group {row.group}", icon=":material/stacks:", step=row.step, group=row.group, split=row.split)
    bookmark_button(run, row.id, lambda: "&".join(f"{k}={v}" for k, v in st.query_params.to_dict().items() if k not in ("id", "run")))
if view == "messages":
    st.session_state.pop("opened", None)
    messages(row)
else:
    st.fragment(token_map)(run, row, place(), moved)
ready("trajectory", id=row.id, view=view)
