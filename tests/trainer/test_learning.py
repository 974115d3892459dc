"""What is learnt from rollouts, through the real trainer: credit by name, filters that leave no trace in the gradient, terms of the loss, steps without a signal."""

import json

import pytest
import torch
import two_processes
from forks import ended, forked, side_by_side
from small import small_policy
from transformers import AutoTokenizer
from trl import GRPOTrainer

from tirlab.algorithms.advantages import ESTIMATORS, tells_turns_apart
from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, open_run, tiny_policy
from tirlab.algorithms.filters import has_answer, void_turns
from tirlab.algorithms.losses import token_weights
from tirlab.trainer.objective import score_tokens
from tirlab.trainer.batch_credit import turn_credit

TOK = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
GROUP, TASKS = 4, make_tasks("arithmetic", n=8)
LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"]


def call(code):
    return f'<tool_call>\n{json.dumps({"name": "python", "arguments": {"code": code}})}\n</tool_call>'


# What the four members of a group write, turn by turn. The last two have a void turn: the call that is never closed, and nothing at all.
SCRIPTS = [[call("37+48"), "85"], [call("1"), call("2"), "x"], ["<tool_call>\n{", "7"], [call("3"), "<tool_call>", "9"]]


def scripted(scripts):
    def generate(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        out = []
        for i, ids in enumerate(prompt_ids):
            text = TOK.decode(ids)
            turn = text.count("<|im_start|>assistant") - 1
            if turn == 0:
                member = i % len(scripts)
            else:
                said = text.split("<|im_start|>assistant\n")[1:-1]
                member = next(m for m, s in enumerate(scripts) if all(x.startswith(s[min(k, len(s) - 1)] + "<|im_end|>") for k, x in enumerate(said)))
            out.append(TOK.encode(scripts[member][min(turn, len(scripts[member]) - 1)] + "<|im_end|>"))
        return out, None
    return generate


def reward(completions, **kwargs):
    return [[1.0, 0.0, 0.0, 1.0][i % 4] for i in range(len(completions))]


def trainer(tmp_path, monkeypatch, scripts=SCRIPTS, rewards=reward, steps=1, **options):
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted(scripts))
    common = dict(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=2 * GROUP, num_generations=GROUP, engine="trl",
                  max_completion_length=300, learning_rate=1e-3, seed=3, save_strategy="no", disable_tqdm=True, report_to="none", lr_scheduler_type="constant")
    return TIRTrainer(small_policy(), [rewards], TIRConfig(**common | options), TASKS, environment_factory=PythonEnvironment)


def batch_and_gradient(t):
    "The batch of one step, its loss and its gradient."
    t.model.train()
    t.current_gradient_accumulation_steps = 1
    rows = [x for x in t.train_dataset.select(range(2)) for _ in range(GROUP)]
    inputs = t._generate_and_score_completions(rows)
    return inputs, *gradient(t, inputs)


def gradient(t, inputs):
    t.model.zero_grad()
    loss = t._compute_loss(t.model, inputs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten().clone() for p in t.model.parameters() if p.grad is not None])


# ---- credit


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_by_name(name, tmp_path, monkeypatch):
    "Observation tokens and padding get exactly 0; estimators by turn tell turns apart, the others do not."
    t = trainer(tmp_path, monkeypatch, advantage=name, format_penalty=0.3)
    inputs, loss, grad = batch_and_gradient(t)
    a = inputs["advantages"]
    assert a.isfinite().all() and grad.isfinite().all() and grad.any()
    if tells_turns_apart(name):
        turns = [[a[i, j].item() for j in range(len(x.turn_of_token)) if x.turn_of_token[j] == k] for i, x in enumerate(t.batch.trajectories) for k in range(len(x.turns))]
        assert all(len(set(x)) == 1 for x in turns) and any(len(set(a[i][torch.tensor(x.mask).bool().nonzero()[:, 0]].tolist())) > 1 for i, x in enumerate(t.batch.trajectories))
        for i, x in enumerate(t.batch.trajectories):
            assert a[i, :len(x.mask)][torch.tensor(x.mask) == 0].eq(0).all() and a[i, len(x.mask):].eq(0).all()
    else:
        assert a.shape == (2 * GROUP,)


