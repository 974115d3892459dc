"""Which prompts and rollouts make a batch, through the real trainer: chosen by posterior, sampled again, replayed; and what a checkpoint keeps of it."""

import json
import sys

import pytest
import torch
from small import small_policy
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOTrainer

from tirlab.core.settings import SettingError
from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, make_tasks, open_run, tiny_policy
from tirlab.trainer.batch import Batch, BatchBuilder, Group, replayed, task_name
from tirlab.trainer.objective import score_tokens
from tirlab.algorithms.prompts import Replay, failed
from tirlab.core.trajectory import StopReason, Trajectory, Turn, TurnKind

TOK = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
GROUP, TASKS = 4, make_tasks("arithmetic", n=8)
HOPELESS = {row["prompt"][0]["content"] for row in list(TASKS)[::2]}   # every second task is always failed


def call(code):
    return f'<tool_call>\n{json.dumps({"name": "python", "arguments": {"code": code}})}\n</tool_call>'


def scripted(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
    "A call, then an answer that says which member of the group gave it."
    out = []
    for i, ids in enumerate(prompt_ids):
        first = TOK.decode(ids).count("<|im_start|>assistant") == 1
        out.append(TOK.encode((call(f"{i % GROUP}+1") if first else str(i % GROUP)) + "<|im_end|>"))
    return out, None


def reward(prompts, completions, **kwargs):
    "The second and the last member succeed, on tasks that are not hopeless."
    return [float(i % GROUP in (1, 3) and p[0]["content"] not in HOPELESS) for i, p in enumerate(prompts)]


def trainer(tmp_path, monkeypatch, steps=2, **options):
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", scripted)
    common = dict(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), max_steps=steps, per_device_train_batch_size=2 * GROUP, num_generations=GROUP, engine="trl",
                  max_completion_length=300, learning_rate=1e-3, seed=3, save_strategy="no", disable_tqdm=True, report_to="none", lr_scheduler_type="constant")
    return TIRTrainer(small_policy(), [reward], TIRConfig(**common | options), TASKS, environment_factory=PythonEnvironment)


def rows_of(t):
    return [open_run(t.run_dir).trajectory(i) for i in open_run(t.run_dir).index().id]


def hopeless(row):
    return any(p in "".join(row.prompt_text) for p in HOPELESS)


def test_sampled_again_until_every_group_teaches_something(tmp_path, monkeypatch):
    t = trainer(tmp_path, monkeypatch, steps=3, oversample=2.0, oversample_rounds=5, min_reward_std=1e-3)
    t.train()
    rows = rows_of(t)
    learnt, left = [r for r in rows if r.dropped is None], [r for r in rows if r.dropped]
    assert len(learnt) == 3 * 2 * GROUP and not any(map(hopeless, learnt)) and all(r.scored_at for r in learnt)
    assert left and all((hopeless(r) and r.dropped == "group zero variance") or r.dropped == "no place left in the batch" for r in left)
    assert all(r.scored_at is None and r.logprob is not None for r in left)
    assert len({r.id for r in rows}) == len(rows) and {len([r for r in rows if r.step == s and r.group == g]) for s, g in {(r.step, r.group) for r in rows}} == {GROUP}
    assert max(m["batch/groups_left_out"] for m in t.state.log_history if "batch/groups_left_out" in m) > 0


def test_what_cannot_be_filled_is_left_out_of_the_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "HOPELESS", {row["prompt"][0]["content"] for row in TASKS})
    t = trainer(tmp_path, monkeypatch, steps=1, oversample=1.0, oversample_rounds=1, min_reward_std=1e-3)
    before = [p.clone() for p in t.model.parameters()]
    t.train()
    assert len(rows_of(t)) == 4 * GROUP and all("zero variance" in r.dropped for r in rows_of(t))
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))


def test_a_batch_put_together_is_the_batch_that_was_sampled(tmp_path, monkeypatch):
    "Nothing to leave out: tensors, rewards and loss are those of a trainer that asks TRL once."
    monkeypatch.setattr(sys.modules[__name__], "HOPELESS", set())
    outs = []
    for name, options in (("plain", {}), ("filled", dict(oversample=2.0, min_reward_std=1e-3))):
        t = trainer(tmp_path / name, monkeypatch, trace=False, advantage="gtpo", **options)
        t.current_gradient_accumulation_steps = 1
        t.model.train()
        batch = t._generate_and_score_completions([x for x in t.train_dataset.select(range(2)) for _ in range(GROUP)])
        outs.append((batch, t._compute_loss(t.model, batch).item(), {k: v for k, v in t._metrics["train"].items() if "rollout" not in k and "time" not in k}))
    (a, x, m), (b, y, n) = outs
    assert x == y and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert {k: v for k, v in n.items() if not k.startswith("batch/")} == m


