"""Clip-Cov, KL-Cov, positive likelihood and Prop. 3.1 against TRL's own `_compute_loss`, which runs here on bare logits, for every loss type."""

import inspect
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from tirlab.config.tir_config import TIRConfig
from tirlab.collapse.probes import by_turn, surprise
from tirlab.algorithms.losses import clip_cov_mask, covariances, kl_cov_terms, positive_nll_terms, ppo_clipped, token_weights
from tirlab.trainer.credit import extra_loss, kept_advantages

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
TAU = dict(sapo_temperature_pos=1.0, sapo_temperature_neg=1.05)


class Bare:
    "What TRL's `_compute_loss` needs of a trainer, on logits in place of a model; and the additions, as the recipe in nbs/30_algorithms/02_losses.ipynb says."
    aux_loss_enabled, top_entropy_quantile, off_policy_mask_threshold, use_adaptive_entropy = False, 1.0, None, False
    use_vllm = vllm_importance_sampling_correction = False
    get_off_policy_mask, get_gamma_weights = staticmethod(GRPOTrainer.get_off_policy_mask), staticmethod(GRPOTrainer.get_gamma_weights)
    get_high_entropy_mask = GRPOTrainer.get_high_entropy_mask

    def __init__(self, logits, loss_type, beta=0.0, entropy_coef=0.0, accumulation=1, steps=1, processes=1, level="token", training=True, delta=None,
                 epsilon_high=0.2, clip_cov=None, terms=None, **more):
        self.logits, self.loss_type, self.beta, self.importance_sampling_level = logits, loss_type, beta, level
        self.entropy_coef, self._entropy_bonus_enabled, self.current_gradient_accumulation_steps = entropy_coef, entropy_coef != 0, accumulation
        self.epsilon_low, self.epsilon_high, self.max_completion_length = 0.2, epsilon_high, 16
        self.model, self._metrics = SimpleNamespace(training=training), {"train": defaultdict(list), "eval": defaultdict(list)}
        self.args = SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=steps, **TAU,
                                    vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0)
        same = lambda x, **_: x
        self.accelerator = SimpleNamespace(num_processes=processes, gather=same, reduce=same, sync_gradients=True, pad_across_processes=same)
        self.clip_cov, self.terms, self._now = clip_cov, terms, None
        for name, value in more.items(): setattr(self, name, value)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        out = self.score(self.completion_ids)
        if self._now is not None:
            self._now["logp"] = out[0]
            mask = self._now["completion_mask"] * self._now["tool_mask"]
            if self.clip_cov: self._now["advantages"] = expand(self._now["advantages"], out[0]) * self.clip_cov(out[0].detach(), self._now, mask)
        return out

    def score(self, ids):
        logps = self.logits.log_softmax(-1)
        return logps.gather(-1, ids[..., None])[..., 0], -(logps.exp() * logps).sum(-1), None

    def plain(self, inputs):
        self.completion_ids = inputs["completion_ids"]
        return GRPOTrainer._compute_loss(self, None, inputs)

    def loss(self, inputs):
        self._now = dict(inputs)
        try: loss, now = self.plain(self._now), self._now
        finally: self._now = None
        if not self.terms: return loss
        mask = now["completion_mask"] * now["tool_mask"]
        return loss + (self.terms(now["logp"], now, mask) * self.weights(mask, inputs)).sum()

    def weights(self, mask, inputs):
        training, accumulation, p = self.model.training, self.current_gradient_accumulation_steps, self.accelerator.num_processes
        windows, accumulation = (p * self.args.steps_per_generation / accumulation, accumulation) if training else (p, 1)
        return token_weights(mask.double(), self.loss_type, inputs["num_items_in_batch"], windows, self.max_completion_length, accumulation)


def expand(advantages, like): return (advantages[:, None] if advantages.dim() == 1 else advantages).expand_as(like)


def batch(rows=4, width=9, vocab=11, seed=0, by_token=True, drift=0.3, dtype=torch.float64):
    "Logits with gradient, and what TRL's loss is given: rows of different length, observations among them, a policy that has moved."
    rng = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(rows, width, vocab, generator=rng, dtype=dtype)).requires_grad_()
    ids = torch.randint(vocab, (rows, width), generator=rng)
    logp = logits.detach().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    lengths = torch.randint(2, width + 1, (rows,), generator=rng)
    completion_mask = (torch.arange(width) < lengths[:, None]).long()
    tool_mask = torch.ones_like(completion_mask)
    tool_mask[:, 1::4] = 0
    advantages = torch.randn(rows, width if by_token else 1, generator=rng, dtype=dtype)
    if not by_token: advantages = advantages[:, 0]
    noise = lambda: logp + drift * torch.randn(rows, width, generator=rng, dtype=dtype)
    return logits, dict(prompt_ids=ids[:, :1], prompt_mask=ids[:, :1] * 0 + 1, completion_ids=ids, completion_mask=completion_mask,
                        tool_mask=tool_mask, advantages=advantages, old_per_token_logps=noise(), ref_per_token_logps=noise(),
                        num_items_in_batch=(completion_mask * tool_mask).sum())