def test_grpo_and_its_estimator_agree(tmp_path, monkeypatch):
    "TRL's own advantages, and ours for the same rewards."
    t = trainer(tmp_path, monkeypatch)
    inputs, *_ = batch_and_gradient(t)
    rewards, advantages, reasons = turn_credit(t, t.batch, inputs)
    assert torch.allclose(advantages, inputs["advantages"], atol=1e-6) and reasons == [None] * 8


# ---- filters


def without(inputs, keep):
    "The batch without some rows."
    rows = keep.nonzero()[:, 0]
    return {k: v[rows] if v.dim() and len(v) == len(keep) else v for k, v in inputs.items()}


@pytest.mark.parametrize("loss_type", LOSSES)
def test_a_voided_row_leaves_no_trace_in_the_gradient(loss_type, tmp_path, monkeypatch):
    "With beta > 0 and an entropy bonus: token means equal the batch without the row; row means count it, and say so."
    options = dict(loss_type=loss_type, beta=0.05, entropy_coef=0.01, trace=False, advantage="gtpo")
    t = trainer(tmp_path, monkeypatch, void_filter="trajectory", **options)
    inputs, loss, grad = batch_and_gradient(t)
    void = torch.tensor([any(void_turns(x, has_answer())) for x in t.batch.trajectories])
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    assert void.sum() == 4 and mask[void].sum() == 0 and mask[~void].sum() > 0
    assert inputs["completion_mask"][void].any(1).all(), "attention is left as it was"
    assert inputs["num_items_in_batch"] == mask.sum()
    # the voided rows' advantages, ids and masks may be anything: nothing changes
    other = dict(inputs)
    other["advantages"] = inputs["advantages"].clone()
    other["advantages"][void] = 17.0
    assert torch.equal(gradient(t, other)[1], grad)
    # and beside the batch without them
    small = without(inputs, ~void)
    expected = gradient(t, small)[1]
    if loss_type in ("dapo", "bnpo", "cispo"):
        assert torch.allclose(grad, expected, atol=1e-6)
    else:      # row means, and dr_grpo's constant, count dropped rows: the policy's part is the kept share of it
        t.entropy_coef, t._entropy_bonus_enabled = 0.0, False
        assert torch.allclose(gradient(t, inputs)[1], gradient(t, small)[1] * (~void).float().mean(), atol=1e-6)


def test_filters_keep_the_groups_statistics_or_not(tmp_path, monkeypatch):
    def go(**options):
        t = trainer(tmp_path / str(len(options)), monkeypatch, void_filter="trajectory", trace=False, **options)
        return batch_and_gradient(t)[0]["advantages"]
    kept, left_out = go(), go(void_in_baseline=False)
    assert kept[:2].tolist() == pytest.approx([0.866, -0.866], abs=1e-2)                # 1 0 | 0 1
    assert left_out[:4].tolist() == pytest.approx([0.707, -0.707, 0, 0], abs=1e-2)      # 1 0 | -, -


@pytest.mark.parametrize("options,reason,rows", [
    (dict(void_filter="trajectory"), "void turn", [2, 3, 6, 7]),
    (dict(void_filter="suffix"), "from void turn", [2, 3, 6, 7]),
    (dict(accuracy_band=[0.6, 1.0]), "group too hard", list(range(8))),
    (dict(accuracy_band=[0.0, 0.4]), "group too easy", list(range(8))),
    (dict(min_reward_std=0.9), "group zero variance", list(range(8))),
    (dict(min_valid=5), "group too few valid", list(range(8))),
])
def test_what_is_left_out_says_why_in_the_trace(options, reason, rows, tmp_path, monkeypatch):
    t = trainer(tmp_path, monkeypatch, advantage="gtpo", **options)
    t.train()
    run = open_run(t.run_dir)
    index = run.index()
    assert [i for i, d in enumerate(index.dropped) if isinstance(d, str)] == rows
    assert all(reason in d for d in index.dropped if isinstance(d, str))
    assert all(p.isfinite().all() for p in t.model.parameters())


