"""TRL's trainer and ours get the same scripted generator; everything that leaves the step must be the same.

Intended differences, each with the value that gives TRL's behaviour, used throughout this file:
  malformed_calls="stop"        TRL takes a broken call as the answer; by default the model is told and goes on
  max_observation_chars=None    TRL never cuts tool output, and ends a rollout whose tool's answer does not fit
  tool_timeout=None             TRL waits for a tool for ever (the default here too)
  max_concurrent_tools=1        TRL runs tools one after another, in the trainer's thread
  engine="trl"                  TRL draws from torch's global generator; here the noise of a token belongs to it
  skip_empty_steps=False        TRL steps its optimiser also where no token has a gradient
  logging_steps=10              TRL's default
  gradient_checkpointing=True   TRL's default, also on a CPU
  trace=False                   TRL writes no run folder (traces are written here, to show that they change nothing)
Without an option: tools that return lists of content blocks (images) are for TRL's trainer; here the model reads everything a tool returns as text, and rewards get the list.
"""

import json
import zlib

import pytest
import torch
from small import small_policy
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from tirlab.all import TIRConfig, TIRTrainer, open_run, tiny_policy
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks

TOK = AutoTokenizer.from_pretrained(tiny_policy())
BARE = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
del BARE.response_template
GROUP, BUDGET = 8, 224


def call(tool, /, **arguments):

    return f'<tool_call>\n{json.dumps({"name": tool, "arguments": arguments})}\n</tool_call>'


def first_turns(name, good, bad):
    "What the members of a group write first: everything that can go right or wrong."
    return [
        call(name, **good) + "\n" + call(name, **good),       # parallel calls
        "<tool_call>\n" + '{"name": "' + name + '", "argum',  # malformed, never closed
        call("nothing", x=1),                                 # unknown tool
        call(name, **bad),                                    # the tool raises
        call("repeat", text="x", times=900),                  # the answer does not fit the budget
        "42",                                                 # no call
        "hm " + call(name, **good),                           # text before the call
        call(name, wrong="argument"),                         # arguments do not fit the signature
    ]


def scripted(firsts, logprobs=False):
    "A stand-in for sampling: completions are a function of the prompt, and of its place among equal prompts."
    def generate(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        seen, out = {}, []
        for ids in prompt_ids:
            key = tuple(ids)
            k = seen[key] = seen.get(key, -1) + 1
            draw = zlib.crc32(repr(key).encode())
            if TOK.decode(ids).count("<|im_start|>assistant") == 1:
                text = firsts[(k + draw) % len(firsts)]
            else:
                text = [firsts[0], firsts[draw % len(firsts)], "7", "a long answer " * 30, "</tool_call>"][draw // 8 % 5]
            out.append(TOK.encode(text + "<|im_end|>")[:BUDGET])      # as max_new_tokens would
        return out, [[-(i % 7) / 10 for i in ids] for ids in out] if logprobs else None
    return generate


def repeat(text: str, times: int) -> str:
    """
    Repeat a text.

    Args:
        text: What to repeat.
        times: How often.
    """
    return text * times


async def wait(text: str) -> str:
    """
    Answer later.

    Args:
        text: What to answer.
    """
    return text + "!"


class Echo:
    "An environment with state, a reset that adds to the prompt, and a reward of its own."
    log = []

    def reset(self, **row):
        self.said = []
        Echo.log.append(sorted(row))
        return " (ready)"

    def say(self, text: str) -> str:
        """
        Say something.

        Args:
            text: What to say.
        """
        if text == "bad":
            raise ValueError("will not say that")
        self.said.append(text)
        return f"{len(self.said)}: {text}"

    def get_reward(self):
        return 0.25 * len(self.said)


SEEN = []


def messy_reward(prompts, completions, completion_ids, answer, environments=None, **kwargs):
    "Depends on everything a reward function is given, so that nothing can differ unseen."
    SEEN.append((prompts, completions, [list(i) for i in completion_ids], answer, sorted(k for k in kwargs if k != "trainer_state")))
    return [None if len(ids) % 7 == 0 else zlib.crc32(repr((p, c, a)).encode()) % 11 / 10 for p, c, ids, a in zip(prompts, completions, completion_ids, answer)]


SETUPS = {
    "class": (dict(environment_factory=Echo, tools=[repeat]), first_turns("say", {"text": "hi"}, {"text": "bad"})),
    "dict": (dict(environment_factory=ENVIRONMENTS, tools=[repeat]), first_turns("python", {"code": "37+48"}, {"code": 1}) + first_turns("find", {"name": "rab", "box": 1}, {"name": "x", "box": 0})),
    "functions": (dict(tools=[repeat, wait]), first_turns("repeat", {"text": "a", "times": 3}, {"text": "a", "times": "b"}) + [call("wait", text="w") + call("repeat", text="a", times=2)]),
    "no tools": ({}, ["42", "7", "x" * 400, "<tool_call>"]),
    "no response template": (dict(processing_class=BARE), ["42", "<tool_call>{}</tool_call>", "x" * 400, "<tool_call>"]),
    "sampler's logprobs": (dict(environment_factory=Echo), first_turns("say", {"text": "hi"}, {"text": "bad"})),
}


def run(trainer_class, setup, tmp_path, monkeypatch, steps=3, **options):
    "Train `steps` optimiser steps; returns what left every step."
    kwargs, firsts = SETUPS[setup]
    SEEN.clear(), Echo.log.clear()
    common = dict(output_dir=str(tmp_path / trainer_class.__name__), max_steps=steps, per_device_train_batch_size=GROUP, per_device_eval_batch_size=GROUP,
                  num_generations=GROUP, max_completion_length=BUDGET, learning_rate=1e-3, seed=3, save_strategy="no", disable_tqdm=True, logging_steps=1,
                  max_tool_calling_iterations=2, beta=0.01, **options)
    if trainer_class is TIRTrainer:
        args = TIRConfig(malformed_calls="stop", max_observation_chars=None, max_concurrent_tools=1, engine="trl", skip_empty_steps=False, **common)
    else:
        args = GRPOConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, **common)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted(firsts, setup == "sampler's logprobs"))
    tasks = make_tasks("all", n=12)
    trainer = trainer_class(small_policy(), [messy_reward], args, tasks, tasks.select(range(2)), **kwargs)
    batches, losses, grads = [], [], []
    inner_score, inner_loss, inner_clip = trainer._generate_and_score_completions, trainer._compute_loss, trainer.accelerator.clip_grad_norm_
    trainer._generate_and_score_completions = lambda inputs: (batches.append(inner_score(inputs)), batches[-1])[1]
    trainer._compute_loss = lambda model, inputs: (losses.append(inner_loss(model, inputs)), losses[-1])[1]
    def clip(parameters, *args, **kwargs):
        grads.append([p.grad.clone() for p in trainer.model.parameters()])
        return inner_clip(trainer.model.parameters(), *args, **kwargs)
    trainer.accelerator.clip_grad_norm_ = clip
    trainer.train()
    evaluation = trainer.evaluate()
    index = open_run(trainer.run_dir).index() if trainer_class is TIRTrainer else None
    return dict(index=index, batches=batches, losses=[x.detach() for x in losses], grads=grads, seen=list(SEEN), resets=list(Echo.log), log=trainer.state.log_history,
                evaluation=evaluation, parameters=[p.detach().clone() for p in trainer.model.parameters()])


