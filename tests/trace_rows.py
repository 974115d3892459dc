"""Small run folders for tests: trajectories that look like a calculator task, with invented numbers."""
import json
import re

import numpy as np

from tirlab.traces.run import RunWriter, TraceRow, trace_id

CONTROL = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_PIECE = re.compile(r"<[^<>\s]+>|\w+| ?[^\w\s]|\s+")


def pieces(text):
    "A tokenizer good enough for a picture."
    return _PIECE.findall(text)


def _call(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call><|im_end|>\n"


def _answer(text):
    return f"<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def make_row(step=0, row=0, skill=0.5, rank=0, split="train", seed=0, **changes):
    "A trajectory of two or three turns; the better the `skill` (0 to 1), the likelier it is right."
    rng = np.random.default_rng([seed, step, row, rank])
    a, b, c = (int(x) for x in np.random.default_rng([seed, step, row // 4]).integers(2, 60, 3))   # one prompt a group
    right, stumbles = rng.random() < skill, rng.random() < 0.4
    answer = (a + b) * c if right else (a + b) * c + int(rng.integers(1, 9))
    parts = [("", True, 0)]
    if stumbles:
        parts += [(_call("python", code=f"print({a} + )"), True, 0), (_answer("SyntaxError: invalid syntax (<input>, line 1)"), False, 0)]
    turn = int(stumbles)
    parts += [(_call("python", code=f"print(({a} + {b}) * {c})"), True, turn), (_answer(answer), False, turn),
              (f"The sum is {a + b}, and ({a} + {b}) × {c} = {answer}.\nAnswer: {answer}<|im_end|>", True, turn + 1)]
    text, mask, turns = [], [], []
    for part, wrote, number in parts:
        new = pieces(part)
        text, mask, turns = text + new, mask + [int(wrote)] * len(new), turns + [number] * len(new)
    return _scored(rng, step, row, rank, split, text, mask, turns, right, stumbles, f"What is ({a} + {b}) * {c}?", (a + b) * c, changes)


def _scored(rng, step, row, rank, split, text, mask, turns, right, stumbles, question, answer, changes):
    "The numbers of a trajectory, NaN for what the model did not write."
    n, wrote = len(text), np.array(mask) == 1
    logprob = np.where(wrote, -rng.gamma(0.25, 1.2, n), np.nan)
    rewards = [-0.1] * stumbles + [0.0, float(right)]
    advantages = [float(x) for x in np.round((np.array(rewards) + 0.9 * right - 0.5) * 1.3, 2)]
    system = "<|im_start|>system\nYou solve problems with tools.<|im_end|>\n"
    prompt = f"{system}<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    values = {
        "id": trace_id(step, rank, row, split), "step": step, "scored_at": step, "split": split, "rank": rank, "group": row // 4,
        "environment": "arithmetic",
        "reward": float(right), "rewards": {"answer": float(right), "format": -0.1 * stumbles}, "answer": str(answer),
        "stop": "answer" if right else "max_turns",
        "turn_kinds": ["tool_call"] * (1 + stumbles) + ["response"], "turn_rewards": rewards, "turn_advantages": advantages, "calls": 1 + stumbles,
        "failed_calls": int(stumbles), "tool_seconds": 0.02, "prompt_text": pieces(prompt), "prompt_ids": range(len(pieces(prompt))),
        "ids": rng.integers(0, 500, n), "text": text, "mask": mask, "turn": turns, "logprob": logprob,
        "entropy": np.where(wrote, -logprob * 0.8 + rng.gamma(0.3, 0.4, n), np.nan), "sampling_logprob": logprob + rng.normal(0, 0.01, n),
        "advantage": np.where(wrote, np.array(advantages)[turns], 0)}
    return TraceRow(**values | changes)


def add_steps(writer, steps, per_step=8, seed=0):
    "Write whole steps of a run that learns."
    for step in steps:
        rows = [make_row(step, i, skill=0.35 + 0.55 * (1 - np.exp(-step / 8)), seed=seed) for i in range(per_step)]
        writer.append_index(writer.write_tokens(step, rows))
        writer.log(step, {"reward": np.mean([r.reward for r in rows]), "tools/call_frequency": np.mean([r.calls for r in rows]),
                          "tools/failure_frequency": np.mean([r.failed_calls for r in rows]) / 2,
                          "entropy": 0.2 + 0.6 * np.exp(-step / 10), "completions/mean_length": np.mean([len(r.ids) for r in rows])})
        writer.beat(step, force=True)


def make_run(path, steps=3, per_step=8, status="finished", error=None, seed=0, **meta):
    "A whole run folder; `status='running'` leaves it open."
    facts = {"model": "tiny-policy", "config": {"learning_rate": 1e-3, "num_generations": 4, "advantage": "gtpo"},
             "versions": {"tirlab": "0.1.0"}, "control_tokens": CONTROL} | meta
    writer = RunWriter(path, facts)
    add_steps(writer, range(1, steps + 1), per_step, seed)
    if status != "running":
        writer.close(status, error)
    return writer