def test_a_batch_with_nothing_left_changes_nothing(tmp_path, monkeypatch):
    "All void: no NaN, no step."
    before = [p.clone() for p in trainer(tmp_path / "a", monkeypatch).model.parameters()]
    t = trainer(tmp_path / "b", monkeypatch, scripts=[["<tool_call>"]] * 4, void_filter="trajectory", advantage="gtpo")
    t.train()
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))
    assert next(x for x in t.state.log_history if "filter/dropped_rollouts" in x)["filter/dropped_rollouts"] == 8


def test_cut_off_rollouts_are_judged_by_their_stop_reason(tmp_path, monkeypatch):
    "TRL looks at the last token; a rollout whose tool's answer no longer fits ends on an end-of-turn token and is cut off all the same."
    long = [[call("'x' * 900"), "85"], [call("1"), "7"], ["x" * 400], ["7"]]
    t = trainer(tmp_path, monkeypatch, scripts=long, mask_truncated_completions=True, max_observation_chars=None, advantage="gtpo")
    t.train()
    index = open_run(t.run_dir).index()
    assert [d for d in index.dropped][:4] == ["cut off", None, "cut off", None] or [isinstance(d, str) for d in index.dropped][:4] == [True, False, True, False]


# ---- terms of the loss


def test_terms_switched_off_are_not_there(tmp_path, monkeypatch):
    on, off = (trainer(tmp_path / n, monkeypatch, trace=False, **o) for n, o in (("a", {}), ("b", dict(clip_cov_ratio=0.0, kl_cov_ratio=0.0, positive_nll_coef=0.0))))
    assert torch.equal(batch_and_gradient(on)[2], batch_and_gradient(off)[2])


@pytest.mark.parametrize("loss_type", LOSSES)
def test_positive_nll_is_what_it_says(loss_type, tmp_path, monkeypatch):
    "The difference it makes is the likelihood of tokens with positive advantage, weighed as TRL weighs its policy loss."
    t = trainer(tmp_path, monkeypatch, loss_type=loss_type, positive_nll_coef=0.3, trace=False, advantage="gtpo")
    inputs, loss, grad = batch_and_gradient(t)
    t.args.positive_nll_coef = 0.0
    plain, plain_grad = gradient(t, inputs)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    weights = token_weights(mask, loss_type, num_items=inputs["num_items_in_batch"], windows=t.args.steps_per_generation, max_completion_length=300)
    logp = score_tokens(t, t.model, inputs)[0].detach()
    assert loss - plain == pytest.approx((weights * torch.where(inputs["advantages"] > 0, -0.3 * logp, 0.0)).sum().item(), rel=1e-4)
    assert not torch.equal(grad, plain_grad)


def test_clip_cov_takes_tokens_out_of_the_gradient(tmp_path, monkeypatch):
    t = trainer(tmp_path, monkeypatch, clip_cov_ratio=0.5, clip_cov_bounds=[-100.0, 100.0], trace=False, advantage="gtpo")
    inputs, loss, grad = batch_and_gradient(t)
    assert gradient(t, inputs)[0] == loss, "the same draw at the same step"
    t.args.clip_cov_ratio = 0.0
    assert not torch.equal(gradient(t, inputs)[1], grad)


def test_kl_cov_acts_from_the_second_use_of_a_batch(tmp_path, monkeypatch):
    def go(ratio):
        t = trainer(tmp_path / str(ratio), monkeypatch, steps=4, num_iterations=2, kl_cov_ratio=ratio, kl_cov_coef=5.0, trace=False)
        t.train()
        return [p.detach().clone() for p in t.model.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(go(0.0), go(0.5)))


# ---- the loss never sees an observation


@pytest.mark.parametrize("loss_type", LOSSES)
def test_no_gradient_reaches_an_observation(loss_type, tmp_path, monkeypatch):
    "The loss's derivative by the log-probability at every observation position is exactly 0."
    t = trainer(tmp_path, monkeypatch, loss_type=loss_type, beta=0.05, trace=False, advantage="gtpo", positive_nll_coef=0.1, clip_cov_ratio=0.01, kl_cov_ratio=0.01)
    leaves, inner = [], GRPOTrainer._get_per_token_logps_and_entropies
    def leaf(self, *args, **kwargs):
        logps, entropies, aux = inner(self, *args, **kwargs)
        if entropies is not None:
            logps = logps.detach().requires_grad_()
            leaves.append(logps)
            entropies = entropies.detach()
        return logps, entropies, aux
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    rows = [x for x in t.train_dataset.select(range(2)) for _ in range(GROUP)]
    inputs = t._generate_and_score_completions(rows)
    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", leaf)
    t._compute_loss(t.model, inputs).backward()
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    assert leaves[-1].grad[~mask].eq(0).all() and leaves[-1].grad[mask].ne(0).any()


