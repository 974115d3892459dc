"What tests of both engines need: rollouts, and transformers' word on their log-probabilities."
import asyncio

import torch
from tirlab.rollout.engines import Sampling, noise_seed, logits_processors
from tirlab.envs.environments import PythonEnvironment
from tirlab.core.formats import ChatFormat
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.schedule import rollouts
from tirlab.envs.tasks import make_tasks

ROWS = [row for row in make_tasks("arithmetic", "test", 8) for _ in range(8)]


def roll(engine, tok, seed=0, schedule="eager", rows=ROWS):
    "64 multi-turn rollouts: 8 tasks, 8 attempts each."
    format = ChatFormat(tok, [PythonEnvironment().python])
    return rollouts(rows, engine, [PythonEnvironment() for _ in rows], [format] * len(rows), RolloutLimits(256), seed=(seed,), schedule=schedule)


@torch.no_grad()
def scored(model, prompt, ids, sampling=Sampling()):   # noqa: B008
    "Log-probabilities of the tokens behind a prompt, by transformers."
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
    return logits_processors(sampling)(None, logits).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def gap(model, trajectories):
    "Largest difference between the sampler's log-probabilities and transformers', over all turns of all trajectories."
    worst = 0.0
    for t in trajectories:
        before = list(t.prompt_ids)
        for turn in t.turns:
            worst = max(worst, (scored(model, before, turn.ids) - torch.tensor(turn.logprobs)).abs().max().item())
            before += turn.ids + list(turn.observation_ids)
    return worst


def ask(engine, prompts, version=0, sampling=Sampling(32)):   # noqa: B008
    "One turn for each prompt, all at once."
    async def all_of_them(): return await asyncio.gather(*(engine.generate(p, sampling_of(sampling, i)) for i, p in enumerate(prompts)))
    with engine.ready(version): return asyncio.run(all_of_them())


def alike(turns, others):
    "The same tokens, with log-probabilities that differ by less than 1e-3."
    same = [(t.ids, t.stop) for t in turns] == [(t.ids, t.stop) for t in others]
    return same and all(abs(a - b) < 1e-3 for x, y in zip(turns, others, strict=True) for a, b in zip(x.logprobs, y.logprobs, strict=True))


def sampling_of(sampling, row):
    from dataclasses import replace
    return replace(sampling, seed=noise_seed(0, 0, row, 0))


def other_weights(model):
    "Move a model's weights a little; what it then says of the same tokens is far from what it said."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p += 0.05 * p.std() * torch.randn_like(p)
    return model