def gradient(loss, logits): return torch.autograd.grad(loss, logits)[0]


def ratio_of(logits, x, level="token"):
    logp = logits.detach().log_softmax(-1).gather(-1, x["completion_ids"][..., None])[..., 0]
    return logp, (logp - x["old_per_token_logps"]).exp()


# The seam

def test_trl_asks_for_log_probabilities_before_it_reads_the_advantages():
    "Clip-Cov rests on this order."
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert source.index("self._get_per_token_logps_and_entropies(") < source.index('advantages = inputs["advantages"]')
    assert source.count('inputs["advantages"]') == 1


@pytest.mark.parametrize("by_token", (True, False))
@pytest.mark.parametrize("kind", LOSSES)
def test_switched_off_is_trls_to_the_bit(kind, by_token):
    logits, x = batch(by_token=by_token)
    off = dict(clip_cov=lambda lp, x, m: clip_cov_mask(lp, x["advantages"], m, ratio=0),
               terms=lambda lp, x, m: (kl_cov_terms(lp, x["old_per_token_logps"], x["advantages"], m, coef=0)
                                       + positive_nll_terms(lp, x["advantages"], m, coef=0)))
    options = dict(beta=0.1, entropy_coef=0.01, accumulation=2, steps=4)
    ours, theirs = Bare(logits, kind, **options, **off).loss(x), Bare(logits, kind, **options).plain(x)
    assert ours.equal(theirs) and gradient(ours, logits).equal(gradient(theirs, logits))


# Weights

@pytest.mark.parametrize("setting", (dict(), dict(accumulation=2, steps=4), dict(accumulation=4, steps=2, processes=2),
                                     dict(training=False, processes=2)))
@pytest.mark.parametrize("kind", LOSSES)
def test_weights_are_trls_denominators(kind, setting):
    "With beta = 1 the KL term, which enters TRL's sum bare, shows the weight of each token."
    logits, x = batch(by_token=False)
    x["num_items_in_batch"] = torch.tensor(37)
    trainer, mask = Bare(logits, kind, beta=1.0, **setting), x["completion_mask"] * x["tool_mask"]
    logp = trainer.score(x["completion_ids"])[0]
    with_kl, without = trainer.plain(x), Bare(logits, kind, **setting).plain(x)
    gap = x["ref_per_token_logps"] - logp
    assert torch.allclose(with_kl - without, ((gap.exp() - gap - 1) * trainer.weights(mask, x)).sum(), atol=1e-10)


def test_an_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="Unknown loss type"): token_weights(torch.ones(1, 1), "ppo")


# Clip-Cov

def slow_clip_cov(logp, old, advantages, mask, ratio, low, high, epsilon, draw):
    "The candidates in a loop, as verl finds them; `draw` picks among them."
    places = [(i, t) for i in range(len(logp)) for t in range(logp.shape[1]) if mask[i, t]]
    mean = lambda x: sum(float(x[p]) for p in places) / len(places)
    ma, ml, found = mean(advantages), mean(logp), []
    for p in places:
        a, r = float(advantages[p]), float((logp[p] - old[p]).exp())
        if -a * min(max(r, 1 - epsilon), 1 + epsilon) > -a * r: continue
        if low < (a - ma) * (float(logp[p]) - ml) < high: found.append(p)
    return draw(found, max(int(ratio * len(places)), 1))


@pytest.mark.parametrize("ratio", (1e-4, 0.2, 1.0))
def test_clip_cov_takes_verls_candidates(ratio):
    for seed in range(5):
        logits, x = batch(rows=6, width=12, seed=seed)
        logp, r = ratio_of(logits, x)
        mask, a = x["completion_mask"] * x["tool_mask"], x["advantages"]
        options = dict(low=0.2, high=2.0)
        keep = clip_cov_mask(logp, a, mask, ppo_clipped(r, a), ratio, **options, generator=torch.Generator().manual_seed(seed))
        candidates = slow_clip_cov(logp, x["old_per_token_logps"], a, mask, ratio, 0.2, 2.0, 0.2, lambda found, n: (set(found), n))
        taken = {tuple(p) for p in (keep == 0).nonzero().tolist()}
        assert taken <= candidates[0] and len(taken) == min(candidates[1], len(candidates[0]))
        assert keep.equal(clip_cov_mask(logp, a, mask, ppo_clipped(r, a), ratio, **options, generator=torch.Generator().manual_seed(seed)))


