"""The token map of a trajectory: what goes to the browser, and the component that draws it there (tokens_text.js, tokens.js, tokens.css)."""
from pathlib import Path

import numpy as np
import streamlit as st

from tirlab.app.common import plain
from tirlab.plots.figures import CLASSES, class_color, scale_of
from tirlab.traces.rows import TraceRow, unit_of
from tirlab.plots.token_map import jump_lists, token_metrics, token_table, turn_list
from tirlab.traces.run import Run, RunError

LABELS = {"logprob": "Log-probability", "entropy": "Entropy", "advantage": "Advantage", "ratio": "Importance ratio", "mismatch": "Trainer − sampler",
          "surprise": "Prop. 3.1 factor", "sampling_logprob": "Log-probability, sampler"}
GROUPS = {"p": "Control tokens", "shift": "Against a checkpoint"}
HERE = Path(__file__).parent


def label(metric: str) -> str:
    "The name of a metric for people."
    kind, _, name = metric.partition(":")
    return {"p": f"P({name})", "shift": f"Shift ({name} − recorded)"}.get(kind) or LABELS[metric]


def scale_facts(metric: str) -> dict:
    "What the browser must know of a scale: its ends, and of each class its colour and how strong it is."
    scale = scale_of(metric)
    values = scale.low + np.arange(CLASSES) / (CLASSES - 1) * (scale.high - scale.low)
    return {"label": scale.label, "low": scale.low, "high": scale.high, "plain": scale.plain, "bounded": metric.startswith("p:") or metric == "surprise",
            "colors": [class_color(k, scale) for k in range(CLASSES)], "strength": np.abs(values - scale.plain).round(6).tolist()}


def probed(meta: dict, row: TraceRow) -> tuple:
    "Names of the columns of `control`; none where they cannot be told."
    names = meta.get("probed_tokens") or meta.get("control_tokens") or ()
    return tuple(names) if len(names) == row.control.shape[1] else ()


def scored(run: Run, name: str) -> dict:
    "Log-probabilities of a trajectory's tokens by each checkpoint that read the run again; a sentence for those that cannot be read."
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
    "A trajectory as the component takes it: one table, and the facts beside it."
    metrics = token_metrics(_row, _names, _scored)
    listed = [{"name": m, "label": label(m), "group": GROUPS.get(m.partition(":")[0] if ":" in m else "", "Policy")} for m in metrics]
    facts = {"version": version, "id": _row.id, "metrics": listed, "scales": {m: scale_facts(m) for m in metrics}, "turns": turn_list(_row, _scored),
             "jumps": jump_lists(_row, metrics), "control": list(_control), "prompt": "".join(_row.prompt_text), "prompt_tokens": len(_row.prompt_ids),
             "unit": unit_of(_row)}
    return {"facts": facts, "tokens": token_table(_row, metrics)}


_css, *_js = ((HERE / name).read_text("utf-8") for name in ("tokens.css", "tokens_text.js", "tokens.js"))
_component = st.components.v2.component("tirlab_tokens", css=_css, js="\n".join(_js))


def token_map(run: Run, row: TraceRow, at: dict, moved) -> None:
    "Show a trajectory's tokens from where the reader stands, and call `moved` with a dict when they go on."
    meta, others = run.meta(), scored(run, row.id)
    version = f"{run.path}|{row.id}|{row.scored_at}|{len(row.ids)}|{','.join(others)}"
    data = payload(version, row, probed(meta, row), tuple(map(str, meta.get("control_tokens") or ())), others)
    _component(key="tokens", data={"tokens": data["tokens"], "facts": data["facts"] | {"at": at}}, on_at_change=lambda: moved(st.session_state["tokens"]["at"]))
