"""Show the token map of a trajectory: the data for the browser, and the component that draws it there (tokens*.js, tokens.css)."""
from pathlib import Path

import numpy as np
import streamlit as st

from tirlab.app.common import plain
from tirlab.plots.colors import CLASSES, class_color, scale_of
from tirlab.traces.rows import TraceRow, unit_of
from tirlab.plots.token_map import jump_lists, token_metrics, token_table, turn_list
from tirlab.traces.run import Run, RunError

LABELS = {"logprob": "Log-probability", "entropy": "Entropy", "advantage": "Advantage", "ratio": "Importance ratio", "mismatch": "Trainer − sampler",
          "surprise": "Gradient norm by the logits", "sampling_logprob": "Log-probability, sampler"}
GROUPS = {"p": "Control tokens", "shift": "Against a checkpoint"}
HERE = Path(__file__).parent


def label(metric: str) -> str:
    "Return the label of a metric."
    kind, _, name = metric.partition(":")
    return {"p": f"P({name})", "shift": f"Shift ({name} − recorded)"}.get(kind) or LABELS[metric]


def scale_facts(metric: str) -> dict:
    "Return a scale for the browser: its ends, and the colour and strength of each class."
    scale = scale_of(metric)
    values = scale.low + np.arange(CLASSES) / (CLASSES - 1) * (scale.high - scale.low)
    return {"label": scale.label, "low": scale.low, "high": scale.high, "plain": scale.plain, "bounded": metric.startswith("p:") or metric == "surprise",
            "colors": [class_color(k, scale) for k in range(CLASSES)], "strength": np.abs(values - scale.plain).round(6).tolist()}


def probed(meta: dict, row: TraceRow) -> tuple:
    "Return the names of the columns of `control`; none where they are unknown."
    names = meta.get("probed_tokens") or meta.get("control_tokens") or ()
    return tuple(names) if len(names) == row.control.shape[1] else ()


def scored(run: Run, name: str) -> dict:
    "Return a trajectory's log-probabilities under each checkpoint that scored the run; show a sentence for one that cannot be read."
    found = {}
    for checkpoint in run.scores():
        try:
            if (values := run.scored(checkpoint, name)) is not None:
                found[checkpoint] = values
        except RunError as e:
            st.caption(plain(str(e)))
    return found


@st.cache_resource(max_entries=4, show_spinner=False)
def payload(version: str, _row: TraceRow, _names: tuple, _control: tuple, _scored: dict) -> dict:
    "Return a trajectory for the component: one table of tokens, and the facts beside it."
    metrics = token_metrics(_row, _names, _scored)
    listed = [{"name": m, "label": label(m), "group": GROUPS.get(m.partition(":")[0] if ":" in m else "", "Policy")} for m in metrics]
    facts = {"version": version, "id": _row.id, "metrics": listed, "scales": {m: scale_facts(m) for m in metrics}, "turns": turn_list(_row, _scored),
             "jumps": jump_lists(_row, metrics), "control": list(_control), "prompt": "".join(_row.prompt_text), "prompt_tokens": len(_row.prompt_ids),
             "unit": unit_of(_row)}
    return {"facts": facts, "tokens": token_table(_row, metrics)}


_SCRIPTS = ("tokens_text", "tokens_state", "tokens_blocks", "tokens_colors", "tokens_card", "tokens_moves", "tokens")   # one module, in this order
_component = st.components.v2.component("tirlab_tokens", css=(HERE / "tokens.css").read_text("utf-8"),
                                        js="\n".join((HERE / f"{name}.js").read_text("utf-8") for name in _SCRIPTS))


def token_map(run: Run, row: TraceRow, at: dict, moved) -> None:
    "Show a trajectory's tokens at the reader's position, and call `moved` with a dict when it changes."
    meta, others = run.meta(), scored(run, row.id)
    version = f"{run.path}|{row.id}|{row.scored_at}|{len(row.ids)}|{','.join(others)}"
    data = payload(version, row, probed(meta, row), tuple(map(str, meta.get("control_tokens") or ())), others)
    _component(key="tokens", data={"tokens": data["tokens"], "facts": data["facts"] | {"at": at}}, on_at_change=lambda: moved(st.session_state["tokens"]["at"]))