def same_log(ours, theirs):
    "Every number that TRL logs is ours too, timings aside."
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for key, value in b.items():
            if not any(word in key for word in ("time", "runtime", "per_second")):
                assert a[key] == pytest.approx(value, nan_ok=True), key


def assert_same(ours, theirs):
    assert ours["seen"] == theirs["seen"] and ours["resets"] == theirs["resets"]
    assert len(ours["batches"]) == len(theirs["batches"]) > 1
    for a, b in zip(ours["batches"], theirs["batches"]):
        assert set(b) <= set(a) <= set(b) | {"record", "row", "wrote", "tool_mask"}
        for key, value in b.items():
            assert torch.equal(a[key], value), key
    for key in ("losses", "parameters"):
        for a, b in zip(ours[key], theirs[key], strict=True):
            assert torch.equal(a, b), key
    for a, b in zip(ours["grads"], theirs["grads"], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    same_log(ours["log"], theirs["log"])


@pytest.mark.parametrize("accumulation,iterations", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_steps_equal_trl(accumulation, iterations, tmp_path, monkeypatch):
    options = dict(gradient_accumulation_steps=accumulation, num_iterations=iterations)
    theirs, ours = (run(c, "class", tmp_path, monkeypatch, steps=1 + iterations, **options) for c in (GRPOTrainer, TIRTrainer))
    assert_same(ours, theirs)
    assert any(p.abs().sum() > 0 for p in ours["grads"][0])      # there was something to compare
    assert {"answer", "malformed", "max_turns", "length"} <= set(ours["index"].stop)
    assert (ours["index"].failed_calls > 0).any() and (ours["index"].turns > 1).any() and ours["index"].scored_at.notna().all()


@pytest.mark.parametrize("setup", [s for s in SETUPS if s != "class"])
def test_setups_equal_trl(setup, tmp_path, monkeypatch):
    theirs, ours = (run(c, setup, tmp_path, monkeypatch, steps=2) for c in (GRPOTrainer, TIRTrainer))
    assert_same(ours, theirs)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_real_sampling_equals_trl(loss_type, tmp_path):
    "With transformers' own generate the draws are the same too: same prompts, same batches, same generator state."
    def go(trainer_class):
        common = dict(output_dir=str(tmp_path / trainer_class.__name__), max_steps=2, per_device_train_batch_size=GROUP, num_generations=GROUP, seed=5,
                      max_completion_length=64, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, loss_type=loss_type)
        if trainer_class is TIRTrainer:
            args = TIRConfig(malformed_calls="stop", max_observation_chars=None, engine="trl", **common)
        else:
            args = GRPOConfig(use_cpu=True, bf16=False, gradient_checkpointing=False, **common)
        trainer = trainer_class(tiny_policy(), [messy_reward], args, make_tasks("all", n=12), environment_factory=ENVIRONMENTS)
        trainer.train()
        return trainer
    theirs, ours = go(GRPOTrainer), go(TIRTrainer)
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))


def test_observing_a_broken_call_is_the_default(tmp_path, monkeypatch):
    "The listed difference is real: without malformed_calls='stop' the model reads that its call is broken."
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted(SETUPS["class"][1]))
    SEEN.clear()
    args = TIRConfig(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=GROUP, num_generations=GROUP, max_completion_length=BUDGET,
                     save_strategy="no", disable_tqdm=True, max_tool_calling_iterations=2, engine="trl")
    TIRTrainer(small_policy(), [messy_reward], args, make_tasks("all", n=3), environment_factory=Echo).train()
    assert any("malformed tool call" in m["content"] for s in SEEN for c in s[1] for m in c if m["role"] == "tool")
