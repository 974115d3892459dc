"""Clamps: the distribution is the one asked for, sampler and loss agree on it, nothing else changes, and the trainer can be wired to it."""

import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_probes import batch, make
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer import utils as fused_head

from tirlab.all import Sampling, TIRConfig, TIRTrainer, evaluate, make_tasks, tiny_policy
from tirlab.collapse.control_signals import token_roles
from tirlab.eval.evaluate import restore
from tirlab.collapse.interventions import (FLOOR, Bounds, Clamp, HoldTokens, _Clamped, bounds_of, clamp_logprobs, clamped_engine, clamped_loss, clamps_from, next_state, places,
                                  random_clamps, turn_states)
from tirlab.collapse.probes import ControlProbe
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.rollout.engines import generate
from tirlab.core.trajectory import StopReason, Trajectory, Turn, TurnKind
from tirlab.trainer import trainer

TOKENIZER = AutoTokenizer.from_pretrained(tiny_policy())
OPEN, CLOSE, END = (TOKENIZER.convert_tokens_to_ids(t) for t in ("<tool_call>", "</tool_call>", "<|im_end|>"))
TIGHT = [Clamp("<tool_call>", "start", low=0.1, high=0.3), Clamp("<|im_end|>", "outside", low=0.2), Clamp('", "arguments": {"', "inside", high=0.5), Clamp("<|im_end|>", "inside", high=0)]


def policy():
    return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()


# The distribution

@st.composite
def problems(draw):
    "Logits, tokens and bounds whose lower ones add up to at most 1; some of each at 0 or 1."
    vocab = draw(st.integers(2, 9))
    k = draw(st.integers(1, vocab - 1))
    z = torch.tensor(draw(st.lists(st.floats(-30, 30), min_size=vocab, max_size=vocab)), dtype=torch.float64)
    ids = torch.tensor(draw(st.permutations(range(vocab)))[:k])
    two = torch.tensor(draw(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=k, max_size=k)), dtype=torch.float64).sort(1).values
    two[draw(st.lists(st.integers(0, k - 1), max_size=k)), 0] = 0
    two[draw(st.lists(st.integers(0, k - 1), max_size=k)), 1] = 1
    return z[None], ids, (two[:, 0] / max(1.0, two[:, 0].sum().item()))[None], two[None, :, 1]


@settings(max_examples=300, deadline=None)
@given(problems())
def test_bounds_hold_and_all_others_keep_their_proportions(problem):
    z, ids, low, high = problem
    q, p = clamp_logprobs(z, ids, low, high).exp(), z.softmax(1)
    assert q.sum().item() == pytest.approx(1, abs=1e-9) and (q[:, ids] >= low - 1e-9).all() and (q[:, ids] <= high + 1e-9).all()
    at_bound = torch.zeros_like(p, dtype=torch.bool).index_copy_(1, ids, ((q[:, ids] - low).abs() < 1e-9) | ((q[:, ids] - high).abs() < 1e-9))
    factor = (q / p)[~at_bound & (p > 1e-12)]
    if len(factor) and factor[0] > 0 and low.sum() < 1 - 1e-6:   # one factor for all that are free, and whoever is at a bound could not follow it
        assert (factor / factor[0] - 1).abs().max() < 1e-6
        follow = (factor[0] * p[:, ids]).clamp(low, high)
        assert (follow - q[:, ids]).abs().max() < 1e-6
    if ((p[:, ids] >= low) & (p[:, ids] <= high)).all(): assert torch.allclose(q, p, atol=1e-12)


@pytest.mark.parametrize("bound", [0.2, 0.9])
def test_values_and_gradients_are_those_of_changed_logits(bound):
    "The logit that puts a token at its bound, written out; then a numerical check with three tokens."
    torch.manual_seed(0)
    z, ids = torch.randn(6, 11, dtype=torch.float64, requires_grad=True), torch.tensor([4])
    others = torch.cat([z[:, :4], z[:, 5:]], 1).logsumexp(1, keepdim=True)
    changed = torch.cat([z[:, :4], others + torch.tensor(bound / (1 - bound)).log(), z[:, 5:]], 1).log_softmax(1)
    ours, weights = clamp_logprobs(z, ids, *(torch.full((6, 1), bound, dtype=torch.float64),) * 2), torch.randn(6, 11, dtype=torch.float64)
    grads = [torch.autograd.grad((x * weights).sum(), z, retain_graph=True)[0] for x in (ours, changed)]
    assert torch.allclose(ours, changed, atol=1e-6) and torch.allclose(*grads, atol=1e-6) and grads[0].abs().max() > 0.1
    low, high = torch.tensor([[0.3, 0.0, 0.0]] * 6, dtype=torch.float64), torch.tensor([[1, 0.05, 0.01]] * 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: clamp_logprobs(x, torch.tensor([1, 5, 9]), low, high), z)


