"""Supervision with the templates of other model families: right calls, hints, old successes and rows for SFT hold in each, in its own way of writing calls and as text."""

import re
from dataclasses import replace

import pytest
from test_drift import ends_of, tokenizer

from tirlab.rollout.calls import RolloutLimits
from tirlab.supervision.demonstrations import demonstrate, is_whole
from tirlab.envs.environments import environment_tools
from tirlab.core.formats import make_format
from tirlab.algorithms.prompts import Replay
from tirlab.rewards.outcome import answer_reward
from tirlab.supervision.lessons import sft_rows
from tirlab.supervision.in_batch import Hints, add_hint, hint_lines, hint_text
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks

FAMILIES = ["qwen2_5", "qwen3", "qwen3_training", "qwen3_5_think", "llama3_1", "gptoss", "glm4moe", "gemma4", "lfm2_2_5", "nemotron_3_nano"]
CHAT = [(f, None) for f in FAMILIES]
WAYS = CHAT + [(f, "json") for f in FAMILIES] + [(f, s) for f in ("llama3_1", "glm4moe") for s in ("xml", "fenced", "list")]
ROWS, BY_NAME, BY_FAMILY = make_tasks("all", n=6), *(pytest.mark.parametrize("family,call_format", ways, ids=str) for ways in (WAYS, CHAT))


def policy(family):
    "A tokenizer as its checkpoint brings it, which does not say how calls are read, and its ends of turns."
    tok = tokenizer(family)
    tok.response_template = None
    return tok, tok.convert_tokens_to_ids(ends_of(family))


def shown(family, call_format, rows=ROWS, **options):
    tok, ends = policy(family)
    return tok, ends, demonstrate(rows, tok, ENVIRONMENTS, call_format=call_format, end_tokens=ends, **options)


@BY_NAME
def test_demonstrations_are_whole_and_right(family, call_format):
    "Calls are read back as they were meant and run for real; the last turn is the answer; the rows for SFT learn what the model is to write, with the end of every turn, and nothing else."
    tok, ends, done = shown(family, call_format)
    assert all(map(is_whole, done)) and answer_reward([t.messages for t in done], ROWS["answer"]) == [1.0] * len(done), [t.stop for t in done]
    for t, labels in zip(done, sft_rows(done)["labels"]):
        assert t.origin == "demonstration" and len(t.turns) > 1 and all(turn.ids[-1] in ends for turn in t.turns)
        assert [i for i in labels if i != -100] == [i for turn in t.turns for i in turn.ids]


@BY_NAME
def test_hinted_prompts_render(family, call_format):
    "The hint stands in the prompt, whole and once, and the prompt without it is another; both end where a turn begins."
    tok, ends = policy(family)
    for where in ("system", "user"):
        for row in ROWS:
            format = make_format(call_format, tok, list(environment_tools(ENVIRONMENTS[row["environment"]]()).values()), end_tokens=ends)
            text = hint_text(hint_lines(Hints(1, where), row, format.syntax), 1.0)
            bare, told = (tok.decode(format.prompt(m)) for m in (row["prompt"], add_hint(row["prompt"], text, where)))
            squeezed = lambda s: re.sub(r"\s+", " ", s)
            assert squeezed(text) in squeezed(told) and "Notes that may help" not in bare and told.count("Notes that may help") == 1
            assert told[-12:] == bare[-12:]


@BY_FAMILY
def test_an_old_success_takes_the_place_of_a_failure(family, call_format):
    "Kept and taken back through a checkpoint's plain types: the same tokens, the same messages."
    tok, ends, done = shown(family, call_format, ROWS.select(range(3)))
    first, again = Replay(2), Replay(2)
    for i, t in enumerate(done): first.add(f"task {i}", replace(t, origin="sampled"), 1.0, [1.0])
    again.load_state_dict(first.state_dict())
    for i, t in enumerate(done):
        found, reward, scores = again.replacement(f"task {i}", [0.0, 0.0])
        assert (found.completion_ids, found.mask, found.messages, reward, scores) == (t.completion_ids, t.mask, t.messages, 1.0, [1.0])


@BY_FAMILY
def test_a_demonstration_that_does_not_fit_says_so(family, call_format):
    "Cut in its first turn it is not whole, and runs nothing."
    _, _, done = shown(family, call_format, ROWS.select(range(3)), limits=RolloutLimits(8))
    assert not any(map(is_whole, done)) and not any(t.results for t in done)
