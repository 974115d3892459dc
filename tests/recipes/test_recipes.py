"""Published recipes: each trains, and each does what a hand table says it does."""

import json
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forks import ended, forked
from test_learning import batch_and_gradient, call, gradient, trainer

import tirlab.trainer.objective
from tirlab.cli.main import main
from tirlab.config.tir_config import TIRConfig
from tirlab.algorithms.losses import token_weights
from tirlab.rewards.outcome import answer_reward
from tirlab.trainer.interleave import OnAlarm
from tirlab.trainer.effects import Effects, watched_options
from tirlab.recipes.published import RECIPES, recipe
from tirlab.recipes.arguments import arguments_of, rate_line, read_train_settings, recipe_sets, train_config
from tirlab.recipes.training import recipe_plan, recipe_trainer, train_recipe, trainer_arguments
from tirlab.trainer.generation import score
from tirlab.trainer.objective import score_tokens
from tirlab.trainer.batch_credit import turn_credit
from tirlab.trainer.progress import Progress
from tirlab.rollout.writers import EndpointWriter
from tirlab.core.tiny import tiny_policy
from tirlab.traces.run import open_run

ROOT = Path(__file__).parents[2]
SMALL = dict(max_steps="3", num_generations="4", per_device_train_batch_size="8", steps_per_generation="1", max_completion_length="64", max_turn_length="32", n="8", level="1",
             learning_rate="1e-4", save_strategy="no", report_to="none")


@pytest.fixture(autouse=True)
def peft_where_it_is_needed(request):
    if "lora" in request.node.name:
        pytest.importorskip("peft")


@pytest.mark.parametrize("name", [n for n, p in RECIPES.items() if not p.plan])
def test_every_recipe_trains(name, tmp_path):
    "Two steps on the tiny policy, sampled for real: finite weights, two steps in the run folder."
    t = recipe_trainer(SMALL | dict(max_steps="2", recipe=name, output_dir=str(tmp_path)))
    t.train()
    run = open_run(t.run_dir)
    index = run.index()
    assert t.state.global_step == 2 and index.scored_at.notna().sum() == 16 and (len(index) == 16 or t.args.oversample) and all(p.isfinite().all() for p in t.model.parameters())
    for key, value in RECIPES[name].sets.items():
        assert getattr(t.args, key) == value or key in SMALL
    assert t.args.learning_rate == 1e-4 and t.num_generations == 4


@pytest.mark.parametrize("name", [n for n, p in RECIPES.items() if p.plan])
def test_every_recipe_with_rounds_trains(name, tmp_path):
    "Two steps of RL and two more, on tasks of all families; what is taught between is on record."
    adaptive, first = name == "adaptive", name == "tool_rl_box/sft_rl"
    rounds = {"max_steps": "3"} if adaptive else {"rounds": "[0, 3]" if first else "[2, 2]"} | ({} if first else {"failed_rule": "any"})
    small = {k: v for k, v in SMALL.items() if k != "max_steps"}
    t = train_recipe(small | rounds | dict(recipe=name, tasks="all", sft_per_device_train_batch_size="4", sft_gradient_accumulation_steps="1", output_dir=str(tmp_path)))
    index, phases = open_run(t.run_dir).index(), json.loads((tmp_path / "phases.json").read_text())
    assert [(p["kind"], p["reached"]) for p in phases] == ([("rl", 3)] if adaptive else [("rl", 0), ("sft", 0), ("rl", 3)] if first else [("rl", 2), ("sft", 2), ("rl", 4)])
    taught = index[index.phase == "sft"]
    assert set(taught.origin) == (set() if adaptive else {"demonstration", "reflection"} if name.endswith("prs") else {"demonstration"}) and open_run(t.run_dir).status() == "finished"
    for key, value in RECIPES[name].sets.items():
        assert getattr(t.args, key) == value or key in SMALL


# ---- what distinguishes each, by hand. Two groups of four; what they write is SCRIPTS of test_learning: turns (2, 3, 2, 3), members 2 and 3 stumble.


