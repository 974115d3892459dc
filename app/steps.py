"""Show one step: its prompts as a table, and the rollouts of one prompt side by side, each compared with the best of them."""
import math

import streamlit as st

from tirlab.app.common import NOTHING_YET, current_run, link, link_trajectory, plain, query_int, ready, stop, watch
from tirlab.plots.groups import ORIGINS, group_legend, prompts, rollout_html
from tirlab.traces.run import RunError

COLUMNS = {
    "group": st.column_config.NumberColumn("Group", format="%d", width=60, help="Rollouts of one prompt share it"),
    "split": st.column_config.TextColumn("Split", width=60),
    "prompt": st.column_config.TextColumn("Prompt", width=360),
    "n": st.column_config.NumberColumn("Rollouts", format="%d", width=70),
    "mean": st.column_config.ProgressColumn("Mean reward", format="%.2f", min_value=0, max_value=1, width=110),
    "std": st.column_config.NumberColumn("Std", format="%.2f", width=60, help="Standard deviation of the rewards"),
    "zero_variance": st.column_config.CheckboxColumn("Zero variance", width=90, help="All rollouts have the same reward, so every advantage is 0"),
    "void": st.column_config.NumberColumn("Void", format="percent", width=60, help="Share of rollouts with a turn that neither calls a tool nor answers"),
    "turns": st.column_config.NumberColumn("Turns", format="%.1f", width=60),
    "tokens": st.column_config.NumberColumn("Tokens", format="%.0f", width=65, help="Written by the model, mean over the rollouts"),
    "dropped": st.column_config.TextColumn("Dropped or masked", width=260, help="Why rollouts were dropped from the loss, or tokens of them masked"),
    "off_policy": st.column_config.TextColumn("Off-policy", width=130, help="Rollouts that were hinted, replaced by a demonstration, or replayed"),
}
SIDE_BY_SIDE, AT_ONCE = 3, 24   # cards in a row, on the page

run = current_run()
watch(run, lambda: len(run.steps()) if query_int("step") is None else len(run.steps()) > 0)
steps = run.steps()
if steps.empty:
    stop(NOTHING_YET, ":material/hourglass_empty:")
numbers = sorted({int(s) for s in steps.step})
ticking = run.status() in ("running", "stalled")
asked = query_int("step")
if asked is not None and asked not in numbers:
    st.caption(f"There is no step {asked}; the nearest one is shown.")
    asked = min(numbers, key=lambda s: abs(s - asked))
step = asked if asked is not None else numbers[-1]
here = numbers.index(step)
following = asked is None


def turn_to(to: int | None):
    "Show a step and stop following the newest one; None follows it again."
    for name in ("step", "group", "split"):
        st.query_params.pop(name, None)
    if to is not None:
        st.query_params["step"] = str(to)


def typed():
    "Show the step that was typed, or the nearest one. Streamlit also calls this for a widget that nobody touched, when the browser has just drawn it."
    if (wanted := st.session_state[f"step {step}"]) != step:
        turn_to(min(numbers, key=lambda s: abs(s - wanted)))


def follow_or_stay():
    "Follow the newest step from now on, or stay at this one; called like `typed`."
    if st.session_state[f"follow {following} {step}"] != following:
        turn_to(step if following else None)


with st.container(horizontal=True, vertical_alignment="center", gap="small"):
    st.button("Previous", icon=":material/arrow_back:", shortcut="Shift+H", disabled=here == 0, on_click=turn_to, args=[numbers[max(here - 1, 0)]])
    st.number_input("Step", numbers[0], numbers[-1], step, key=f"step {step}", on_change=typed, label_visibility="collapsed", width=130)
    st.button("Next", icon=":material/arrow_forward:", icon_position="right", shortcut="Shift+L", disabled=here + 1 == len(numbers), on_click=turn_to,
              args=[numbers[min(here + 1, len(numbers) - 1)]])
    if ticking:
        st.toggle("Follow live", following, key=f"follow {following} {step}", on_change=follow_or_stay, help="Shows the newest step; choosing a step or a prompt stops it")
    st.caption(f"step {step} of {numbers[-1]}", width="content")

index = run.index()
rows = index[index.step == step]
if rows.empty:
    stop(f"The trajectories of step {step} are not in the index: its lines are damaged or gone. Other steps may still open.", ":material/broken_image:")
table = prompts(rows)


def summary():
    "Show a summary of the step in one line."
    rewards, flat = rows.reward[rows.reward.abs() < math.inf], int(table.zero_variance.sum())
    parts = [f"{len(rows)} rollouts of {len(table)} prompts"]
    parts += [f"mean reward {rewards.mean():.3f}"] * bool(len(rewards)) + [f"{flat} zero-variance group{'s' * (flat != 1)}"]
    parts += [f"{int(rows.dropped.notna().sum())} dropped or masked", f"{int((rows.origin != 'sampled').sum())} off-policy", f"{int(rows.failed_calls.sum())} failed calls"]
    st.markdown(f"##### Step {step}", width="content")
    st.caption(plain(" · ".join(parts)), width="content")


