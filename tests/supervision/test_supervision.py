"""Supervision in the batch: who makes which row, what the loss sees of it, and that nobody else notices."""

from types import SimpleNamespace

import pytest
import torch
from small import small_policy

import tirlab.trainer.generation
from tirlab.all import AuxiliarySFT, Hints, OffPolicy, Replay, TIRConfig, TIRTrainer, answer_reward, demonstrate, make_tasks, open_run, tiny_policy
from tirlab.supervision.in_batch import check_supervision, sft_tensors
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.core.tiny import tiny_tokenizer
from tirlab.trainer.handover import sampler_logprobs
from tirlab.trainer.objective import lesson_loss

GROUP, TOK = 4, tiny_tokenizer()
TASKS = make_tasks("all", n=6)


def trainer(folder, supervision=None, policy=None, **options):
    args = dict(output_dir=str(folder), run_dir=str(folder / "run"), max_steps=1, per_device_train_batch_size=2 * GROUP, num_generations=GROUP, max_completion_length=128, learning_rate=1e-4,
                seed=0, save_strategy="no", disable_tqdm=True, report_to="none", probe="off")
    return TIRTrainer(policy or small_policy(), answer_reward, TIRConfig(**args | options), TASKS, TASKS, environment_factory=ENVIRONMENTS, supervision=supervision)


def batch(t, rows=(0, 1)):
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    return t._generate_and_score_completions([TASKS[i] for i in rows for _ in range(GROUP)])


def grads(t, loss):
    t.model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in t.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("call_format", [None, "fenced", "xml", "list", "json"])
def test_what_is_shown_and_told_and_what_the_others_sample(tmp_path, call_format, monkeypatch):
    "One demonstration and one hint a group; whoever is left alone draws the tokens it would have drawn, and no prompt in the batch has a hint in it."
    asked, real = [], tirlab.trainer.generation.rollouts
    monkeypatch.setattr(tirlab.trainer.generation, "rollouts", lambda prompts, *args, **kwargs: asked.append(list(prompts)) or real(prompts, *args, **kwargs))
    policy = tiny_policy() if call_format in (None, "fenced") else None   # calls tools itself
    plain, helped = (trainer(tmp_path / n, s, policy, trace=False, call_format=call_format) for n, s in (("a", None), ("b", [Hints(1), OffPolicy(1)])))
    before, after = batch(plain), batch(helped)
    assert [t.origin for t in helped.batch.trajectories] == ["demonstration", "hinted", "sampled", "sampled"] * 2 and {t.origin for t in plain.batch.trajectories} == {"sampled"}
    for i, (a, b) in enumerate(zip(plain.batch.trajectories, helped.batch.trajectories)):
        if i % GROUP > 1: assert a.completion_ids == b.completion_ids and a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        else: assert b.logprobs is None
        assert a.prompt_ids == b.prompt_ids
    for row, t in zip((0, 1), helped.batch.trajectories[::GROUP]):
        own = demonstrate([TASKS[row]], TOK, ENVIRONMENTS, call_format=call_format)[0]
        assert t.completion_ids == own.completion_ids and helped.batch.rewards[row * GROUP, 0] == 1
    told = [TOK.decode(p) for p in asked[1]]
    assert all(("Notes that may help" in p) == (i % GROUP == 1) for i, p in enumerate(told)) and not any("Notes" in TOK.decode(p) for p in asked[0])
    assert "Notes" in helped.batch.trajectories[1].hint and helped.batch.trajectories[2].hint is None
    assert not any("Notes" in TOK.decode(p) for p in after["prompt_ids"]) and after["prompt_ids"].shape == before["prompt_ids"].shape
    wrote = (after["completion_mask"] * after["tool_mask"]).bool()
    assert [p[m].isnan().all().item() for p, m in zip(after["sampling_per_token_logps"], wrote)] == [True, True, False, False] * 2 and not after["sampling_per_token_logps"][2::GROUP].isnan().any()


@pytest.mark.parametrize("where", ["system", "user"])
def test_a_hinted_rollout_is_what_the_hinted_prompt_gives(tmp_path, where):
    "Sampled from the prompt with the hint (greedily, that is what the policy says there), scored behind the prompt without it."
    t = trainer(tmp_path, [Hints(1, where, hint=lambda row: "answer at once: 7")], trace=False, temperature=1e-4, steps_per_generation=2, per_device_train_batch_size=GROUP, gradient_accumulation_steps=1)
    out = batch(t)
    row, messages = t.batch.trajectories[0], TASKS[0]["prompt"]
    text = "Notes that may help; follow them only where they do:\nanswer at once: 7"
    hinted = [{"role": "system", "content": text}, *messages] if where == "system" else [messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}]
    prompt = TOK.apply_chat_template(hinted, add_generation_prompt=True, return_dict=False, tools=t._env_tools[TASKS[0]["environment"]] if t.environment_factories else None)
    first = row.turns[0].ids
    with torch.no_grad(): logits = t.model(torch.tensor([prompt + first])).logits[0, len(prompt) - 1:-1]
    assert logits.argmax(1).tolist() == first
    bare = row.prompt_ids
    with torch.no_grad(): scored = t.model(torch.tensor([bare + first])).logits[0, len(bare) - 1:-1].div(1e-4).log_softmax(1).gather(1, torch.tensor(first)[:, None])[:, 0]
    assert torch.allclose(out["old_per_token_logps"][0, :len(first)], scored, rtol=1e-3, atol=1e-2)