def rewards(completions, **kwargs):
    return [[1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0][i % 8] for i in range(len(completions))]


def scripted(name, tmp_path, monkeypatch, rewards=rewards, **changes):
    return trainer(tmp_path, monkeypatch, rewards=rewards, **recipe(name, **dict(num_generations=4, steps_per_generation=1, trace=False) | changes))


def of_turns(t, inputs, row):
    "Advantage of each turn of a row."
    turns = t.batch.trajectories[row].turn_of_token
    return [inputs["advantages"][row, turns.index(j)].item() for j in range(len(t.batch.trajectories[row].turns))]


def test_gtpo_gives_turns_their_discounted_return(tmp_path, monkeypatch):
    t = scripted("gtpo", tmp_path, monkeypatch, code_shaping=0.0)
    inputs, *_ = batch_and_gradient(t)
    returns = torch.tensor([0.9, 1.0, 0, 0, 0, -0.1, 0, -0.09, -0.1, 0])      # the first group, turn by turn
    wanted = (returns - returns.mean()) / returns.std()
    assert of_turns(t, inputs, 0) + of_turns(t, inputs, 1) + of_turns(t, inputs, 2) + of_turns(t, inputs, 3) == pytest.approx(wanted.tolist(), abs=1e-3)


def test_gtpo_rewards_code_like_that_of_the_success(tmp_path, monkeypatch):
    "Member 0 succeeds with 37+48; the second differs in a number, the third is something else, the fourth the same code: half, and no more, is to be had."
    scripts = [[call(code), answer] for code, answer in (("37+48", "85"), ("37+49", "86"), ("print()", "x"), ("37+48", "7"))]
    t = trainer(tmp_path, monkeypatch, scripts=scripts, rewards=lambda completions, **kwargs: [float(i % 4 == 0) for i in range(8)], **recipe("gtpo", num_generations=4, trace=False))
    batch_and_gradient(t)
    right, near, far, same = turn_credit(t, t.batch, {})[0][:4].nan_to_num().sum(1).tolist()
    assert right == 1 and same == pytest.approx(0.5) and 0 == far < near < 0.5


def test_mt_grpo_adds_the_advantage_of_a_turn(tmp_path, monkeypatch):
    t = scripted("mt_grpo", tmp_path, monkeypatch)
    inputs, *_ = batch_and_gradient(t)
    assert of_turns(t, inputs, 0) == pytest.approx([1.5 + 0.5, 1.5], abs=5e-3)       # outcomes 1 0 0 0, first turns 0 0 -0.1 0
    assert of_turns(t, inputs, 2) == pytest.approx([-0.5 - 1.5, -0.5], abs=5e-3)


@pytest.mark.parametrize("name,wanted", [
    ("dr_grpo", [0.75, -0.25, -0.25, -0.25, 0.5, -0.5, -0.5, 0.5]),
    ("lite_ppo", [x / 0.51755 for x in (0.75, -0.25, -0.25, -0.25, 0.5, -0.5, -0.5, 0.5)]),     # the batch's standard deviation
    ("rloo", [1, -1 / 3, -1 / 3, -1 / 3, 2 / 3, -2 / 3, -2 / 3, 2 / 3]),
])
def test_advantages_of_rollouts(name, wanted, tmp_path, monkeypatch):
    inputs, *_ = batch_and_gradient(scripted(name, tmp_path, monkeypatch))
    assert inputs["advantages"].tolist() == pytest.approx(wanted, abs=1e-3)


def kept(t):
    inputs, *_ = batch_and_gradient(t)
    return (inputs["completion_mask"] * inputs["tool_mask"]).any(1).tolist()


def test_simpletir_leaves_void_rollouts_out(tmp_path, monkeypatch):
    assert kept(scripted("simpletir", tmp_path, monkeypatch)) == [True, True, False, False] * 2
    hard = lambda completions, **kwargs: [float(i % 4 < 2 and i >= 4) for i in range(len(completions))]      # first group all wrong
    assert kept(scripted("simpletir", tmp_path / "b", monkeypatch, rewards=hard, oversample=0)) == [False] * 4 + [True, True, False, False]
    assert kept(scripted("simpletir", tmp_path / "c", monkeypatch, rewards=hard)) == [True, True, False, False] * 2, "sampled again"