def test_an_old_success_takes_the_place_of_a_failure(tmp_path, monkeypatch):
    "It is learnt from, is marked in the record, and has no log-probabilities of a sampler."
    t = trainer(tmp_path, monkeypatch, steps=1, replay_successes=2, engine="generate")
    row = next(r for r in TASKS if r["prompt"][0]["content"] in HOPELESS)
    ids = TOK.encode("42<|im_end|>")
    success = Trajectory(TOK.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False), [Turn(ids, {"role": "assistant", "content": "42"}, TurnKind.RESPONSE)], StopReason.ANSWER)
    for r in TASKS: t.builder.replay.add(task_name(r), success, 1.0, [1.0])
    t.train()
    old = [r for r in rows_of(t) if r.origin == "replay"]
    assert old and all(list(r.ids) == ids and r.reward == 1 and r.scored_at == 1 for r in old)
    assert all(torch.tensor(r.sampling_logprob).isnan().all() and not torch.tensor(r.logprob).isnan().any() and r.advantage[0] > 0 for r in old)
    others = [r for r in rows_of(t) if r.origin == "sampled"]
    assert all(not torch.tensor(r.sampling_logprob[r.mask == 1]).isnan().any() for r in others)


def test_the_first_success_is_kept_and_replays_are_not():
    said = lambda text: Trajectory([1], [Turn([2], {"role": "assistant", "content": text}, TurnKind.RESPONSE)], StopReason.ANSWER)
    replay, weights = Replay(threshold=0.5), torch.tensor([1.0, 0.0])
    origins = lambda group: [t.origin for t in group.trajectories]
    make = lambda scores: Group({"prompt": "x"}, [said(str(s)) for s in scores], torch.tensor(scores))
    nan = float("nan")
    assert origins(replayed(make([[nan, nan], [0.0, 5.0]]), replay, weights)) == ["sampled"] * 2, "nothing is known yet, and weights decide what succeeds"
    assert origins(replayed(make([[1.0, 7.0], [0.0, 5.0]]), replay, weights)) == ["sampled"] * 2
    again = replayed(make([[0.0, 0.0], [0.0, 0.0]]), replay, weights)
    assert origins(again) == ["replay", "sampled"] and again.rewards.tolist() == [[1.0, 7.0], [0.0, 0.0]]
    assert [len(q) for q in replay.kept.values()] == [1]


def test_prompts_are_chosen_and_a_checkpoint_goes_on(tmp_path, monkeypatch):
    options = dict(prompt_sampling="mopps", mopps_pool=4, replay_successes=2)
    t = trainer(tmp_path / "a", monkeypatch, steps=4, **options, save_strategy="steps", save_steps=2)
    t.train()
    counts = t.builder.more.counts
    assert counts and all((a == 1) == (TASKS[r]["prompt"][0]["content"] in HOPELESS) for r, (a, b) in counts.items()), "successes are counted where there are any"
    first = [r.prompt_text for r in rows_of(t) if r.step > 2]
    other = trainer(tmp_path / "b", monkeypatch, steps=4, **options)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert [r.prompt_text for r in rows_of(other) if r.step > 2] == first
    a, b = (x.builder.state_dict() for x in (t, other))
    assert a["more"] == b["more"] and a["replay"]["kept"].keys() == b["replay"]["kept"].keys() and a["replay"]["kept"]


def test_a_curriculum_begins_with_the_easy_ones(tmp_path, monkeypatch):
    tasks = TASKS.add_column("difficulty", list(range(8))[::-1])
    args = TIRConfig(output_dir=str(tmp_path), prompt_sampling="curriculum", curriculum_column="difficulty", curriculum_steps=10, num_generations=GROUP, per_device_train_batch_size=8)
    batches = BatchBuilder(args, tasks, torch.ones(1))
    assert {r["difficulty"] for r in batches.choose([{}] * 8)} == {0}
    for _ in range(30): rows = batches.choose([{}] * 8)
    assert {r["difficulty"] for r in rows} - {0, 1, 2}
    with pytest.raises(ValueError, match="no column `height`.*Set curriculum_column"):
        BatchBuilder(TIRConfig(output_dir=str(tmp_path), prompt_sampling="curriculum", curriculum_column="height"), tasks, torch.ones(1))
    with pytest.raises(ValueError, match="streamed"):
        BatchBuilder(TIRConfig(output_dir=str(tmp_path), prompt_sampling="mopps"), TASKS.to_iterable_dataset(), torch.ones(1))


@pytest.mark.parametrize("options, says", [(dict(oversample=2.0), "min_reward_std"), (dict(oversample=0.5, min_valid=2), "1 or more"), (dict(prompt_sampling="best"), "'mopps'"),
                                           (dict(mopps_decay=2.0), "between 0 and 1"), (dict(replay_successes=-1), "at least 0"), (dict(curriculum_steps=0), "at least 1")])