def test_nothing_of_it_happens_in_evaluation(tmp_path):
    everything = [OffPolicy(1), Hints(1), AuxiliarySFT(), Replay()]
    a, b = trainer(tmp_path / "a"), trainer(tmp_path / "b", everything)
    left, right = a.evaluate(), b.evaluate()
    times = ("runtime", "per_second", "seconds", "preparation_time", "step_time")
    assert {k: v for k, v in left.items() if not k.endswith(times) and "latency" not in k} == pytest.approx({k: v for k, v in right.items() if not k.endswith(times) and "latency" not in k})
    run = open_run(b.run_dir)
    assert set(run.index().origin) == {"sampled"}


def test_the_record_says_what_supervision_did(tmp_path):
    t = trainer(tmp_path, [OffPolicy(1), Hints(1)])
    t.train()
    rows = [open_run(t.run_dir).trajectory(i) for i in open_run(t.run_dir).index().id]
    assert [r.origin for r in rows] == ["demonstration", "hinted", "sampled", "sampled"] * 2
    assert all(r.reward == 1 for r in rows[::GROUP]) and all(torch.tensor(r.sampling_logprob[r.mask == 1]).isnan().all() == (r.origin != "sampled") for r in rows)
    assert all(("Notes" in (r.hint or "")) == (r.origin == "hinted") for r in rows)
    assert all(not torch.tensor(r.logprob[r.mask == 1]).isnan().any() for r in rows)


@pytest.mark.parametrize("shaping", [None, 0.1])
@pytest.mark.parametrize("stale", [False, True])
def test_importance_weights_give_the_gradient_of_their_objective(tmp_path, shaping, stale):
    "Shown rows: A f(p) with f(p) = p or p / (p + gamma), unclipped, whatever the old log-probabilities are. Others: TRL's. Against autograd."
    options = dict(trace=False, loss_type="grpo", steps_per_generation=2 if stale else 1, per_device_train_batch_size=2 * GROUP, gradient_accumulation_steps=1)
    t = trainer(tmp_path, [OffPolicy(1, importance=True, shaping=shaping)], **options)
    out = batch(t, (0, 1) if not stale else (0, 1, 2, 3))
    out = {k: v[:2 * GROUP] if torch.is_tensor(v) and v.dim() else v for k, v in out.items()}
    if stale:
        assert "old_per_token_logps" in out
        with torch.no_grad():
            for p in t.model.parameters(): p.add_(0.02 * torch.randn_like(p))   # an update lies between
    assert out["demonstrated"].tolist() == [True, False, False, False] * 2 and out["advantages"][0] != 0
    ours = grads(t, t._compute_loss(t.model, out))
    ids, keep = torch.cat([out["prompt_ids"], out["completion_ids"]], 1), out["completion_ids"].shape[1]
    logp = super(TIRTrainer, t)._get_per_token_logps_and_entropies(t.model, ids, torch.cat([out["prompt_mask"], out["completion_mask"]], 1), keep)[0]
    old = out.get("old_per_token_logps", logp.detach())
    ratio, p, advantages, mask = (logp - old).exp(), logp.exp(), out["advantages"][:, None], (out["completion_mask"] * out["tool_mask"]).float()
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    bent = (p if shaping is None else p / (p + shaping)) * advantages
    objective = torch.where(out["demonstrated"][:, None], bent, objective)
    wanted = grads(t, -((objective * mask).sum(1) / mask.sum(1)).mean())
    assert torch.allclose(ours, wanted, atol=1e-6), (ours - wanted).abs().max()


def test_without_importance_a_shown_row_is_a_row(tmp_path):
    "As in the paper's code: no key in the batch, the same loss as TRL's own on the same tokens."
    t = trainer(tmp_path, [OffPolicy(1)], trace=False)
    out = batch(t)
    assert "demonstrated" not in out and out["advantages"][0] > 0 > out["advantages"][1:GROUP].min()