def test_dapo_leaves_equal_groups_out_and_clips_higher(tmp_path, monkeypatch):
    equal = lambda completions, **kwargs: [float(i % 4 < 2 or i >= 4) for i in range(len(completions))]      # second group all right
    t = scripted("dapo", tmp_path, monkeypatch, rewards=equal)
    assert kept(scripted("dapo", tmp_path / "b", monkeypatch, rewards=equal, oversample=0)) == [True] * 4 + [False] * 4
    assert kept(t) == [True] * 8 and (t.epsilon_low, t.epsilon_high) == (0.2, 0.28)


def test_clip_cov_takes_tokens_out(tmp_path, monkeypatch):
    given, ours = [], tirlab.trainer.objective.kept_advantages
    def listen(args, logp, inputs, mask, step):
        out = ours(args, logp, inputs, mask, step)
        given.append((inputs["advantages"][:, None] * mask != out * mask).sum().item())
        return out
    monkeypatch.setattr(tirlab.trainer.objective, "kept_advantages", listen)
    batch_and_gradient(scripted("clip_cov", tmp_path, monkeypatch))
    assert given[-1] == 1       # 2e-4 of a few hundred tokens, at least one


def test_kl_cov_holds_back_from_the_second_update_on(tmp_path, monkeypatch):
    def go(**changes):
        t = scripted("kl_cov", tmp_path / str(len(changes)), monkeypatch, steps=3, num_iterations=2, **changes)
        assert t.epsilon_low == t.epsilon_high == 1e6
        t.train()
        return torch.cat([p.detach().flatten() for p in t.model.parameters()])
    assert not torch.equal(go(), go(kl_cov_ratio=0.0))


def test_thor_adds_the_likelihood_of_successes(tmp_path, monkeypatch):
    t = scripted("thor_nll", tmp_path, monkeypatch)
    inputs, loss, _ = batch_and_gradient(t)
    t.args.positive_nll_coef = 0.0
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    weights = token_weights(mask, "dapo", num_items=inputs["num_items_in_batch"], windows=1, max_completion_length=300)
    nll = -score_tokens(t, t.model, inputs)[0].detach() * (inputs["advantages"] > 0)[:, None]
    assert loss - gradient(t, inputs)[0] == pytest.approx(0.1 * (weights * nll).sum().item(), rel=1e-3)


def test_tina_trains_lora_adapters_only(tmp_path):
    t = recipe_trainer(SMALL | dict(recipe="tina_lora", output_dir=str(tmp_path)))
    names = [n for n, p in t.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names) and len(names) == 2 * 4 * t.model.config.num_hidden_layers
    assert {p.shape[0] for n, p in t.model.named_parameters() if "lora_A" in n} == {32}


def test_tool_rl_box_is_held_to_the_reference(tmp_path, monkeypatch):
    t = scripted("tool_rl_box", tmp_path, monkeypatch)
    inputs, *_ = batch_and_gradient(t)
    assert t.beta == 1e-4 and inputs["ref_per_token_logps"].isfinite().all()
    assert "ref_per_token_logps" not in batch_and_gradient(scripted("mt_grpo", tmp_path / "b", monkeypatch))[0]


@pytest.mark.parametrize("name,origins", [("ops", ["demonstration", "sampled", "sampled", "sampled"]), ("hbg", ["hinted", "hinted", "sampled", "sampled"])])
def test_ops_shows_one_and_hbg_tells_two(name, origins, tmp_path):
    t = recipe_trainer(SMALL | dict(recipe=f"tool_rl_box/{name}", output_dir=str(tmp_path), max_steps="1"))
    t.train()
    rows = [open_run(t.run_dir).trajectory(i) for i in open_run(t.run_dir).index().id]
    assert [r.origin for r in rows] == origins * 2 and all((r.reward == 1) for r in rows if r.origin == "demonstration") and [bool(r.hint) for r in rows] == [o == "hinted" for o in origins * 2]