def chosen_group() -> int:
    "Return the row of the table whose rollouts are shown: by the address, otherwise the prompt whose rewards differ most."
    group, split = query_int("group"), st.query_params.get("split")
    found = table.index[(table.group == group) & ((table.split == split) if split else True)]
    return int(found[0]) if len(found) else int(table["std"].fillna(-1).argmax())


def pick():
    "Write the chosen row into the address."
    if picked := st.session_state[f"prompts of {step}"].selection.rows:
        line = table.iloc[picked[0]]
        st.query_params.update({"step": str(step), "group": str(int(line.group)), "split": str(line.split)})


def badges(line):
    "Show reward, advantage, stop reason and origin of a rollout as badges."
    reward = line.reward
    if reward == reward:
        st.badge(f"reward {reward:g}", icon=":material/star:", color="green" if reward == best_reward and reward > 0 else "gray")
    advantage = line.mean_advantage
    if advantage == advantage:
        st.badge(f"advantage {advantage + 0.0:+.2f}", color="blue" if advantage > .005 else "orange" if advantage < -.005 else "gray", help="Mean over its tokens")
    st.badge(plain(line.stop or "unknown stop"), color="gray" if line.stop == "answer" else "orange")
    if line.origin in ORIGINS:
        st.badge(ORIGINS[line.origin], icon=":material/school:", color="violet")
    if isinstance(line.dropped, str):
        st.badge(plain(line.dropped), icon=":material/block:", color="red", help="Why it was dropped from the loss, or tokens of it masked")
    if line.failed_calls > 0:   # NaN in an imported record
        st.badge(f"{int(line.failed_calls)} of {int(line.calls)} calls failed", icon=":material/build:", color="red")


@st.cache_data(max_entries=400, show_spinner=False)
def _row(path: str, name: str, _run, file_row: tuple):
    "Read a trajectory, once."
    return _run.trajectory(name)


def card(line, best):
    "Show one rollout as a card."
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center", gap="xsmall"):
            link_trajectory(line.id)
            badges(line)
        if isinstance(best, RunError):
            st.caption(plain(str(best)))
            return
        try:
            row = _row(str(run.path), line.id, run, (line.file, line.row))
        except RunError as e:
            st.caption(plain(str(e)))
            return
        st.html(rollout_html(row, best or row))


summary()
shown = [c for c in COLUMNS if c != "split" or table.split.nunique() > 1]
at = chosen_group()
if (low := table["mean"].min()) < 0 or table["mean"].max() > 1:   # rewards of another range
    COLUMNS["mean"] = st.column_config.NumberColumn("Mean reward", format="%.2f", width=90)
st.dataframe(table, column_order=shown, column_config=COLUMNS, hide_index=True, height=min(38 + 35 * len(table), 388), on_select=pick, selection_mode="single-row",
             key=f"prompts of {step}", row_height=35)
group = table.iloc[at]
cards = rows[(rows.split.fillna("train") == group.split) & (rows.group == group.group)]
cards = cards.assign(on_policy=cards.origin == "sampled").sort_values(["reward", "on_policy", "id"], ascending=[False, False, True], na_position="last")
best_reward = cards.reward.max() if cards.reward.notna().any() else math.nan
st.markdown(f"##### Group {int(group.group)}: {plain(str(group.prompt))}")
with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
    reference = cards.answer.dropna()
    st.caption(" · ".join([f"reference {plain(str(reference.iloc[0]))}"] * bool(len(reference)) + [f"{len(cards)} rollouts, the best first; each is compared with the best"]), width="content")
    if isinstance(group.task, str):
        link("compare", "This prompt over all steps", icon=":material/timeline:", task=group.task)
st.html(group_legend())
try:
    best = _row(str(run.path), cards.id.iloc[0], run, (cards.file.iloc[0], cards.row.iloc[0]))
except RunError as e:
    best = None
    st.caption(plain(str(e)))
if len(cards) > AT_ONCE:
    st.caption(f"The first {AT_ONCE} of {len(cards)}; the page Search lists all of them.")
lines = list(cards.head(AT_ONCE).itertuples())
for start in range(0, len(lines), SIDE_BY_SIDE):
    for column, line in zip(st.columns(SIDE_BY_SIDE, gap="small"), lines[start:start + SIDE_BY_SIDE]):
        with column:
            card(line, best)
ready("steps", step=step, group=int(group.group), rollouts=len(lines))