def test_clip_cov_draws_evenly():
    logp, a, mask = torch.tensor([[-0.1, -0.1, -0.1, -4.0]]), torch.tensor([[1.0, 1.0, 1.0, -1.0]]), torch.ones(1, 4)
    rng = torch.Generator().manual_seed(0)
    taken = sum(1 - clip_cov_mask(logp, a, mask, low=0.4, high=1.0, generator=rng) for _ in range(600))
    assert taken[0, 3] == 0 and taken[0, :3].sum() == 600 and (taken[0, :3] - 200).abs().max() < 60


def test_every_part_of_a_step_and_every_process_draws_for_itself():
    "Hundreds of candidates, of which a few go: others for another step, part or process; the same for the same."
    logp, advantages = torch.randn(4, 500, generator=torch.manual_seed(0)) - 3, torch.randn(4, 500, generator=torch.manual_seed(1))
    def taken(*draw, seed=0):
        args = TIRConfig(clip_cov_ratio=0.02, clip_cov_bounds=[0.1, 50.0], seed=seed)
        return tuple(map(tuple, (kept_advantages(args, logp, dict(advantages=advantages), torch.ones(4, 500), draw) == 0).nonzero().tolist()))
    draws = [taken(*d) for d in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1))] + [taken(0, 0, 0, seed=1)]
    assert all(len(d) == 40 for d in draws) and len(set(draws)) == len(draws) and taken(0, 1, 0) == draws[2]


@pytest.mark.parametrize("by_token", (True, False))
@pytest.mark.parametrize("kind", LOSSES)
def test_clip_cov_through_the_advantages_is_a_product_with_the_policy_loss(kind, by_token):
    "TRL's denominators, KL term and entropy bonus stay: what changes is the policy gradient at the chosen tokens, to zero."
    logits, x = batch(by_token=by_token, seed=3)
    taken = torch.zeros_like(x["completion_mask"])
    taken[0, 0] = taken[2, 2] = 1
    options = dict(beta=0.2, entropy_coef=0.05)
    ours = gradient(Bare(logits, kind, **options, clip_cov=lambda lp, x, m: 1 - taken).loss(x), logits)
    theirs = gradient(Bare(logits, kind, **options).plain(x), logits)
    rest = gradient(Bare(logits, kind, **options).plain(x | {"advantages": torch.zeros_like(x["advantages"])}), logits)   # no policy term at all
    assert torch.allclose(ours, torch.where(taken[..., None].bool(), rest, theirs), atol=1e-12)


def test_clip_cov_beside_trls_off_policy_mask_and_sequence_ratios():
    logits, x = batch(by_token=False, seed=4)
    taken = torch.zeros_like(x["completion_mask"])
    taken[:, 0] = 1
    for more in (dict(off_policy_mask_threshold=0.01), dict(level="sequence")):
        ours, theirs = Bare(logits, "bnpo", clip_cov=lambda lp, x, m: 1 - taken, **more).loss(x), Bare(logits, "bnpo", **more).plain(x)
        trainer = Bare(logits, "dr_grpo", **more)   # a constant denominator: the sum of the per-token losses
        alone = trainer.plain(x | {"advantages": expand(x["advantages"], x["old_per_token_logps"]) * taken})
        assert torch.allclose(theirs - ours, alone * 4 * 16 / x["num_items_in_batch"], atol=1e-12) and (theirs - ours).abs() > 1e-6


# KL-Cov