def test_rounds_are_the_papers():
    ets, prs, first, ours = (recipe_plan({"recipe": n, "model": "some/model"}) for n in ("tool_rl_box/ets", "tool_rl_box/prs", "tool_rl_box/sft_rl", "adaptive"))
    assert ets.rounds == prs.rounds == [50, 100, 150] and first.rounds == [0, 300] and ours.rounds == OnAlarm(300)
    for plan, epochs in ((ets, 2), (prs, 2), (first, 3)):
        assert plan.sft["per_device_train_batch_size"] * plan.sft["gradient_accumulation_steps"] == 128 and plan.sft["learning_rate"] == 1e-5 and plan.sft["num_train_epochs"] == epochs
    assert (ets.signals[0].rule, ets.signals[0].window, ets.sft["warmup_steps"], prs.signals[0].demonstrate) == ("all", 10, 0.3, True)
    with_model = recipe_plan(dict(recipe="tool_rl_box/prs", writer_url="http://localhost:8000/v1", writer_model="m", failed_rule="any", sft_num_train_epochs="1", sft_max_length="null"))
    assert isinstance(with_model.signals[0].writer, EndpointWriter) and with_model.signals[0].of.rule == "any" and with_model.sft["num_train_epochs"] == 1 and with_model.sft["max_length"] is None
    assert recipe_plan(dict(recipe="adaptive", max_steps="20")).rounds == OnAlarm(20) and recipe_plan({}) is None


def test_adaptive_waits_for_a_monitor_that_stops(tmp_path):
    t = recipe_trainer(dict(recipe="adaptive", output_dir=str(tmp_path)))
    assert [c.action for c in t.callback_handler.callbacks if type(c).__name__ == "CollapseMonitor"] == ["stop"]


def test_prorl_resets_reference_and_moments(tmp_path, monkeypatch):
    t = scripted("prorl", tmp_path, monkeypatch, ref_model_sync_steps=1, reset_optimizer_steps=1, steps_per_generation=1, learning_rate=1e-3)
    start = t.model.lm_head.weight.clone()
    t.train()
    assert not torch.equal(start, t.model.lm_head.weight) and torch.equal(t.ref_model.lm_head.weight, t.model.lm_head.weight) and not t.optimizer.state
    assert (t.epsilon_low, t.epsilon_high, t.temperature) == (0.2, 0.4, 1.2)


def test_mopps_learns_which_prompts_teach(tmp_path, monkeypatch):
    t = scripted("mopps", tmp_path, monkeypatch, steps=2)
    t.train()
    assert sum(sum(c) - 2 for c in t.builder.more.counts.values()) == 2 * 8      # what was seen beside the prior: two batches of eight rollouts


def test_arpo_keeps_successes_for_groups_without_one(tmp_path, monkeypatch):
    t = scripted("arpo", tmp_path, monkeypatch)
    t.train()
    assert [len(q) for q in t.builder.replay.kept.values()] == [1, 2]      # rewards 1 0 0 0 and 1 0 0 1


def test_empo_needs_no_answers(tmp_path, monkeypatch):
    "Members say 85, x, 7 and 9, then all but one say the same."
    assert [row[0] for row in _rewards("empo", ["85", "85", "85", "9"], tmp_path)] == [0.75, 0.75, 0.75, 0.25]


def test_rlcr_takes_the_brier_score_off(tmp_path):
    said = [f"<answer>{a}</answer><confidence>{q}</confidence>" for a, q in (("85", 0.8), ("85", 0.0), ("7", 0.8), ("7", 0.0))]
    assert [row[0] for row in _rewards("rlcr", said, tmp_path)] == pytest.approx([0.96, 0.0, -0.64, 0.0])