def test_extremes():
    one = lambda x: torch.tensor([[x]], dtype=torch.float64)
    z, c = torch.tensor([[40.0, 0, 0, -torch.inf]]), torch.tensor([0])
    assert clamp_logprobs(z, c, one(0), one(0))[0].tolist() == pytest.approx([-torch.inf, -0.6931472, -0.6931472, -torch.inf])
    assert clamp_logprobs(z, c, one(1), one(1))[0].tolist() == pytest.approx([0, -torch.inf, -torch.inf, -torch.inf], abs=1e-6)
    assert clamp_logprobs(z, torch.tensor([3]), one(0.5), one(1))[0, 3].exp().item() == pytest.approx(0.5)               # a token that a filter had taken out
    alone = torch.tensor([[0.0, -torch.inf, -torch.inf, -torch.inf]])
    assert torch.equal(clamp_logprobs(alone, c, one(0), one(0)), alone)                                                  # nothing else to draw
    assert clamp_logprobs(torch.tensor([[3.0, 3.0]], dtype=torch.bfloat16), c, one(0), one(0.1)).dtype == torch.float32


# What is asked for

WRONG = {
    "lows add up to more than 1": ([Clamp("<tool_call>", low=0.6), Clamp("<|im_end|>", "start", low=0.6)], "probability of 1.2"),
    "contradiction": ([Clamp("<tool_call>", low=0.6), Clamp("<tool_call>", "inside", high=0.1)], "contradict"),
    "unknown token": ([Clamp("<no_such_thing>")], "'<no_such_thing>'"),
    "split token": ([Clamp("tool_call")], "makes 9 of it"),
    "the same token twice": ([Clamp("\n"), Clamp("Ċ")], "are the same token"),
    "nothing": ([], "nothing to clamp"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_held_is_refused_in_one_sentence(case):
    with pytest.raises(ValueError, match=WRONG[case][1]) as caught: bounds_of(WRONG[case][0], TOKENIZER)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [dict(low=0.7, high=0.2), dict(high=1.5), dict(low=float("nan")), dict(where="middle")])
def test_bounds_that_are_none(wrong):
    with pytest.raises(ValueError, match="cannot be held between|is unknown"): Clamp("<tool_call>", **wrong)


def test_a_tokenizer_without_call_tags():
    "Places inside and outside of calls are refused, the others are not."
    ids = {"a": 0, "<|im_end|>": 1}
    splits = SimpleNamespace(convert_tokens_to_ids=ids.get, unk_token_id=None, eos_token="<|im_end|>", encode=lambda text, **_: [5] * len(text))
    assert bounds_of([Clamp("a", high=0.5)], splits).tags == {}
    with pytest.raises(ValueError, match="splits <tool_call> and </tool_call>"): bounds_of([Clamp("a", "inside", high=0.5)], splits)
    bounds, row = bounds_of([Clamp("a", high=0.5)], splits), Trajectory([0], [Turn([0, OPEN, 1], {}, TurnKind.RESPONSE)], StopReason.ANSWER)
    assert turn_states([row], 3, bounds).tolist() == [[0, 1, 1]] and next_state(torch.tensor([[0, OPEN]]), bounds).tolist() == [1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.lists(st.sampled_from([OPEN, CLOSE, END, 7]), min_size=1, max_size=6), min_size=1, max_size=3), min_size=1, max_size=3))