def test_the_supervised_term_is_the_likelihood_of_the_right_calls(tmp_path):
    "Where no advantage has a gradient, the gradient is that of the lessons alone, times the weight; it fades as it should."
    t = trainer(tmp_path, [AuxiliarySFT(0.5)], trace=False)
    out = batch(t)
    lessons = demonstrate([TASKS[0], TASKS[1]], TOK, ENVIRONMENTS)
    assert [x.completion_ids for x in t.batch.demonstrations] == [x.completion_ids for x in lessons]
    out["advantages"] = torch.zeros_like(out["advantages"])
    ours = grads(t, t._compute_loss(t.model, out))
    ids, seen, learnt = sft_tensors(lessons, TOK.pad_token_id)
    logits = t.model(ids, attention_mask=seen).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    wanted = grads(t, -0.5 * (logits * learnt[:, 1:]).sum() / learnt[:, 1:].sum())
    assert torch.allclose(ours, wanted, atol=1e-6) and ours.abs().max() > 1e-3
    t.supervision = [AuxiliarySFT(0.5, until=0.5)]
    t.state.max_steps, t.state.global_step = 4, 2
    assert lesson_loss(t, t.model) == 0.0
    t.model.eval()
    t.supervision = [AuxiliarySFT(0.5)]
    assert lesson_loss(t, t.model) == 0.0


def test_the_parts_of_a_batch_share_its_lessons(tmp_path):
    t = trainer(tmp_path, [AuxiliarySFT(1.0)], trace=False, max_steps=2, per_device_train_batch_size=GROUP, gradient_accumulation_steps=2)
    t.train()
    logs = [m for m in t.state.log_history if "supervision/sft_loss" in m]
    assert len(logs) == 2 and all(m["supervision/sft_tokens"] > 10 and m["skipped_steps"] == 0 for m in logs)