def _rewards(name, said, tmp_path):
    "What a recipe's trainer gives to four final messages on one prompt whose answer is 85."
    t = recipe_trainer(SMALL | dict(recipe=name, output_dir=str(tmp_path)))
    prompt, t.environments = [{"role": "user", "content": "How many?"}], []
    rollouts = [SimpleNamespace(turns=[1], completion_ids=[1], messages=[{"role": "assistant", "content": s}], reward_messages=[]) for s in said]
    return score(t, [{"prompt": prompt, "answer": "85"}] * 4, [prompt] * 4, rollouts).tolist()


# ---- arguments


def test_recipes_name_arguments_that_exist_and_differ_from_the_defaults():
    default = TIRConfig()
    for name, p in RECIPES.items():
        TIRConfig(**p.sets)
        assert p.paper and p.inferred and (p.lora or p.plan or p.reward is not answer_reward or any(getattr(default, k) != v for k, v in p.sets.items())), name
    with pytest.raises(ValueError, match="Unknown recipe 'ppo'; choose one of gtpo, "):
        recipe("ppo")


def test_what_is_typed_wins_over_the_file_and_the_file_over_the_recipe(tmp_path):
    (tmp_path / "a.yaml").write_text("recipe: simpletir\nlearning_rate: 1e-4\naccuracy_band: [0.2, 0.8]\ndelta: null\nlevel: 2\n")
    given = read_train_settings([f"config={tmp_path / 'a.yaml'}", "learning_rate=3e-4", "vllm_servers=[http://a:1,http://b:2]"])
    assert given["recipe"] == "simpletir" and given["level"] == 2
    args = train_config({k: v for k, v in given.items() if k not in ("recipe", "level")}, **recipe("simpletir"))
    assert (args.learning_rate, args.accuracy_band, args.delta, args.epsilon_high) == (3e-4, [0.2, 0.8], None, 0.28)
    assert args.vllm_servers == ["http://a:1", "http://b:2"] and args.void_filter == "trajectory"


def test_reading_settings_changes_nothing_for_others():
    before = [f.type for f in fields(TIRConfig)]
    train_config({"learning_rate": "1e-4"})
    assert [f.type for f in fields(TIRConfig)] == before and TIRConfig().learning_rate == 1e-6


@pytest.mark.parametrize("words,said", [
    (["recipe=ppo"], "Unknown recipe 'ppo'"),
    (["gama=1"], "Unknown setting 'gama'; the nearest is gamma."),
    (["task=all"], "Unknown setting 'task'; the nearest is tasks."),
    (["gamma"], "'gamma' is not key=value."),
    (["gamma=much"], "gamma=much should be a number"),
    (["gamma=2"], "gamma=2.0 is not between 0 and 1."),
    (["n=few"], "n=few should be a whole number."),
    (["level=99"], "level=99 is not a number from 1 to 10."),
    (["tasks=chess"], "Unknown tasks 'chess'"),
    (["config=/nowhere.yaml"], "/nowhere.yaml: No such file"),
    (["rounds=[2,2]"], "Recipe 'gtpo' has no rounds of supervised training, so rounds has no meaning"),
    (["sft_learning_rate=1"], "so sft_learning_rate has no meaning"),
    (["recipe=tool_rl_box/ets", "max_steps=3"], "give their steps, such as rounds=[4,6,8]."),
    (["recipe=tool_rl_box/ets", "rounds=[2,few]"], "rounds=few should be a whole number"),
    (["recipe=tool_rl_box/ets", "rounds=[-1]"], "has no step of RL"),
    (["recipe=tool_rl_box/ets", "sft_learning_rate=much"], "sft_learning_rate=much should be a number"),
    (["recipe=tool_rl_box/ets", "sft_lr=1"], "Unknown setting 'sft_lr'; the nearest is sft_"),
    (["recipe=tool_rl_box/ets", "writer_url=http://localhost/v1"], "writes no reflections"),
    (["recipe=tool_rl_box/ets", "failed_rule=some"], "choose 'all' or 'any'"),
    (["recipe=tool_rl_box/sft_rl", "failed_rule=all"], "does not ask which tasks failed"),
    (["recipe=tool_rl_box/prs", "writer_url=http://localhost/v1"], "writer_url and writer_model belong together"),
    (["recipe=tool_rl_box/prs", "writer_url=localhost", "writer_model=m"], "give the whole address"),
    (["recipe=adaptive", "rounds=[2]"], "supervises on an alarm and has no rounds; give max_steps."),
    (["recipe=adaptive", "max_steps=few"], "max_steps=few should be a whole number"),
    (["--resume"], "--resume resumes the run in output_dir; give it."),
    (["--resume", "output_dir=nowhere"], "There is nothing to resume in nowhere: no run folder, no checkpoint."),
])
def test_what_is_wrong_is_said_in_one_line(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tirlab: ") and said in err and len(err.splitlines()) == 1


def test_train_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "recipe=gtpo", "tasks=all", *(f"{k}={v}" for k, v in (SMALL | dict(max_steps="1")).items())]) == 0
    out = capsys.readouterr().out
    folder = next(line for line in out.splitlines() if line.startswith("Run folder: ")).removeprefix("Run folder: ")
    assert open_run(folder).meta()["config"]["advantage"] == "gtpo" and folder.startswith("runs")


