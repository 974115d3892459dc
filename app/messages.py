"""Show a trajectory as messages: raw, as Markdown, with typeset formulas, or its code alone."""
import re
import unicodedata

import streamlit as st

from tirlab.app.common import query_int
from tirlab.plots.token_html import text_html
from tirlab.traces.rows import TraceRow
from tirlab.plots.token_map import code_in, turn_list, turn_texts

WAYS = {"raw": "Raw", "markdown": "Markdown", "latex": "LaTeX", "code": "Code"}
AT_ONCE, LONGEST = 8, 100_000   # turns on a page; characters that are laid out as Markdown
_CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)
_RAW = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font:13px/1.65 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace"


def inert(text: str) -> str:
    "Make Markdown inert: it loads nothing, and every invisible character is shown."
    text = text.replace("![", "!\u2060[")   # a word joiner: no image, so no address is requested
    return "".join(c if c in "\n\t\u200d\u200c\u2060" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"⟨{ord(c):X}⟩" for c in text)


def outside_code(text: str, change) -> str:
    "Change a text everywhere but in its code."
    return "".join(part if k % 2 else change(part) for k, part in enumerate(_CODE.split(text)))


def formulas(text: str) -> str:
    "Rewrite LaTeX as models write it with the delimiters that Streamlit's Markdown knows."
    text = re.sub(r"\\\[(.*?)\\\]", r"\n$$\1$$\n", text, flags=re.DOTALL)
    text = re.sub(r"\\\((.*?)\\\)", r"$\1$", text)
    return re.sub(r"(?<![$\\\w])(\\boxed\{[^{}$]*\})(?!\$)", r"$\1$", text)


def show(text: str, way: str) -> None:
    "Show a text in one of WAYS. None of them runs or loads anything."
    if way in ("markdown", "latex") and len(text) > LONGEST:
        st.caption(f"{len(text):,} characters are too many to lay out; they are shown raw.")
        way = "raw"
    if way == "code":
        for code in code_in(text) or [text]:
            st.code(code, language="python" if code is not text else None, wrap_lines=True)
    elif way == "markdown":
        st.markdown(outside_code(inert(text), lambda s: s.replace("$", r"\$")))
    elif way == "latex":
        st.markdown(outside_code(inert(text), formulas))
    else:
        st.html(f'<div class="raw" style="{_RAW}">{text_html(text)}</div>')


@st.fragment
def message(key: str, who: str, text: str, error: bool, usual: str) -> None:
    "Show one message with its own switch."
    with st.container(border=True):
        with st.container(horizontal=True, horizontal_alignment="distribute", vertical_alignment="center"):
            icon, color, label = {"assistant": (":material/smart_toy:", "blue", "model")}.get(who, (":material/build:", "gray", "tool"))
            st.badge("error" if error else label, icon=":material/error:" if error else icon, color="red" if error else color)
            way = st.segmented_control("Show as", list(WAYS), default=usual, format_func=WAYS.get, key=f"{key} {usual}", required=True, label_visibility="collapsed")
        show(text, way)


def choice(name: str, options: list, **more) -> str:
    "Show a switch whose position is part of the address; the first option is the default."
    key, asked = f"choice {name}", st.query_params.get(name)
    if asked in options:
        st.session_state[key] = asked
    elif (kept := st.session_state.setdefault(key, options[0])) != options[0]:
        st.query_params[name] = kept

    def follow():
        st.query_params[name] = st.session_state[key]
    return st.segmented_control(name, options, key=key, required=True, on_change=follow, label_visibility="collapsed", **more)


def _go(turn: int) -> None:
    st.query_params["turn"] = str(turn)


def messages(row: TraceRow) -> None:
    "Show the turns of a trajectory as messages, from the chosen one on."
    turns = turn_list(row)
    if not turns:
        st.caption("The completion is empty.")
        return
    numbers = [t["turn"] + 1 for t in turns]
    first = asked if (asked := query_int("turn")) in numbers else numbers[0]
    here = numbers.index(first)
    with st.container(horizontal=True, vertical_alignment="center", gap="medium"):
        if len(turns) > 1:
            st.button("Previous turn", icon=":material/chevron_left:", disabled=here == 0, on_click=_go, args=[numbers[max(here - 1, 0)]], shortcut="h", key="turn-")
            key = f"turn of {row.id} {first}"
            st.select_slider("From turn", numbers, value=first, key=key, on_change=lambda: _go(st.session_state[key]), width=260,
                             label_visibility="collapsed")
            st.button("Next turn", icon=":material/chevron_right:", icon_position="right", disabled=here + 1 == len(turns), on_click=_go,
                      args=[numbers[min(here + 1, len(numbers) - 1)]], shortcut="l", key="turn+")
        usual = choice("as", list(WAYS), format_func=WAYS.get)
    for t in turns[here:here + AT_ONCE]:
        numbers = [("reward", t["reward"]), ("advantage", t["advantage"]), *((name, v) for name, v in t["scores"].items() if v)]
        signed = [f"{name} {v + 0.0:+.2f}".replace("-", "−") for name, v in numbers if v is not None]
        st.caption(" · ".join([f"**Turn {t['turn'] + 1}**", *[t["kind"].replace("_", " ")] * bool(t["kind"]), *signed]).replace("<", r"\<"))
        for k, (who, text) in enumerate(turn_texts(row, t["turn"])):
            message(f"message {row.id} {t['turn']} {k}", who, text, k in t["errors"], usual)
    if (left := len(turns) - here - AT_ONCE) > 0:
        st.button(f"{left} more turn{'s' * (left > 1)}", icon=":material/expand_more:", on_click=_go, args=[numbers[here + AT_ONCE]], key="more turns")