def test_sampler_and_loss_see_the_same_places(rows):
    "Each token's state in a batch is the one in which the sampler drew it; forbidden places are those of the probe's signals."
    bounds = bounds_of([Clamp(t, "forbidden", high=0) for t in ("<tool_call>", "</tool_call>", "<|im_end|>", "<|im_start|>")], TOKENIZER)
    made = [Trajectory([0], [Turn(ids, {}, TurnKind.RESPONSE, observation_ids=[OPEN, 9]) for ids in turns], StopReason.ANSWER) for turns in rows]
    width = max(len(t.completion_ids) for t in made) + 1
    states, roles = turn_states(made, width, bounds), token_roles(made, bounds.tokens, width)
    for row, t in zip(states, made):
        drawn = [next_state(torch.tensor([u.ids[:i]], dtype=torch.long), bounds).item() if i < len(u.ids) else -1 for u in t.turns for i in range(len(u.ids) + 2)]
        assert row.tolist() == drawn + [-1] * (width - len(drawn))
    assert torch.equal((bounds.high[states.clamp(min=0)] == 0) & (states >= 0)[..., None], roles.forbidden)


def test_bounds_of_a_healthy_run():
    signals = {"probe/tool_call/turn_start_mean": 0.4, "probe/im_end/turn_start_mean": 0.1, "probe/im_end/forbidden_mean": 0.02, "probe/tool_call/forbidden_p90": 0.3}
    assert clamps_from(signals, ["<tool_call>", "<|im_end|>"]) == [Clamp("<tool_call>", "start", low=0.4), Clamp("<|im_end|>", "forbidden", high=0.02)]
    assert clamps_from(signals, ["<tool_call>"], statistic="p90") == [Clamp("<tool_call>", "forbidden", high=0.3)]
    with pytest.raises(ValueError, match="'</tool_call>'"): clamps_from(signals, ["</tool_call>"])


def test_random_clamps_hold_other_tokens_in_the_same_places():
    like = [Clamp("<|im_end|>", "forbidden", high=0.1), Clamp("<tool_call>", "start", low=0.2), Clamp("<|im_end|>", "outside", low=0.05)]
    control = random_clamps(random.Random(1), TOKENIZER, like)
    assert control == random_clamps(random.Random(1), TOKENIZER, like) != random_clamps(random.Random(2), TOKENIZER, like)
    ours, theirs = bounds_of(like, TOKENIZER), bounds_of(control, TOKENIZER)
    assert torch.equal(ours.low, theirs.low) and torch.equal(ours.high, theirs.high) and not {*ours.tokens.values()} & {*theirs.tokens.values()}
    assert not {c.token for c in control} & {*TOKENIZER.get_added_vocab()} and places(like[0], "<|im_end|>") == ("start", "inside")
    assert {c.token for c in random_clamps(random.Random(1), TOKENIZER, like, among=["1", "2", "<tool_call>"])} == {"1", "2"}
    with pytest.raises(ValueError, match="among 1"): random_clamps(random.Random(1), TOKENIZER, like, among=["1"])


# In sampling

def test_frequencies_are_the_held_probabilities():
    "Chi-square over the first tokens of 1,600 turns, with a temperature."
    model, n = policy(), 1600
    prompt = evaluate(model, TOKENIZER, make_tasks("arithmetic", "test", 1), ENVIRONMENTS).trajectories[0].prompt_ids
    bounds = bounds_of([Clamp("<tool_call>", "start", high=0.25), Clamp("<|im_end|>", "start", low=0.15)], TOKENIZER)
    turns = [t.ids[0] for i in range(0, n, 400) for t in generate(_Clamped(model, bounds), TOKENIZER, [prompt] * 400, [Sampling(1, 0.7, seed=s) for s in range(i, i + 400)])]
    with torch.no_grad(): z = model(torch.tensor([prompt])).logits[:, -1] / 0.7
    q = clamp_logprobs(z, *bounds.to("cpu")[:1], bounds.low[:1], bounds.high[:1]).exp()[0].double()
    assert q[OPEN].item() == pytest.approx(0.25) and q[END].item() == pytest.approx(0.15)
    counts, common = torch.bincount(torch.tensor(turns), minlength=len(q)).double(), q * n >= 5
    seen, want = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, q * n))
    chi = ((seen - want).square() / want).sum().item()
    assert chi < torch.distributions.Chi2(torch.tensor(float(len(seen) - 1))).mean + 3.5 * (2 * (len(seen) - 1)) ** 0.5, chi


def test_scores_within_bounds_are_not_touched():
    scores, ids = torch.randn(5, len(TOKENIZER)), torch.randint(200, (5, 7))
    wide = bounds_of([Clamp("<tool_call>", low=0, high=0.99), Clamp("a", "start", low=0.9)], TOKENIZER)
    assert torch.equal(HoldTokens(wide, 3)(ids, scores), scores)
    assert HoldTokens(wide, 7)(ids, scores)[:, TOKENIZER.convert_tokens_to_ids("a")].exp().tolist() == pytest.approx([0.9] * 5)