# ---- whose learning rate, and what had an effect


@pytest.mark.parametrize("given,rate,said", [
    (dict(recipe="simpletir"), 3e-4, "at which the tiny policy was seen to learn; 1e-06, of SimpleTIR, is for Qwen2.5-7B."),
    (dict(recipe="gtpo"), 3e-4, "at which the tiny policy was seen to learn."),
    (dict(recipe="simpletir", model=tiny_policy()), 3e-4, "at which the tiny policy"),
    (dict(recipe="simpletir", model="some/model"), 1e-6, "of SimpleTIR, for Qwen2.5-7B; set another with learning_rate="),
    (dict(recipe="gtpo", model="some/model"), 1e-6, "TRL's default, since the recipe gives none; set another"),
    (dict(recipe="simpletir", learning_rate="1e-5"), 1e-5, "yours."),
    (dict(recipe="simpletir", learning_rate="1e-5", model="some/model"), 1e-5, "yours."),
])
def test_the_rate_belongs_to_a_model_and_the_users_wins(given, rate, said):
    args = train_config(arguments_of(given), **recipe_sets(given))
    assert args.learning_rate == rate and rate_line(given, args).startswith(f"Learning rate: {rate:g}, ") and said in rate_line(given, args)


def test_a_rate_from_a_paper_says_for_which_model():
    assert {n for n, p in RECIPES.items() if ("learning_rate" in p.sets) != bool(p.rate_for)} == set()


def test_supervised_training_of_the_tiny_policy_has_its_rate_too():
    rates = [recipe_plan(dict(recipe="tool_rl_box/ets") | more).sft["learning_rate"] for more in ({}, {"model": "some/model"}, {"sft_learning_rate": "1e-6"})]
    assert rates == [3e-4, 1e-5, 1e-6]


def test_every_recipe_was_seen_to_learn():
    kept = json.loads((ROOT / "nbs/experiments/results/recipes.json").read_text())["recipes"]
    assert kept.keys() == RECIPES.keys()
    for name, m in kept.items():
        learnt = m["reward"][1] > m["reward"][0] + 0.1 if name == "empo" else m["after"] > m["before"] + 0.1      # it rewards agreement, right or wrong
        assert m["learning_rate"] == recipe_sets(dict(recipe=name))["learning_rate"] and learnt, name