def test_wrong_arguments_are_refused_by_name(options, says, tmp_path):
    with pytest.raises(SettingError, match=says) as error: TIRConfig(output_dir=str(tmp_path), **options)
    assert options[error.value.field] == error.value.value


def test_reference_and_moments_are_reset(tmp_path, monkeypatch):
    "ProRL: the reference becomes the policy as it is in memory, the optimiser forgets."
    monkeypatch.setattr(sys.modules[__name__], "HOPELESS", set())
    t = trainer(tmp_path, monkeypatch, steps=2, beta=0.01, sync_ref_model=True, ref_model_mixup_alpha=1.0, ref_model_sync_steps=2, reset_optimizer_steps=2, trace=False)
    start, seen = [p.clone() for p in t.model.parameters()], []
    t._compute_loss, inner = (lambda model, inputs: seen.append((len(t.optimizer.state), [p.clone() for p in t.ref_model.parameters()])) or inner(model, inputs)), t._compute_loss
    t.train()
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a, b))
    assert [n > 0 for n, _ in seen] == [False, True] and all(same(r, start) for _, r in seen)
    assert len(t.optimizer.state) == 0 and same(t.ref_model.parameters(), t.model.parameters()) and not same(start, t.model.parameters())


def test_the_reference_is_the_policy_that_was_given(tmp_path, monkeypatch):
    "A model that was trained before is its own reference, not what lies on the disk."
    model = AutoModelForCausalLM.from_pretrained(tiny_policy())
    with torch.no_grad(): model.lm_head.weight.mul_(1.1)
    args = TIRConfig(output_dir=str(tmp_path), beta=0.1, num_generations=GROUP, per_device_train_batch_size=8, report_to="none")
    t = TIRTrainer(model, [reward], args, TASKS, environment_factory=PythonEnvironment)
    assert all(torch.equal(a, b) for a, b in zip(t.ref_model.parameters(), t.model.parameters()))


# ---- algorithms.md §5, traps 5 and 6


def test_what_was_sampled_with_a_hint_is_scored_without_it(tmp_path, monkeypatch):
    "A rollout whose prompt was replaced: old and new log-probabilities are those of the prompt in the batch, and what the sampler said is no old log-probability."
    t = trainer(tmp_path, monkeypatch, trace=False, gradient_accumulation_steps=1, steps_per_generation=2, per_device_train_batch_size=GROUP, num_iterations=1)
    row = TASKS[1]
    bare = TOK.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    said = [Turn(TOK.encode(f"{i}<|im_end|>"), {"role": "assistant", "content": str(i)}, TurnKind.RESPONSE, logprobs=None if i == 0 else [-3.0] * len(TOK.encode(f"{i}<|im_end|>"))) for i in range(2 * GROUP)]
    hinted = [Trajectory(bare, [turn], StopReason.ANSWER, origin="sampled" if i else "hinted") for i, turn in enumerate(said)]     # row 0 had a hint in front, which is gone
    given = Batch([row] * 2 * GROUP, [row["prompt"]] * 2 * GROUP, hinted, torch.tensor([[float(i % 2)] for i in range(2 * GROUP)]), step=1)
    monkeypatch.setattr(t, "builder", type("Given", (), {"selects": False, "build": lambda self, rows, sample: given})())
    t.current_gradient_accumulation_steps = 1
    t.model.train()
    out = t._generate_and_score_completions([row] * 2 * GROUP)
    assert all(p[m.bool()].tolist() == bare for p, m in zip(out["prompt_ids"], out["prompt_mask"]))
    with torch.no_grad(): logits = t.model(torch.tensor([bare + said[0].ids])).logits[0, len(bare) - 1:-1].log_softmax(1)
    wanted = logits.gather(1, torch.tensor(said[0].ids)[:, None])[:, 0]
    assert torch.allclose(out["old_per_token_logps"][0, :len(wanted)], wanted, atol=1e-4)
    n = len(said[0].ids)
    assert out["sampling_per_token_logps"][0, :n].isnan().all() and not out["sampling_per_token_logps"][1, :n].isnan().any()
    half = {k: v[:GROUP] if v.dim() else v for k, v in out.items()}
    assert torch.isfinite(t._compute_loss(t.model, half)) and torch.allclose(score_tokens(t, t.model, half)[0][0, :n], wanted, atol=1e-4)


def test_when_a_task_has_failed():
    nan = float("nan")
    assert [failed(r, 0.5) for r in ([0, 0.5], [0, 1], [nan, 0], [nan, nan], [])] == [True, False, True, False, False]
    assert [failed(r, 0.5, "any") for r in ([0, 0.5], [0, 1], [1, 1], [nan, 1], [nan, 0])] == [True, True, False, False, True]
    with pytest.raises(ValueError, match="choose 'all' or 'any'"): failed([0], rule="some")