def test_the_engine_says_what_the_loss_says():
    model = policy()
    bounds = bounds_of(TIGHT, TOKENIZER)
    rows = evaluate(model, TOKENIZER, make_tasks("arithmetic", "test", 16), ENVIRONMENTS, sampling=Sampling(2**31, 0.7), engine=clamped_engine(model, TOKENIZER, bounds)).trajectories
    fused_head.add_fused_lm_head(model, temperature=0.7)
    for t in rows:
        ids, wrote = torch.tensor([t.prompt_ids + t.completion_ids]), torch.tensor(t.mask).bool()
        with clamped_loss(model, bounds, turn_states([t], len(wrote), bounds)), torch.no_grad():
            logp = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0, -len(wrote):]
        assert (logp - torch.tensor(t.logprobs))[wrote].abs().max() < 1e-4
    assert sum(len(t.turns) > 1 for t in rows) >= 2


def test_a_policy_with_one_logit_too_high_gets_its_ability_back():
    tilted, tasks = policy(), make_tasks("lookup", "test", 32)
    base = evaluate(tilted, TOKENIZER, tasks, ENVIRONMENTS).success
    tilted.lm_head.bias = torch.nn.Parameter(torch.zeros(len(TOKENIZER)).index_fill(0, torch.tensor([END]), 4.0))
    corrected = evaluate(tilted, TOKENIZER, tasks, ENVIRONMENTS, engine=clamped_engine(tilted, TOKENIZER, bounds_of([Clamp("<|im_end|>", "forbidden", high=0)], TOKENIZER)))
    assert evaluate(tilted, TOKENIZER, tasks, ENVIRONMENTS).success < base / 3 and corrected.success > base * 2 / 3


# In the loss

ABOUNDS = Bounds({"a": 3, "b": 7}, torch.tensor([[0.3, 0], [0, 0], [0.0, 0.2]]).double(), torch.tensor([[1.0, 0.01], [1, 1], [0.002, 1]]).double(), {}, "b")
STATES = torch.randint(-1, 3, (5, 9), generator=torch.Generator().manual_seed(0))


def explicit(model, ids, mask, labels, bounds=ABOUNDS, temperature=0.7):
    "Log-probabilities of the completions from all logits of the plain forward pass, held row by row."
    z = type(model).forward(model, input_ids=ids, attention_mask=mask).logits[:, -10:-1].float() / temperature
    state = STATES.masked_fill(labels[:, -9:] == -100, -1)
    q = torch.stack([clamp_logprobs(row[None], *bounds.to("cpu")[:1], bounds.low[s, None], bounds.high[s, None])[0] if s >= 0 else row.log_softmax(0)
                     for row, s in zip(z.flatten(0, 1), state.flatten())])
    return q.gather(1, ids[:, -9:].reshape(-1, 1)).view(5, 9).clamp(min=FLOOR).masked_fill(labels[:, -9:] == -100, 0)


def clamped(model, ids, mask, labels, size=5, bounds=ABOUNDS):
    with clamped_loss(model, bounds, STATES):
        return torch.cat([model(input_ids=ids[i:i + size], attention_mask=mask[i:i + size], labels=labels[i:i + size], fused_lm_head=True).log_probs[:, -9:] for i in range(0, 5, size)])


@pytest.mark.parametrize("size, compact, checkpointing", [(5, False, False), (2, False, True), (1, True, False)])
@pytest.mark.parametrize("head", ["Qwen2 tied", "Gemma2, soft cap", "Phi, bias", "Cohere, logit scale"])
def test_loss_and_gradients_are_those_of_all_logits(head, size, compact, checkpointing, monkeypatch):
    "In pieces, with a kernel that gets labelled positions only, with gradient checkpointing; held tokens are among those sampled."
    monkeypatch.setattr(fused_head, "_use_triton", lambda device: compact)
    monkeypatch.setattr("tirlab.collapse.interventions.CHUNK", 4)
    model, (ids, mask, labels), weights = make(head), batch(), torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    ids[0, -4:] = labels[0, -4:] = torch.tensor([3, 7, 3, 7])
    if checkpointing: model.gradient_checkpointing_enable()
    results = []
    for score in (lambda: clamped(model, ids, mask, labels, size), lambda: explicit(model, ids, mask, labels)):
        model.zero_grad()
        logp = score()
        (logp * weights).sum().backward()
        results.append([logp.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results, strict=True): assert (ours - theirs).abs().max() < 1e-4 * max(1, theirs.abs().max().item())
    with torch.no_grad(): plain = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -9:]
    assert (results[0][0] - plain).abs().max() > 0.1