def test_train_says_whose_rate_it_is_and_what_had_no_effect(tmp_path, capsys):
    "Continuous rewards are never equal; nobody says a confidence; one update a batch clips nothing; the run is over before the first reset. What acted is not named."
    t = train_recipe(SMALL | dict(recipe="rlcr", min_reward_std="1e-9", mask_truncated_completions="true", reset_optimizer_steps="50", epsilon="0.2", max_completion_length="96", max_turn_length="96", output_dir=str(tmp_path)))
    lines = capsys.readouterr().out.splitlines()
    assert "Learning rate: 0.0001, yours." in lines
    assert "epsilon=0.2 will have no effect: each batch is learnt in one update, where probability ratios are 1; steps_per_generation=4 cuts it into four." in lines
    assert "reset_optimizer_steps=50 will have no effect: the run has 3 steps." in lines
    assert "rlcr_reward will have no effect: no prompt asks for a <confidence>, and without one it orders rollouts as plain correctness does." in lines
    logged = [m for m in t.state.log_history if "effect/mask_truncated_completions" in m]
    assert len(logged) == 3
    cut = sum(m["effect/mask_truncated_completions"] for m in logged)
    assert any(line.startswith("mask_truncated_completions=True had no effect in 3 steps: none of 24 rollouts was cut off") for line in lines) == (cut == 0)


@pytest.mark.parametrize("options,wanted", [
    (dict(void_filter="trajectory"), ["void_filter='trajectory' had no effect in 1 steps: none of 8 rollouts has a void turn, for without an answer_pattern any text is an answer."]),
    (dict(void_filter="trajectory", answer_pattern=r"\d\d\d"), []),
    (dict(min_reward_std=1e-3), ["min_reward_std=0.001 had no effect in 1 steps: none of 2 groups varies less."]),
    (dict(accuracy_band=[0.3, 1.0]), []),
    (dict(code_shaping=0.5), []),
    (dict(replay_successes=2), ["replay_successes=2 had no effect in 1 steps: none of 8 rollouts is an old success."]),
    (dict(mask_truncated_completions=True), ["mask_truncated_completions=True had no effect in 1 steps: none of 8 rollouts was cut off by a limit."]),
    (dict(advantage="gtpo", gamma=0.9), []),
])
def test_options_without_effect_are_named_and_others_are_not(options, wanted, tmp_path, monkeypatch):
    "Two groups of four, each with successes and failures; rollouts of several turns, all of which end."
    t = trainer(tmp_path, monkeypatch, scripts=[[call("37+48"), "85"], [call("37+49"), "86"]] * 2, rewards=rewards, num_generations=4, trace=False, **options)
    effects = Effects(t, watched_options(options))
    t.add_callback(effects)
    t.train()
    assert effects.sentences() == wanted and effects.rollouts == 8


def test_groups_that_were_left_out_before_the_batch_count(tmp_path, monkeypatch):
    "Sampled again, the batch has no group of equal rewards, and the filter has done its work all the same."
    seen = iter([[1.0] * 4 + [1.0, 0.0] * 2, *[[1.0, 0.0] * 4] * 9])
    t = trainer(tmp_path, monkeypatch, rewards=lambda completions, **kwargs: next(seen)[:len(completions)], num_generations=4, trace=False, min_reward_std=1e-3, oversample=1.0, oversample_rounds=3)
    effects = Effects(t, watched_options(dict(min_reward_std=1e-3, oversample=1.0)))
    t.add_callback(effects)
    t.train()
    assert effects.counts == {"min_reward_std": 1, "oversample": 1} and effects.sentences() == []


# ---- settings that go to the trainer


def test_chat_template_and_call_format_reach_the_trainer(tmp_path):
    "A file, or the text; without one the trainer is asked for none."
    (tmp_path / "my template.jinja").write_text("{{ messages }}")
    for said, wanted in ((str(tmp_path / "my template.jinja"), "{{ messages }}"), ("{% if messages %}{% endif %}", "{% if messages %}{% endif %}"), ("null", None), (None, None)):
        given = read_train_settings([f"output_dir={tmp_path}", "call_format=xml"] + ([f"chat_template={said}"] if said else []))
        arguments = trainer_arguments(given)
        assert arguments.get("chat_template") == wanted and ("chat_template" in arguments) == (wanted is not None) and arguments["args"].call_format == "xml"


# ---- going on


def test_checkpoints_end_batches_of_rollouts(tmp_path):
    every = lambda name, **more: recipe_trainer(SMALL | dict(recipe=name, output_dir=str(tmp_path), save_strategy="steps") | more).args
    args = every("tool_rl_box", steps_per_generation="3")
    assert (args.save_steps, args.save_total_limit) == (51, 2)
    assert every("gtpo").save_steps == 50 and every("gtpo", save_steps="5", steps_per_generation="4", gradient_accumulation_steps="2").save_steps == 6


