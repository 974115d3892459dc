"""The tiny world: a lossless tokenizer, a base policy with something to learn, tasks that do not leak."""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

from tirlab.envs.environments import environment_tools
from tirlab.eval.evaluate import evaluate
from tirlab.core.formats import ChatFormat
from tirlab.core.syntax import SYNTAXES
from tirlab.core.turns import control_ids, parse_message, turn_kind
from tirlab.envs.tasks import ENVIRONMENTS, FAMILIES, make_tasks, split_of
from tirlab.core.tiny import tiny_policy, tiny_tokenizer
from tirlab.core.trajectory import TurnKind
from tirlab.recipes.warmup import FLAWS, FORMATS, LEVELS, copying, demonstrations, make_tiny_policy

TOK = AutoTokenizer.from_pretrained(tiny_policy())
PIECES = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<|im_end|>", '\n{"name": "', '"}}\n', '", "arguments": {"', "{", "}", '"python"', "1", " ", "\n", '"code": "1"']


@given(st.text() | st.lists(st.sampled_from(PIECES) | st.text(max_size=3)).map("".join))
@settings(max_examples=300, deadline=None)
def test_decoding_gives_back_any_text(text):
    ids = TOK.encode(text)
    assert TOK.decode(ids) == text and ids == tiny_tokenizer_once().encode(text)


def tiny_tokenizer_once(made=[]):  # noqa: B006
    return made[0] if made else made.append(tiny_tokenizer()) or made[0]


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_turns_are_read_as_trl_reads_them(text):
    prefix = TOK.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False)
    tools = list(environment_tools(ENVIRONMENTS["arithmetic"]()).values())
    ids = TOK.encode(text) or [0]
    assert parse_message(TOK, ids, prefix, tools) == parse_response(TOK, ids, prefix=prefix, tools=tools)
    assert (turn_kind(text) is TurnKind.TOOL_CALL) <= bool(parse_message(TOK, ids, prefix, tools).get("tool_calls"))      # a healthy call is one that is run


def test_what_trl_needs_of_the_template():
    assert supports_tool_calling(TOK) and is_chat_template_prefix_preserving(TOK)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    text = TOK.apply_chat_template(messages, tools=list(environment_tools(ENVIRONMENTS["lookup"]()).values()), tokenize=False)
    assert text == "<|im_start|>system\nfind(name, box) read(key)<|im_end|>\n<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"


def test_the_policy_fits_everywhere():
    config = AutoModelForCausalLM.from_pretrained(tiny_policy()).config
    assert config.head_dim == 32 and config.max_position_embeddings >= 4096 and config.tie_word_embeddings
    assert sum(f.stat().st_size for f in Path(tiny_policy()).iterdir()) < 3 * 2**20


def test_every_marker_is_one_token():
    assert all(len(ids) == 1 for name in SYNTAXES for ids in control_ids(TOK, name).values())