# ---- steps without a signal


def test_a_step_without_signal_leaves_the_optimiser_alone(tmp_path, monkeypatch):
    "Rewards in the first step only: with the guard neither weights nor moments move afterwards, without it both do."
    def go(skip):
        given = []
        def once(completions, **kwargs):
            given.append(1)
            return [float(i % 2) if len(given) == 1 else 0.0 for i in range(len(completions))]
        t = trainer(tmp_path / str(skip), monkeypatch, rewards=once, steps=4, skip_empty_steps=skip, trace=False)
        states = []
        from transformers import TrainerCallback
        class Keep(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                states.append([t.optimizer.state[p]["exp_avg"].clone() for p in t.optimizer.param_groups[0]["params"]] + [p.detach().clone() for p in t.model.parameters()])
        t.add_callback(Keep)
        t.train()
        return states
    moved = lambda states: [any(not torch.equal(a, b) for a, b in zip(x, y)) for x, y in zip(states, states[1:])]
    assert moved(go(True)) == [False, False, False] and moved(go(False)) == [True, True, True]


# ---- shaping, and every option of TRL's


def test_code_shaping_gives_failures_their_likeness(tmp_path, monkeypatch):
    "A failed rollout whose code is like a success's earns more than one that wrote nothing."
    scripts = [[call("37+48"), "85"], [call("37+48"), "84"], ["9"], ["8"]]
    for name in ("gtpo", "grpo"):
        t = trainer(tmp_path / name, monkeypatch, scripts=scripts, rewards=lambda completions, **k: [float(i % 4 == 0) for i in range(len(completions))],
                    advantage=name, code_shaping=0.5, format_penalty=0.0, trace=False)
        batch_and_gradient(t)
        rewards, advantages, _ = turn_credit(t, t.batch, {})
        assert rewards.nansum(1)[:4].tolist() == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-4)
        _, near, far, same = (advantages if advantages.dim() == 1 else advantages[:, 0])[:4].tolist()   # of rollouts, or of first turns
        assert near > far == same


WORKS = {   # TRL's options with a value other than the default, beside advantage="gtpo" -> what they mean there
    "beta": (0.04, "KL a token"), "num_iterations": (2, "the batch is used twice"), "epsilon": (0.1, "clip a token"), "epsilon_high": (0.28, "clip a token"),
    "delta": (3.0, "dual clip"), "scale_rewards": ("batch", "returns over the batch's spread"), "entropy_coef": (0.01, "mean entropy of tokens in the loss"),
    "top_entropy_quantile": (0.5, "tokens of high entropy only"), "importance_sampling_level": ("sequence", "one ratio a rollout times each turn's advantage"),
    "mask_truncated_completions": (True, "rollouts that were cut off, by stop reason"), "reward_weights": ([2.0], "weighs the outcome"), "temperature": (0.7, "sampling"),
    "top_p": (0.9, "sampling"), "top_k": (20, "sampling"), "min_p": (0.05, "sampling"), "repetition_penalty": (1.1, "sampling"),
    "use_bias_correction_kl": (True, "KL times ratio"), "max_tool_calling_iterations": (1, "rounds of calls"), "num_generations_eval": (2, "evaluation"),
    "cast_lm_head_to_fp32": (True, "precision of the head"), "disable_dropout": (True, "no dropout"), "shuffle_dataset": (False, "order of prompts"),
    "steps_per_generation": (2, "a batch is spread over steps"), "pad_to_multiple_of": (8, "padding"), "log_completions": (True, "TRL's table"),
    "max_completion_length": (100, "budget"), "sync_ref_model": (False, "reference"), "num_completions_to_print": (1, "TRL's table"),
} | {f"loss_type={x}": (x, "per-token advantages") for x in LOSSES}
REFUSED = {"loss_type=vespo": "vespo", "off_policy_mask_threshold": 0.5, "multi_objective_aggregation": "normalize_then_sum"}