def test_kl_cov_is_verls_by_hand():
    "-A rho everywhere, and coef |log rho| more on the tokens of largest covariance: TRL's loss with a clip that never acts."
    for seed in range(4):
        logits, x = batch(rows=5, width=10, seed=seed)
        mask, ratio, coef = x["completion_mask"] * x["tool_mask"], 0.15, 0.7
        terms = lambda lp, now, m: kl_cov_terms(lp, now["old_per_token_logps"], now["advantages"], m, ratio, coef)   # noqa: B023
        trainer = Bare(logits, "bnpo", epsilon_high=1e6, terms=terms, epsilon_low=1e6)
        trainer.epsilon_low = 1e6
        logp = trainer.score(x["completion_ids"])[0]
        gap, live = logp - x["old_per_token_logps"], mask.bool()
        a, flat = x["advantages"][live], logp[live].detach()
        top = ((a - a.mean()) * (flat - flat.mean())).topk(max(1, int(len(a) * ratio))).indices
        losses = -a * gap[live].exp()
        expected = (losses.sum() + coef * gap[live][top].abs().sum()) / live.sum()
        assert torch.allclose(trainer.loss(x), expected, atol=1e-10)
        assert torch.allclose(gradient(trainer.loss(x), logits), gradient(expected, logits), atol=1e-10)


def test_kl_cov_has_no_gradient_where_nothing_has_moved():
    logits, x = batch()
    logp = logits.log_softmax(-1).gather(-1, x["completion_ids"][..., None])[..., 0]
    terms = kl_cov_terms(logp, logp, x["advantages"], x["completion_mask"], ratio=0.5)
    assert gradient(terms.sum(), logits).eq(0).all()


# Positive likelihood

@pytest.mark.parametrize("kind", LOSSES)
def test_positive_likelihood_adds_what_it_says(kind):
    logits, x = batch(seed=2)
    trainer = Bare(logits, kind, terms=lambda lp, now, m: positive_nll_terms(lp, now["advantages"], m, 0.3))
    mask = x["completion_mask"] * x["tool_mask"]
    slope = gradient(trainer.loss(x), logits) - gradient(trainer.plain(x), logits)
    onehot = torch.nn.functional.one_hot(x["completion_ids"], 11) - logits.detach().softmax(-1)
    expected = -0.3 * (x["advantages"] > 0)[..., None] * onehot * trainer.weights(mask, x)[..., None]
    assert torch.allclose(slope, expected, atol=1e-12)


# Observations, empty batches

@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_nothing_reaches_an_observation(seed):
    logits, x = batch(seed=seed)
    logp, r = ratio_of(logits, x)
    logp = logp.requires_grad_()
    mask, a = x["completion_mask"] * x["tool_mask"], x["advantages"]
    terms = kl_cov_terms(logp, x["old_per_token_logps"], a, mask, 0.3) + positive_nll_terms(logp, a, mask, 0.1)
    off, slope = mask == 0, torch.autograd.grad(terms.sum(), logp, allow_unused=True)[0]
    assert terms[off].eq(0).all() and slope[off].eq(0).all() and covariances(logp, a, mask)[off].eq(0).all()
    assert clip_cov_mask(logp, a, mask, ppo_clipped(r, a), 1.0, -9, 9)[off].eq(1).all()
    junk = a.masked_fill(off, 1e9), logp.detach().masked_fill(off, -1e9)   # what stands at an observation does not matter
    assert torch.allclose(covariances(logp, a, mask), covariances(junk[1], junk[0], mask))


@pytest.mark.parametrize("kind", LOSSES)
def test_an_empty_mask_gives_zero_and_no_nan(kind):
    logits, x = batch()
    x["tool_mask"], x["num_items_in_batch"] = x["tool_mask"] * 0, torch.tensor(0)
    trainer = Bare(logits, kind, beta=0.1, entropy_coef=0.1, clip_cov=lambda lp, x, m: clip_cov_mask(lp, x["advantages"], m),
                   terms=lambda lp, x, m: kl_cov_terms(lp, x["old_per_token_logps"], x["advantages"], m) + positive_nll_terms(lp, x["advantages"], m))
    loss = trainer.loss(x)
    assert loss == 0 and gradient(loss, logits).eq(0).all()


# Prop. 3.1

