"""A policy for tests of training rather than of what is written: the tiny policy's tokenizer, and one layer that ends its turn after a few tokens and calls no tool."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from tirlab.core.tiny import tiny_model, tiny_policy, tiny_tokenizer


@cache
def small_policy() -> str:
    "Return the folder of the policy, made once a process."
    folder = tempfile.mkdtemp(prefix="small-policy-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copytree(tiny_policy(), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors", "config.json"))
    with torch.random.fork_rng(): model = tiny_model(tok := tiny_tokenizer(), hidden_size=32, layers=1)
    with torch.no_grad():   # one number that all tokens share lifts the end of a turn to about one in four
        model.model.embed_tokens.weight[:, 0] = 0.06
        model.model.embed_tokens.weight[tok.eos_token_id, 0] = 1.7
    model.save_pretrained(Path(folder))
    return folder


def halves(completions, **kwargs):
    "A reward of 0 and 1 in turn, whatever was written."
    return [float(i % 2) for i in range(len(completions))]
