"""A training step of GTPO, computed by hand from the formulas in the notebooks, beside what the trainer computes."""

import pytest
import torch

from tirlab.core.trajectory import TurnKind
from tirlab.trainer.example import example_inputs, example_trainer

RIGHT = [1.0, 0.0, 1.0, 0.0]   # whether the example's four rollouts end with the right answer
CASES = {"plain": dict(gamma=0.9, format_penalty=0.1),
         "other numbers": dict(gamma=0.5, format_penalty=0.3, tool_bonus=0.2, epsilon=0.05, temperature=0.7),
         "void rollout masked": dict(gamma=0.9, format_penalty=0.1, void_filter="trajectory")}


def returns_of(trajectory, outcome, gamma, format_penalty, tool_bonus):
    "Return R_j = r_j + gamma R_(j+1) of each turn; r_j is format and tool reward, in the last turn the outcome too."
    returns, after = [], 0.0
    for j, turn in reversed(list(enumerate(trajectory.turns))):
        bad_format = turn.kind in (TurnKind.TEXT_POLLUTION, TurnKind.COLLAPSED) or (j == 0 and not turn.calls)
        worked = sum(r.error is None for r in turn.results) / max(len(turn.results), 1)
        after = tool_bonus * worked - format_penalty * bad_format + gamma * after + outcome * (not returns)
        returns.insert(0, after)
    return returns


def advantages_and_mask(trajectories, width, gamma, format_penalty, tool_bonus=0.0, void_filter="none", **rest):
    "Return turn advantages as lists, and token advantages and loss mask, both (B, T), of one group."
    returns = [returns_of(t, right, gamma, format_penalty, tool_bonus) for t, right in zip(trajectories, RIGHT)]
    pooled = torch.tensor(sum(returns, []), dtype=torch.float64)
    by_turn = [[(r - pooled.mean().item()) / (pooled.std().item() + 1e-4) for r in row] for row in returns]
    advantages, mask = torch.zeros(2, len(trajectories), width)
    for i, t in enumerate(trajectories):
        answers = [u.kind is TurnKind.RESPONSE and u.message["content"].strip() for u in t.turns]
        void, start = any(not u.calls and not a for u, a in zip(t.turns, answers)), 0
        for u, advantage in zip(t.turns, by_turn[i]):
            wrote = slice(start, start + len(u.ids))
            advantages[i, wrote], mask[i, wrote] = advantage, not (void and void_filter == "trajectory")
            start += len(u.ids) + len(u.observation_ids)   # what a tool answered keeps 0
    return by_turn, advantages, mask


def log_probabilities(model, inputs, temperature=1.0, **rest):
    "Return the log-probabilities of the completions' tokens under the policy, (B, T)."
    ids, seen = (torch.cat([inputs["prompt_" + k], inputs["completion_" + k]], 1) for k in ("ids", "mask"))
    logits = model(input_ids=ids, attention_mask=seen).logits[:, inputs["prompt_ids"].shape[1] - 1:-1] / temperature
    return logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None])[..., 0]


def loss_and_gradient(model, loss):
    "Return a loss and the norm of its gradient."
    model.zero_grad()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_step_by_hand_is_the_trainers(options):
    trainer = example_trainer(advantage="gtpo", **options)
    inputs, model, epsilon = example_inputs(trainer), trainer.model, options.get("epsilon", 0.2)
    batch, width = trainer.batch, inputs["tool_mask"].shape[1]
    by_turn, advantages, mask = advantages_and_mask(batch.trajectories, width, **options)
    for ours, theirs in zip(by_turn, batch.turn_advantages.tolist()):
        assert ours == pytest.approx(theirs[:len(ours)], abs=1e-6)
    torch.testing.assert_close(inputs["advantages"], advantages, atol=1e-6, rtol=0)
    assert torch.equal(inputs["completion_mask"] * inputs["tool_mask"], mask.long())

    old = log_probabilities(model, inputs, **options).detach()
    for moved in (False, True):   # at first all ratios are 1; after a step they are not, and some are clipped
        ratio = (log_probabilities(model, inputs, **options) - old).exp()
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        assert ((ratio != clipped) * mask).any() == moved
        loss = -(torch.minimum(ratio * advantages, clipped * advantages) * mask).sum() / mask.sum()
        ours = loss_and_gradient(model, loss)
        theirs = loss_and_gradient(model, trainer._compute_loss(model, inputs))
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-6)
        inputs["old_per_token_logps"] = old
        with torch.no_grad():
            for p in model.parameters(): p.sub_(0.02 * p.grad)