@pytest.mark.parametrize("setting", (dict(), dict(accumulation=2, steps=4, processes=2), dict(epsilon_high=0.28, delta=1.5)))
@pytest.mark.parametrize("by_token", (True, False))
@pytest.mark.parametrize("kind", (*CLIPPING, "cispo", "sapo"))
def test_logit_gradients_are_autograds(kind, by_token, setting):
    logits, x = batch(rows=6, width=12, vocab=30, by_token=by_token, drift=0.5)
    trainer, mask = Bare(logits, kind, **setting), x["completion_mask"] * x["tool_mask"]
    logp, rho = ratio_of(logits, x)
    a = expand(x["advantages"], logp)
    slope, clipped = rho, ppo_clipped(rho, a, 0.2, trainer.epsilon_high, trainer.args.delta)
    if kind == "cispo": slope = rho.clamp(max=trainer.epsilon_high)
    if kind == "sapo":
        tau = torch.where(a > 0, TAU["sapo_temperature_pos"], TAU["sapo_temperature_neg"])
        s = torch.sigmoid(tau * (rho - 1))
        slope = 4 * s * (1 - s) * rho
    if kind not in CLIPPING: clipped = torch.zeros_like(clipped)
    else: assert clipped.any()
    ours = trainer.weights(mask, x) * slope * ~clipped * a.abs() * surprise(logp, (2 * logits.detach().log_softmax(-1)).logsumexp(-1))
    autograd = gradient(trainer.plain(x), logits)
    assert torch.allclose(ours, autograd.norm(dim=-1), rtol=1e-9, atol=1e-12)
    turns = (x["tool_mask"] == 0).cumsum(-1).masked_fill(mask == 0, -1)
    assert torch.allclose(by_turn(ours, turns, "norm").nan_to_num().norm(), autograd.norm(), rtol=1e-9)


@pytest.mark.parametrize("kind", CLIPPING)
def test_logit_gradients_of_sequence_ratios(kind):
    logits, x = batch(rows=6, width=12, by_token=False, drift=0.5)
    trainer, mask, logp = Bare(logits, kind, level="sequence"), x["completion_mask"] * x["tool_mask"], ratio_of(logits, x)[0]
    rho = (((logp - x["old_per_token_logps"]) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()
    clipped = ppo_clipped(rho, x["advantages"])
    ours = trainer.weights(mask, x) * rho * ~clipped * expand(x["advantages"], logp).abs() * surprise(logp, (2 * logits.detach().log_softmax(-1)).logsumexp(-1))
    assert clipped.any() and torch.allclose(ours, gradient(trainer.plain(x), logits).norm(dim=-1), rtol=1e-9, atol=1e-12)


def test_the_fused_head_gives_what_surprise_needs():
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2))
    ids = torch.randint(97, (2, 7))
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].double() / 0.7
        add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy", "log_sum_sq_probs"))
        out = model(ids, labels=ids, fused_lm_head=True)
    onehot = torch.nn.functional.one_hot(ids[:, 1:], 97) - logits.softmax(-1)
    assert torch.allclose(surprise(out.log_probs, out.log_sum_sq_probs).double(), onehot.norm(dim=-1), atol=1e-5)


@given(st.integers(0, 10**6), st.floats(0.1, 40))
@settings(max_examples=50, deadline=None)
def test_surprise_stays_between_zero_and_root_two(seed, scale):
    "In float32 too, from flat to certain."
    logits = scale * torch.randn(50, 20, generator=torch.Generator().manual_seed(seed))
    logp = logits.log_softmax(-1)
    s = surprise(logp[:, 0], (2 * logp).logsumexp(-1))
    assert s.isfinite().all() and (s >= 0).all() and (s <= 2**0.5 + 1e-5).all()
    exact = (torch.nn.functional.one_hot(torch.tensor(0), 20) - logits.double().softmax(-1)).norm(dim=-1)
    assert torch.allclose(s.double(), exact, atol=2e-3)


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 9), st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_by_turn_is_the_loop(seed, rows, width, turns):
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    at = torch.randint(-1, turns, (rows, width), generator=rng) if turns else torch.full((rows, width), -1)
    slow = {"mean": lambda v: v.mean(), "sum": lambda v: v.sum(), "amin": lambda v: v.min(), "amax": lambda v: v.max(), "norm": lambda v: v.norm()}
    for how, f in slow.items():
        table = by_turn(values, at, how, turns)
        assert table.shape == (rows, turns)
        for i in range(rows):
            for j in range(turns):
                here = values[i][at[i] == j]
                assert table[i, j].isnan() if not len(here) else torch.isclose(table[i, j], f(here))


def test_terms_look_only_at_kept_rows_and_weigh_by_all_that_count():
    "A row that the ratio filter drops adds no term, and its tokens stay in the denominators."
    logp, args = torch.full((2, 3), -1.0, requires_grad=True), TIRConfig(positive_nll_coef=0.1, loss_type="bnpo")
    kept = torch.tensor([[1, 1, 1], [0, 0, 0]])
    found = extra_loss(args, logp, dict(advantages=torch.ones(2)), kept, torch.ones(2, 3))
    assert found.item() == pytest.approx(3 * 0.1 / 6) and torch.autograd.grad(found, logp)[0][1].eq(0).all()