ELSEWHERE = {   # say nothing about rewards, advantages or the loss's mask: where things run, how prompts are drawn, what is logged; or tune another option above
    "model_init_kwargs", "trust_remote_code", "router_aux_loss_coef", "num_generations", "ds3_gather_for_generation", "generation_batch_size", "chat_template_kwargs",
    "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_server_base_url", "vllm_server_host", "vllm_server_port",
    "vllm_server_timeout", "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap", "sapo_temperature_neg",
    "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "ref_model_mixup_alpha", "ref_model_sync_steps", "use_adaptive_entropy",
    "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target", "log_multimodal", "log_unique_prompts", "log_completions_hub_repo",
    "transformers_continuous_batching_config", "use_transformers_paged"}
ONLY_TRL = {"generation_kwargs": {"bad_words_ids": [[1]]}, "cache_implementation": "static", "use_transformers_continuous_batching": True}   # TRL's own sampler's


def test_the_tables_hold_every_option_of_trl():
    import dataclasses
    from transformers import TrainingArguments
    from trl import GRPOConfig
    own = {f.name for f in dataclasses.fields(GRPOConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}
    named = {x.split("=")[0] for x in {**WORKS, **REFUSED}} | ELSEWHERE | set(ONLY_TRL)
    assert own - named == set() and named - own <= {"disable_dropout"}


@pytest.mark.parametrize("name", ONLY_TRL)
def test_options_of_trls_sampler_are_refused_with_ours(name):
    with pytest.raises(ValueError, match=name):
        TIRConfig(engine="generate", **{name: ONLY_TRL[name]})
    TIRConfig(engine="trl", **{name: ONLY_TRL[name]})


@pytest.mark.parametrize("option", WORKS)
def test_options_that_have_a_meaning_beside_gtpo(option, tmp_path, monkeypatch):
    name, (value, _) = option.split("=")[0], WORKS[option]
    t = trainer(tmp_path, monkeypatch, advantage="gtpo", trace=False, **{name: value})
    if name in ("top_k", "top_p", "min_p", "repetition_penalty", "temperature"):
        from tirlab.trainer.engine_setup import sampling_of
        assert getattr(sampling_of(t.args), name) == value
    inputs, loss, grad = batch_and_gradient(t)
    assert inputs["advantages"].dim() == 2 and torch.isfinite(grad).all()


@pytest.mark.parametrize("option", REFUSED)
def test_options_without_a_meaning_beside_gtpo_are_refused_by_name(option):
    name = option.split("=")[0]
    with pytest.raises(ValueError, match=name):
        TIRConfig(advantage="gtpo", **{name: REFUSED[option]})


def test_two_processes_learn_what_one_does(tmp_path):
    "A group that lies across two gloo processes: same rollouts, same advantages, same reasons to leave one out, same rows shown and told, as in one process."
    runs = []
    said = tmp_path / "said"
    assert ended(forked(two_processes.main, str(tmp_path / "one"), said=said)) == 0, said.read_text()[-3000:]
    assert side_by_side(2, two_processes.main, str(tmp_path / "two"), said=said) == [0, 0], "".join(f.read_text()[-3000:] for f in tmp_path.glob("said-*"))
    for name in ("one", "two"):
        run = open_run(tmp_path / name / "run")
        rows = [run.trajectory(i) for i in run.index().id]
        runs.append(sorted((tuple(r.ids), tuple(round(a, 4) for a in r.turn_advantages), r.dropped, r.origin, r.hint) for r in rows))
        assert len({r.rank for r in rows}) == (2 if name == "two" else 1) and len({r.group for r in rows}) == len(rows) // 8
    assert runs[0] == runs[1] and any(d for *_, d, _, _ in runs[0])
    assert [r.origin for r in rows].count("demonstration") == len(rows) // 8 == [r.origin for r in rows].count("hinted") // 2