@pytest.mark.parametrize("n", [24, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_base_success_leaves_room_and_signal(name, n):
    "All families in one batch, for a step of sampling costs nearly the same for 24 rollouts as for 72."
    model = AutoModelForCausalLM.from_pretrained(tiny_policy())
    rewards = evaluate(model, TOK, make_tasks("all", "test", 3 * n), ENVIRONMENTS, call_format=name).rewards
    for i, family in enumerate(FAMILIES): assert 0.05 < sum(rewards[i::3]) / n < 0.55, family


@pytest.mark.parametrize("rows, steps, learnt", [(8, (24, 10), False), pytest.param(60, (400, 60), True, marks=pytest.mark.slow)], ids=["begun", "learnt"])
def test_the_recipe_rebuilds_an_equivalent_policy_at_reduced_size(rows, steps, learnt, tmp_path):
    losses = make_tiny_policy(tmp_path, rows=rows, steps=steps, hidden_size=64, layers=2, seed=5)
    model, tok = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    shipped = json.loads((Path(tiny_policy()) / "tokenizer.json").read_text())
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == shipped and tok.chat_template == TOK.chat_template
    assert sum(losses[-10:]) / 10 < losses[0] / (4 if learnt else 1.5)
    reference = AutoModelForCausalLM.from_pretrained(tiny_policy()).config
    for name in ("model_type", "head_dim", "max_position_embeddings", "vocab_size", "eos_token_id", "pad_token_id"):
        assert getattr(model.config, name) == getattr(reference, name)
    for name in ("chat", "list") * learnt:      # it has learnt to call the tool, if not yet what with
        result = evaluate(model, tok, make_tasks("arithmetic", "test", 64), ENVIRONMENTS, call_format=name)
        assert sum(any(c.name == "python" for c in t.calls) for t in result.trajectories) > 8


@pytest.mark.slow
def test_the_recipe_rebuilds_an_equivalent_policy(tmp_path):
    make_tiny_policy(tmp_path, seed=1)
    model, tok = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for name in FORMATS:
        for family in FAMILIES:
            assert 0.05 < evaluate(model, tok, make_tasks(family, "test", 256), ENVIRONMENTS, call_format=name).success < 0.55, (name, family)


def test_demonstrations_repeat_and_are_what_the_policy_will_see():
    rows = list(make_tasks("all", n=24))
    first, second = (demonstrations(rows, TOK, FLAWS, seed=3, formats=FORMATS) for _ in range(2))
    assert [t.completion_ids for t in first] == [t.completion_ids for t in second]
    for t, row in zip(demonstrations(rows, TOK, FLAWS), rows):
        tools = environment_tools(ENVIRONMENTS[row["environment"]]())
        assert t.prompt_ids == ChatFormat(TOK, list(tools.values())).prompt(row["prompt"])
    assert copying(3, TOK) == copying(3, TOK)


@pytest.mark.parametrize("family", [*FAMILIES, "all"])
def test_splits_do_not_overlap(family):
    rows = {split: make_tasks(family, split, 300) for split in ("train", "test", "content_ood")}
    questions = {split: {r["prompt"][0]["content"] for r in d} for split, d in rows.items()}
    assert not questions["train"] & questions["test"] and not questions["content_ood"] & (questions["train"] | questions["test"])
    for split, d in rows.items():
        assert all(split_of(r) == split for r in d)
    assert list(make_tasks(family, "test", 20, seed=1)) == list(make_tasks(family, "test", 20, seed=1)) != list(make_tasks(family, "test", 20, seed=2))


@pytest.mark.parametrize("n", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_no_held_out_pair_occurs_in_warm_up(n):
    "Every number in every warm-up conversation, tool answers and slips included, against the operands of the held-out split."
    held_out = {tuple(p.split("|")) for f in FAMILIES for level in (1, 2) for r in make_tasks(f, "content_ood", 3 * n, level=level) for p in r["pairs"]}
    assert all(zlib.crc32(f"{name}|{number}".encode()) % 5 == 0 for name, number in held_out)      # the rule, spelled out
    rows = [r for f, levels in LEVELS.items() for i, level in enumerate(levels) for r in make_tasks(f, "train", n, seed=i, level=level)]
    seen = set()
    for flaws in (None, FLAWS):
        for row, t in zip(rows, demonstrations(rows, TOK, flaws, formats=FORMATS)):
            name = row["pairs"][0].split("|")[0]
            assert name in row["prompt"][0]["content"]
            seen |= {(name, n) for n in re.findall(r"\d+", TOK.decode(t.prompt_ids + t.completion_ids))}
    assert len(seen) > 13 * n and not held_out & seen and not {p for p in seen if zlib.crc32("|".join(p).encode()) % 5 == 0}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_ground_truth_solves_the_task_and_one_call_does_not(family, level):
    for row in make_tasks(family, "test", 20, level=level):
        environment = ENVIRONMENTS[family]()
        environment.reset(**row)
        told = []
        for call in map(json.loads, row["ground_truth"]):
            try:
                told.append(getattr(environment, call["name"])(**call["arguments"]))
            except ValueError as e:
                told.append(str(e))
        assert told[-1] == row["answer"]
        if family != "arithmetic":      # there, one expression can do the work of all calls
            assert row["answer"] not in told[:-1] and row["answer"] not in row["prompt"][0]["content"]


def test_unknown_families_and_splits_are_named():
    with pytest.raises(ValueError, match="arithmetic, lookup, repair"):
        make_tasks("algebra")
    with pytest.raises(ValueError, match="content_ood"):
        make_tasks("lookup", "validation")


def test_losses_are_finite(tmp_path):
    assert torch.tensor(make_tiny_policy(tmp_path, rows=5, steps=(3, 2), hidden_size=32, layers=1)).isfinite().all()