def test_bfloat16_rounds_as_the_kernel():
    model, inputs = make("Qwen2 tied", dtype=torch.bfloat16), batch()
    with torch.no_grad(): ours, theirs, full = clamped(model, *inputs), explicit(model, *inputs), explicit(make("Qwen2 tied"), *inputs)
    assert ours.dtype == torch.float32 and (ours - theirs).abs().max() < (theirs - full).abs().max() / 2   # far below the head's own rounding


def test_a_suppressed_token_that_was_sampled_has_no_gradient():
    model, (ids, mask, labels) = make("Qwen2 tied"), batch()
    ids[:, -9:] = 3
    never = Bounds({"a": 3}, torch.zeros(3, 1).double(), torch.zeros(3, 1).double(), {}, "b")
    logp = clamped(model, ids, mask, ids.masked_fill(labels == -100, -100), bounds=never)
    gone = (STATES >= 0) & (labels[:, -9:] != -100)
    assert (logp[gone] == FLOOR).all() and (logp[~gone] > FLOOR).all() and logp.exp().isfinite().all()
    logp[gone].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_probe_hears_the_policy_as_it_is():
    model, (ids, mask, labels), probe = make("Qwen2 tied"), batch(), ControlProbe({"a": 3, "b": 7})
    heard, kernel = [], fused_head._ChunkedLogProbFunction
    for bounds in (None, ABOUNDS):
        with probe.watch(model): logp = clamped(model, ids, mask, labels) if bounds else model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -9:]
        heard.append([logp, *probe.read(logp)])
    assert not torch.equal(heard[0][0], heard[1][0]) and all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(heard[0][1:], heard[1][1:]))
    assert fused_head._ChunkedLogProbFunction is kernel and not model._forward_pre_hooks


def test_a_head_that_scores_something_else():
    kernel = fused_head._ChunkedLogProbFunction
    model, (ids, mask, labels) = make("Qwen2 tied"), batch()
    def short(hidden, weight, bias, targets, *rest): return inner.apply(hidden[1:], weight, bias, targets[1:], *rest)
    with pytest.raises(ValueError, match="scored 69 positions"), clamped_loss(model, ABOUNDS, STATES):
        inner = fused_head._ChunkedLogProbFunction
        fused_head._ChunkedLogProbFunction = SimpleNamespace(apply=short)
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    assert fused_head._ChunkedLogProbFunction is kernel


# In the trainer

def length_reward(completions, **_):
    return [float(len(str(c)) % 7) for c in completions]