def test_lessons_that_are_fewer_than_the_parts_of_a_batch_weigh_as_much(tmp_path):
    "One lesson and four parts: the sum over a step is the mean negative log-likelihood, whatever the split."
    t = trainer(tmp_path, [AuxiliarySFT(1.0)], trace=False, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    batch(t, (0,) * 2)
    t.current_gradient_accumulation_steps, sums = 4, 0.0
    assert len(t.batch.demonstrations) == 1
    for t._step in range(4): sums += getattr(lesson_loss(t, t.model), 'item', lambda: 0.0)()
    ids, seen, learnt = sft_tensors(t.batch.demonstrations, TOK.pad_token_id)
    logits = t.model(ids, attention_mask=seen).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert sums == pytest.approx(-(logits * learnt[:, 1:]).sum().item() / learnt[:, 1:].sum().item(), rel=1e-4)


def test_what_is_shown_and_told_is_not_what_the_policy_does(tmp_path):
    "A policy that knows nothing: signals, its own reward and what is learnt about prompts say so, whatever it was shown."
    t = trainer(tmp_path, [OffPolicy(2)], probe="on", temperature=50.0, prompt_sampling="mopps", trace=False)
    t.train()
    logged = next(m for m in t.state.log_history if "reward" in m)
    assert logged["reward"] == 0.5 and logged["reward/own"] == 0.0 and logged["probe/state/tool_call"] == 0.0
    assert t.builder.sampler.counts and all(c == [1.0, 1.0 + GROUP - 2] for c in t.builder.sampler.counts.values()), "no success of its own"


def test_a_process_whose_rows_were_all_shown_has_the_column_of_the_others(tmp_path):
    t = trainer(tmp_path, [OffPolicy(1), Hints(1)], trace=False)
    batch(t)
    made, own = t.batch.trajectories[:2], t.batch.trajectories[2:4]
    assert sampler_logprobs(made, [x.completion_ids for x in made]) == [[None] * len(x.completion_ids) for x in made]
    assert sampler_logprobs(own, [x.completion_ids for x in own]) == [x.logprobs for x in own]


def test_an_engine_that_gives_no_log_probabilities_gives_none_beside_a_remembered_row(tmp_path):
    "What is the policy's own says whether the engine gives any; every process must say the same."
    from dataclasses import replace
    t = trainer(tmp_path, trace=False)
    batch(t)
    silent = [replace(x, turns=[replace(u, logprobs=None) for u in x.turns]) for x in t.batch.trajectories]
    ids = [x.completion_ids for x in silent]
    assert sampler_logprobs(silent, ids) is None and sampler_logprobs([replace(silent[0], origin="replay"), *silent[1:]], ids) is None


@pytest.mark.parametrize("supervision", [None, [OffPolicy(1)]])
def test_an_engine_that_takes_less_than_the_model_is_not_asked_for_more(tmp_path, supervision):
    t = trainer(tmp_path, supervision, trace=False)
    t.engine = tirlab.trainer.generation.make_engine(t)
    room = 12 + len(TOK.apply_chat_template(TASKS[0]["prompt"], add_generation_prompt=True, return_dict=False, tools=t._env_tools[TASKS[0]["environment"]]))
    t.engine.context_tokens = room
    batch(t, (0, 0))
    assert all(len(x.prompt_ids) + len(x.completion_ids) <= room for x in t.batch.trajectories) and any(x.stop == "context" for x in t.batch.trajectories)


def test_answers_are_written_as_the_pattern_wants_them(tmp_path):
    t = trainer(tmp_path, [OffPolicy(1), AuxiliarySFT()], trace=False, answer_pattern=r"\\boxed", answer_template=r"\boxed{{{}}}", void_filter="trajectory")
    out = batch(t)
    assert r"\boxed{" + TASKS[0]["answer"] + "}" in TOK.decode(t.batch.trajectories[0].completion_ids) and len(t.batch.demonstrations) == 2
    assert (out["completion_mask"] * out["tool_mask"])[0].any()


def test_replay_as_an_argument(tmp_path):
    t = trainer(tmp_path, [Replay(size=3)], trace=False)
    assert t.builder.replay.size == 3 and t.builder.selects


def test_shown_and_told_go_together_with_batches_that_are_put_together(tmp_path):
    "Origins come through oversampling and replay, and no demonstration is kept as the policy's own success."
    t = trainer(tmp_path, [OffPolicy(1), Hints(1), Replay()], oversample=1.0, min_reward_std=1e-3, oversample_rounds=2, advantage="gtpo", max_steps=2)
    t.train()
    run = open_run(t.run_dir)
    kept = [x[0] for q in t.builder.replay.kept.values() for x in q]
    assert {x.origin for x in kept} <= {"sampled"}
    index = run.index()
    trained = index[index.scored_at.notna()]
    assert (trained.origin == "demonstration").sum() == (trained.origin == "hinted").sum() == 4


def test_a_row_that_cannot_be_shown_does_not_stop_the_others(tmp_path, monkeypatch):
    "A demonstration that is cut off is a rollout like any other: scored, with its stop reason."
    t = trainer(tmp_path, [OffPolicy(1)], trace=False, max_completion_length=40)
    batch(t)
    assert t.batch.trajectories[0].origin == "demonstration" and len(t.batch.trajectories[0].completion_ids) <= 40


@pytest.mark.parametrize("signals,options,said", [
    ([OffPolicy(4)], {}, "Supervision makes 4 rollouts of a group of 4"),
    ([OffPolicy(2), Hints(2)], {}, "lower per_group or raise num_generations"),
    ([OffPolicy(0)], {}, "per_group=0 changes no rollout"),
    ([OffPolicy(), OffPolicy()], {}, "OffPolicy twice"),
    (["hints"], {}, "supervision takes OffPolicy"),
    ([Hints(hint="notes")], {}, "no column `notes`"),
    ([OffPolicy()], dict(engine="trl"), "choose another engine"),
    ([OffPolicy(importance=True)], dict(loss_type="vespo"), "drop one of them"),
    ([OffPolicy(importance=True)], dict(importance_sampling_level="sequence"), "leave it at 'token'"),
    ([OffPolicy()], dict(answer_pattern=r"\\boxed"), "set the template"),
])
def test_supervision_that_cannot_work_says_so_before_the_first_step(tmp_path, signals, options, said):
    with pytest.raises(ValueError, match=said): trainer(tmp_path, signals, trace=False, **options)


def test_a_dataset_without_ground_truth_and_a_hint_too_long(tmp_path):
    args = SimpleNamespace(num_generations=4, loss_type="dapo", off_policy_mask_threshold=None, importance_sampling_level="token", answer_pattern=None, answer_template="{}")
    bare = TASKS.remove_columns("ground_truth")
    for signal in (OffPolicy(), Hints(), AuxiliarySFT()):
        with pytest.raises(ValueError, match=f"no column `ground_truth`, from which {type(signal).__name__}"): check_supervision([signal], args, bare, "generate", 1024, TOK)
    check_supervision([Hints(hint=lambda row: "x")], args, bare, "generate", 1024, TOK)
    with pytest.raises(ValueError, match="whole context is 64"): check_supervision([Hints(hint=lambda row: "x" * 100)], args, bare, "generate", 64, TOK)
    for wrong, said in ((lambda: Hints(where="end"), "where='end'"), (lambda: OffPolicy(shaping=0.1), "needs importance=True"), (lambda: OffPolicy(importance=True, shaping=0), "not above 0"),
                        (lambda: AuxiliarySFT(-1), "weight=-1"), (lambda: AuxiliarySFT(until=2), "no share of the run")):
        with pytest.raises(ValueError, match=said): wrong()
