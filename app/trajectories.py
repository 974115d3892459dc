"""Every trajectory of the run, to filter and to open."""
import streamlit as st

from tirlab.app.common import stop, the_run

COLUMNS = {
    "step": st.column_config.NumberColumn("Step", format="%d", width=60),
    "group": st.column_config.NumberColumn("Group", format="%d", width=60, help="Trajectories of one prompt share it"),
    "reward": st.column_config.NumberColumn("Reward", format="%.2f", width=70),
    "prompt": st.column_config.TextColumn("Prompt", width=250),
    "last_turn": st.column_config.TextColumn("Last turn", width=260),
    "answer": st.column_config.TextColumn("Reference", width=90),
    "stop": st.column_config.TextColumn("Stop", width=90, help="Why it ended"),
    "turns": st.column_config.NumberColumn("Turns", format="%d", width=60),
    "calls": st.column_config.NumberColumn("Calls", format="%d", width=60),
    "failed_calls": st.column_config.NumberColumn("Failed", format="%d", width=60, help="Tool calls that failed"),
    "model_tokens": st.column_config.NumberColumn("Tokens", format="%d", width=65, help="Written by the model"),
    "mean_logprob": st.column_config.NumberColumn("Mean logprob", format="%.2f", width=100, help="Over what the model wrote, in nats"),
    "environment": st.column_config.TextColumn("Environment", width=110),
    "split": st.column_config.TextColumn("Split", width=60),
    "id": st.column_config.TextColumn("Id", width=115),
}

run = the_run()
index = run.index()
if index.empty:
    stop("No trajectory was written yet. They appear here as soon as the first step is done.", ":material/hourglass_empty:")


def choices(name: str) -> list:
    return sorted(index[name].dropna().unique())


def filters():
    "The rows that are wanted."
    wanted = index
    first, last = int(index.step.min()), int(index.step.max())
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        if last > first:
            low, high = st.slider("Steps", first, last, (first, last), key="steps", width=260, persist_state="session")
            wanted = wanted[wanted.step.between(low, high)]
        for name, label in (("split", "Split"), ("environment", "Environment"), ("stop", "Stop")):
            if len(options := choices(name)) > 1:
                chosen = st.multiselect(label, options, key=name, width=230, placeholder="all", persist_state="session")
                wanted = wanted[wanted[name].isin(chosen)] if chosen else wanted
        rewards = index.reward.dropna()
        if rewards.nunique() > 1:
            low, high = float(rewards.min()), float(rewards.max())
            chosen = st.slider("Reward", low, high, (low, high), key="reward", width=220, persist_state="session")
            wanted = wanted if chosen == (low, high) else wanted[wanted.reward.between(*chosen)]
        if st.toggle("Failed calls only", key="failed", persist_state="session"):
            wanted = wanted[wanted.failed_calls > 0]
    return wanted.sort_values(["step", "split", "group", "id"], ascending=[False, True, True, True], ignore_index=True)


@st.fragment(run_every=2.0 if run.status() in ("running", "stalled") else None)
def news(shown: int):
    "Say that there is more by now; the table itself stays still under the reader's hand."
    if (more := len(run.index()) - shown) > 0 and st.button(f"Show {more} new trajectories", icon=":material/refresh:", key="more"):
        st.rerun()


wanted = filters()
with st.container(horizontal=True, vertical_alignment="center"):
    st.caption(f"{len(wanted):,} of {len(index):,} trajectories. Click a row to open it.", width="content")
    news(len(index))
if wanted.empty:
    stop("No trajectory fits these filters.", ":material/filter_alt_off:")

telling = [c for c in COLUMNS if wanted[c].notna().any() and (c not in ("split", "environment") or index[c].nunique() > 1)]
event = st.dataframe(wanted, column_order=telling, column_config=COLUMNS, hide_index=True, height=640,
                     on_select="rerun", selection_mode="single-cell", key="table")
cells = event.selection.cells
if cells and cells[0][0] < len(wanted):
    st.switch_page("trajectory.py", query_params={"id": wanted.id.iloc[cells[0][0]]})