def test_a_recipe_without_rounds_goes_on(tmp_path, monkeypatch, capsys):
    "Interrupted in the second step of three, and gone on with: the weights and the record of a run without interruption, in one folder; once more, and nothing happens."
    given = lambda name, **more: SMALL | dict(recipe="arpo", save_strategy="steps", save_steps="1", learning_rate="1e-3", output_dir=str(tmp_path / name)) | more
    whole, real = train_recipe(given("whole")), Progress.on_step_end
    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2: raise KeyboardInterrupt
        real(self, args, state, control, **kwargs)
    monkeypatch.setattr(Progress, "on_step_end", stop)
    with pytest.raises(KeyboardInterrupt): train_recipe(given("cut"))
    monkeypatch.setattr(Progress, "on_step_end", real)
    with pytest.raises(ValueError, match="already holds a run"): train_recipe(given("cut"))
    with pytest.raises(ValueError, match="learning_rate is 1e-4, and was 1e-3 when .* was begun"): train_recipe(given("cut", learning_rate="1e-4"), resume=True)
    for _ in range(2):
        t = train_recipe(given("cut"), resume=True)
        assert t.state.global_step == 3 and all(torch.equal(a, b) for a, b in zip(t.model.parameters(), whole.model.parameters()))
        ours, theirs = (open_run(x.run_dir).index().sort_values("id") for x in (t, whole))
        assert ours.id.tolist() == theirs.id.tolist() and ours.task.tolist() == theirs.task.tolist() and ours.tokens.tolist() == theirs.tokens.tolist()
        assert len(list((tmp_path / "cut").glob("*/meta.json"))) == 1 and open_run(t.run_dir).status() == "finished"


@pytest.mark.slow
def test_a_killed_recipe_with_rounds_goes_on_to_the_same_end(tmp_path):
    "SIGKILL in the first round of RL, then in supervised training, each time gone on with by --resume: the lessons, tasks and weights of a run that nobody killed."
    words = ["recipe=tool_rl_box/ets", "rounds=[2,2]", "failed_rule=any", "tasks=all", "save_steps=1", "sft_num_train_epochs=4", "sft_per_device_train_batch_size=2", "sft_gradient_accumulation_steps=1",
             "sft_learning_rate=1e-4", "probe=off", *(f"{k}={v}" for k, v in SMALL.items() if k not in ("max_steps", "save_strategy"))]
    def run(folder, *more, until=None):
        "Run to the end, or until a checkpoint is there."
        process = forked(main, ["train", *words, f"output_dir={folder}", *more], said=tmp_path / "said")
        while until and process.is_alive():
            if (folder / until / "trainer_state.json").exists(): process.kill(); break
            time.sleep(0.01)
        return ended(process)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert run(cut, until="phase-00-rl/checkpoint-1") == -9 and not (cut / "phases.json").exists()
    assert run(cut, "--resume", until="phase-01-sft/checkpoint-1") == -9 and len(json.loads((cut / "phases.json").read_text())) == 1
    assert run(cut, "--resume") == 0, (tmp_path / "said").read_text()[-3000:]
    assert run(whole) == 0
    phases = [[{k: v for k, v in p.items() if k != "seconds"} for p in json.loads((f / "phases.json").read_text())] for f in (cut, whole)]
    assert phases[0] == phases[1] and [p["kind"] for p in phases[0]] == ["rl", "sft", "rl"] and phases[0][1]["rows"] > 2
    a, b = (torch.load(f / "phase-02-rl" / "weights.pt", weights_only=True) for f in (cut, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    ours, theirs = (open_run(next(f.glob("*/meta.json")).parent).index().sort_values("id") for f in (cut, whole))
    assert ours.id.tolist() == theirs.id.tolist() and ours.task.tolist() == theirs.task.tolist() and ours.tokens.tolist() == theirs.tokens.tolist()