def run(folder, steps=2, clamps=None, **options):
    common = dict(output_dir=str(folder), max_steps=steps, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=8, max_completion_length=64, seed=0,
                  learning_rate=1e-4, save_strategy="no", disable_tqdm=True, report_to="none", probe="on", temperature=0.7, trace=False)
    t = TIRTrainer(tiny_policy(), length_reward, TIRConfig(**common | options), make_tasks("arithmetic", n=8), environment_factory=ENVIRONMENTS, interventions=clamps)
    t.seen, score = [], trainer.score_tokens
    def note(t, model, inputs):   # importance ratios, against the sampler where there is no older forward pass
        out, mask = score(t, model, inputs), (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        t.seen.append((out[0].detach() - inputs.get("old_per_token_logps", inputs["sampling_per_token_logps"])).exp()[mask])
        return out
    with mock.patch.object(trainer, "score_tokens", note): t.train()
    return t, {k: [m[k] for m in t.state.log_history if k in m] for m in t.state.log_history for k in m}


def test_trainer_with_both_sides_clamped(tmp_path):
    "Sampler and loss agree, so do the probabilities before a step and in it; also where a batch serves two steps, and with a reference."
    t, logs = run(tmp_path / "one", clamps=TIGHT)
    assert max(logs["sync/gap_max"]) < 1e-3 and len(t.seen) == 4 and (torch.cat(t.seen) - 1).abs().max() < 1e-4
    assert not torch.equal(t.model.lm_head.weight, policy().lm_head.weight)
    t, logs = run(tmp_path / "two", clamps=TIGHT, gradient_accumulation_steps=1, steps_per_generation=2, beta=0.1)
    assert logs["sync/gap_max"][0] < 1e-3 and (t.seen[0] - 1).abs().max() < 1e-4 and logs["kl"][0] == pytest.approx(0, abs=1e-6) and logs["kl"][1] > 0


def test_the_trainers_loss_is_that_of_all_logits(tmp_path):
    "Value and gradients of one loss, and again with logits that are made for every position and held one by one."
    t, _ = run(tmp_path, steps=1, clamps=TIGHT, gradient_accumulation_steps=1, loss_type="grpo")
    t.model.train()
    inputs = t._generate_and_score_completions([t.train_dataset[0]] * 8)
    ids, attention = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
    mask, states, results = inputs["completion_mask"] * inputs["tool_mask"], inputs["states"].flatten(), []
    def plain():
        z = t.model(input_ids=ids, attention_mask=attention).logits[:, -mask.shape[1] - 1:-1].flatten(0, 1) / 0.7
        q = torch.where((states >= 0)[:, None], clamp_logprobs(z, t.bounds.to("cpu")[0], t.bounds.low[states], t.bounds.high[states]), z.log_softmax(1))
        ratio = (logp := q.gather(1, inputs["completion_ids"].view(-1, 1)).view_as(mask)).sub(logp.detach()).exp()
        return -((ratio * inputs["advantages"].view(len(mask), -1) * mask).sum(1) / mask.sum(1)).mean()
    for loss in (lambda: t._compute_loss(t.model, inputs), plain):
        t.model.zero_grad()
        value = loss()
        value.backward()
        results.append([value.detach(), *(p.grad.clone() for p in t.model.parameters())])
    for ours, theirs in zip(*results, strict=True): assert (ours - theirs).abs().max() < 1e-5
    assert max(g.abs().max() for g in results[0][1:]) > 0.01


def test_trainer_with_one_side_clamped(tmp_path):
    "Sampling only: the gap says that the policy in training is another one. Training only: a suppressed token that was sampled makes nothing infinite."
    assert max(run(tmp_path / "sampling", steps=1, clamps=TIGHT, intervene="sampling")[1]["sync/gap_max"]) > 0.1
    t, logs = run(tmp_path / "training", steps=1, clamps=[Clamp("<tool_call>", "start", high=0)], intervene="training")
    assert max(logs["sync/gap_max"]) > 50 and all(torch.tensor(v).isfinite().all() for k, v in logs.items() if k in ("loss", "grad_norm"))
    assert all(p.isfinite().all() for p in t.model.parameters())


def test_clamps_that_hold_nothing_change_nothing(tmp_path):
    loose = [Clamp("<tool_call>", "everywhere", high=0.9999999), Clamp("a", "start", low=0)]
    (plain, _), (clamps, _) = (run(tmp_path / str(i), steps=1, clamps=c) for i, c in enumerate(([], loose)))
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), clamps.model.parameters(), strict=True))


def test_clamps_come_and_go_while_training(tmp_path):
    "From the next batch on, in sampler and loss at once; engines that cannot hold are refused."
    class Switch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step < 3: t.intervene([Clamp("<tool_call>", "start", high=0)] if state.global_step == 1 else None)
    t = TIRTrainer(tiny_policy(), length_reward, TIRConfig(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=16, num_generations=8, max_completion_length=96, seed=0,
                   learning_rate=1e-5, save_strategy="no", report_to="none", trace=False), make_tasks("arithmetic", n=8), environment_factory=ENVIRONMENTS, callbacks=[Switch()])
    t.train()
    logs = t.state.log_history[:-1]
    assert [m["turns/tool_call"] > 0 for m in logs] == [True, False, True] and max(m["sync/gap_max"] for m in logs) < 1e-3
    assert min(m["probe/tool_call/turn_start_mean"] for m in logs) > 0.3   # the probe hears the policy itself
    t.args.intervene, t.engine_name = "both", "continuous"
    with pytest.raises(ValueError, match="choose that engine"): t.intervene([Clamp("<tool_call>", high=0)])


def test_restore(tmp_path):
    same = restore(policy(), TOKENIZER, [Clamp("<tool_call>", "start", high=0)], make_tasks("lookup", "test", 8), ENVIRONMENTS)
    assert not any(t.calls for t in same.trajectories)
