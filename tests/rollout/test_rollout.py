"""Rollouts across rooms: what is drawn depends on seed and turn alone, what fails stays in its row, and an engine with other weights is found out."""

import asyncio
import random
import re
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, open_run, tiny_policy
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.drift import MaskError
from tirlab.rollout.engines import BatchEngine, EngineError, GenerateEngine, Sampled, Sampling, generate, gumbel, noise_seed
from tirlab.envs.environments import environment_tools
from tirlab.sandbox.executions import SandboxFault
from tirlab.core.formats import ChatFormat, make_format
from tirlab.rollout.loop import open_task, rollout
from tirlab.rollout.metrics import rollout_metrics
from tirlab.rollout.schedule import rollouts
from tirlab.trainer import trainer as trainer_module
from tirlab.trainer.batch_credit import check_tensors
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.core.trajectory import StopReason, ToolCall

TOK = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
SMALL = dict(per_device_train_batch_size=16, num_generations=8, max_completion_length=96, max_steps=1, learning_rate=1e-4, save_strategy="no", disable_tqdm=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()


class Late(PythonEnvironment):
    "A Python tool that takes a random time, another one in every run."

    def python(self, code: str) -> str:
        """
        Run Python code and return what it prints.

        Args:
            code: Python source.
        """
        time.sleep(random.SystemRandom().random() / 20)
        return super().python(code)


def play(model, schedule, seed=0, n=12, engine=None, limits=RolloutLimits(96), environment=Late, sampling=Sampling(2**31)):
    "Roll `n` arithmetic tasks out."
    tasks, engine = list(make_tasks("arithmetic", "test", n)), engine or GenerateEngine(model, TOK)
    environments = [environment() for _ in tasks]
    with engine.ready():
        return rollouts(tasks, engine, environments, [ChatFormat(TOK, list(environment_tools(e).values())) for e in environments], limits, sampling=sampling, seed=(seed,), schedule=schedule)


@pytest.fixture(scope="module")
def played(model): return play(model, "turn")


# ---- noise


def test_schedules_and_tool_delays_change_nothing(model, played):
    "schedule='turn' is the same bit for bit whatever the tools' delays; 'eager' draws the same tokens."
    state = torch.random.get_rng_state()
    first, second, eager, other = played, play(model, "turn"), play(model, "eager"), play(model, "turn", seed=1)
    assert [(t.completion_ids, t.logprobs, t.stop) for t in first] == [(t.completion_ids, t.logprobs, t.stop) for t in second]
    assert [t.completion_ids for t in first] == [t.completion_ids for t in eager] != [t.completion_ids for t in other]
    assert sum(len(t.turns) > 1 for t in first) > 3 and torch.equal(state, torch.random.get_rng_state())
    for a, b in zip(first, eager):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_a_row_draws_the_same_alone_and_in_a_crowd(model):
    prompts = [TOK.encode(f"<|im_start|>user\nsay {w}<|im_end|>\n<|im_start|>assistant\n") for w in ("a", "bcd", "efghij", "k9")]
    each = [Sampling(40, seed=noise_seed(3, i)) for i in range(4)]
    together = generate(model, TOK, prompts, each)
    for p, s, t in zip(prompts, each, together):
        (alone,) = generate(model, TOK, [p], [s])
        assert alone.ids == t.ids and alone.logprobs == pytest.approx(t.logprobs, abs=1e-4)


def test_noise_is_a_function_and_independent_over_its_arguments():
    seeds, positions = torch.tensor([noise_seed("x", i) for i in range(200)]), torch.arange(200)
    noise = gumbel(seeds, positions * 0, 64)
    assert torch.equal(noise[17:18], gumbel(seeds[17:18], positions[:1] * 0, 64)) and noise.isfinite().all()
    for again in (gumbel(seeds, positions * 0 + 1, 64), gumbel(seeds + 1, positions * 0, 64), noise.roll(1, 0), noise.roll(1, 1)):
        assert abs(torch.corrcoef(torch.stack([noise.flatten(), again.flatten()]))[0, 1]) < 0.03


def test_draws_follow_temperature_and_filters(model):
    "Frequencies of the first token over many seeds against the filtered distribution."
    prompt = TOK.encode("<|im_start|>user\nrab has 37, then +48. How many?<|im_end|>\n<|im_start|>assistant\n")
    logits = model(torch.tensor([prompt])).logits[0, -1]
    p = (logits / 1.5).softmax(-1)
    values, order = p.sort(descending=True)
    keep = order[:int((values.cumsum(0) - values < 0.8).sum())]
    want = torch.zeros_like(p)
    want[keep] = p[keep] / p[keep].sum()
    drawn = generate(model, TOK, [prompt] * 2000, [Sampling(1, 1.5, 0.8, seed=noise_seed(i)) for i in range(2000)])
    share = torch.tensor([t.ids[0] for t in drawn]).bincount(minlength=len(p)) / 2000
    assert (share - want).abs().max() < 0.04 and drawn[0].logprobs[0] == pytest.approx(want[drawn[0].ids[0]].log().item(), abs=1e-4)
    assert len({tuple(t.ids) for t in generate(model, TOK, [prompt] * 3, Sampling(8, 0.0))}) == 1


# ---- limits and options, with a scripted engine


class Says:
    "An engine that says given turns."

    def __init__(self, *turns):
        self.turns, self.asked = list(turns), []

    async def generate(self, ids, sampling):
        self.asked.append(sampling)
        text = self.turns[min(len(self.asked), len(self.turns)) - 1]
        ids = TOK.encode(text + "<|im_end|>")
        return Sampled(ids[:sampling.max_new_tokens], [-0.5] * min(len(ids), sampling.max_new_tokens), "end" if len(ids) <= sampling.max_new_tokens else "length")


def one(engine, limits=RolloutLimits(1000), tools=None):
    tools = tools or {"python": PythonEnvironment().python}
    format = ChatFormat(TOK, list(tools.values()))
    return asyncio.run(rollout(format.prompt([{"role": "user", "content": "hi"}]), engine, tools, format, limits, noise=(0,)))


CALL = '<tool_call>\n{"name": "python", "arguments": {"code": "37+48"}}\n</tool_call>'


@pytest.mark.parametrize("limits,turns,stop,n", [
    (RolloutLimits(1000), [CALL, "85"], StopReason.ANSWER, 2),
    (RolloutLimits(1000, turn_tokens=5), [CALL, "85"], StopReason.LENGTH, 1),
    (RolloutLimits(60), ["x" * 100], StopReason.LENGTH, 1),
    (RolloutLimits(1000, context_tokens=50), [CALL, "85"], StopReason.CONTEXT, 1),
    (RolloutLimits(1000, context_tokens=10), [CALL], StopReason.CONTEXT, 0),
    (RolloutLimits(1000, tool_rounds=1), [CALL, CALL], StopReason.MAX_TURNS, 2),
    (RolloutLimits(1000, malformed="stop"), ["<tool_call>{"], StopReason.MALFORMED, 1),
    (RolloutLimits(1000), ["<tool_call>{", "85"], StopReason.ANSWER, 2),
    (RolloutLimits(1000, answer_pattern=r"\\boxed"), ["85"], StopReason.VOID, 1),
    (RolloutLimits(1000, answer_pattern=r"\\boxed", void="observe"), ["85", r"\boxed{85}"], StopReason.ANSWER, 2),
])
def test_why_a_rollout_ends(limits, turns, stop, n):
    t = one(Says(*turns), limits)
    assert (t.stop, len(t.turns)) == (stop, n) and len(t.completion_ids) <= limits.completion_tokens
    assert len(t.prompt_ids) + len(t.completion_ids) <= max(limits.context_tokens, len(t.prompt_ids))


def test_budgets_reach_the_engine():
    engine = Says(CALL, "85")
    one(engine, RolloutLimits(300, turn_tokens=50))
    assert [s.max_new_tokens for s in engine.asked] == [50, 50] and len({s.seed for s in engine.asked}) == 2


def test_the_last_round_is_told_so():
    t = one(Says(CALL, CALL, "85"), RolloutLimits(1000, tool_rounds=2, last_turn_prompt="Answer now."))
    assert [r.content.endswith("Answer now.") for r in t.results] == [False, True] and "Answer now." in TOK.decode(t.turns[1].observation_ids)


def test_what_follows_the_first_call_is_dropped():
    "The model invents the tool's answer; asked to, we drop it, and the observation brings the end of turn that was never written."
    says = CALL + "\n<tool_response>\n99\n</tool_response> so 99"
    t = one(Says(says, "85"), RolloutLimits(1000, first_call_only=True))
    assert TOK.decode(t.turns[0].ids) == CALL and t.turns[0].observation_ids[0] == TOK.eos_token_id and t.results[0].content == "85"
    assert one(Says(says, "85")).turns[0].ids == TOK.encode(says + "<|im_end|>")
    assert Says(says).turns and one(e := Says(says, "85"), RolloutLimits(1000, first_call_only=True)) and e.asked[0].stop == ("</tool_call>",)


def test_a_function_that_never_comes_back_ends_the_run_with_a_sentence():
    def hang(code: str) -> str:
        """
        Never end.

        Args:
            code: Anything.
        """
        time.sleep(20)
    limits = RolloutLimits(100_000, tool_seconds=0.01, abandoned_tools=3)
    with pytest.raises(RuntimeError, match="never came back; make the tool end by itself"):
        format = ChatFormat(TOK, [hang])
        rollouts([format.prompt([{"role": "user", "content": "hi"}])], Says(CALL), [{"python": hang}], [format], limits)


def test_metrics_count_what_happened():
    m = rollout_metrics([one(Says(CALL, "85")), one(Says("<tool_call>{", "85"))])
    assert (m["rollout/turns"], m["rollout/calls"], m["rollout/malformed_calls"], m["rollout/stop_answer"], m["turns/tool_call"]) == (2, 0.5, 0.5, 1, 0.25)
    assert 0 < m["rollout/tool_latency_p50"] <= m["rollout/tool_latency_p99"]


# ---- the same task in any format


@pytest.mark.parametrize("name", ["json", "xml", "fenced", "list"])
@pytest.mark.parametrize("family", ENVIRONMENTS)
def test_the_ground_truth_solves_its_task_in_any_format(name, family):
    import json
    from tirlab.core.formats import render_call
    row, environment = make_tasks(family, "test", 1)[0], ENVIRONMENTS[family]()
    format = make_format(name, TOK, list(environment_tools(environment).values()))
    engine = Says(*[render_call(ToolCall(**json.loads(c)), name) for c in row["ground_truth"]], row["answer"])
    t = asyncio.run(rollout(row, engine, environment, format, RolloutLimits(2000)))
    assert answer_reward([t.messages], [row["answer"]]) == [1.0] and len(t.calls) == len(row["ground_truth"])
    assert open_task(row, environment, format)[0] == t.prompt_ids


# ---- failures


def breaks(model, when):
    "An engine that fails for some prompts."
    class Breaks(GenerateEngine):
        async def generate(self, ids, sampling):
            if when(ids, sampling):
                raise EngineError("The server is gone.")
            return await super().generate(ids, sampling)
    return Breaks(model, TOK)


def test_a_failed_row_keeps_nothing_and_the_others_go_on(model, played):
    whole, some = played, play(model, "turn", engine=breaks(model, lambda ids, s: TOK.decode(ids).count("assistant") == 2))
    assert {t.stop for t in some} >= {StopReason.FAILED, StopReason.ANSWER}
    for a, b in zip(whole, some):
        assert (b.stop is StopReason.FAILED and not b.turns and b.error == "The server is gone." and len(a.turns) > 1) or a.completion_ids == b.completion_ids


def test_a_sampler_that_runs_out_of_memory_is_an_engine_error():
    def dies(prompts, samplings):
        raise RuntimeError("out of memory")
    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(BatchEngine(dies).generate([1], Sampling()))


@pytest.mark.parametrize("answer", [lambda p, s: [], lambda p, s: next(iter([]))])
def test_nobody_waits_for_a_sampler_that_answers_nothing(answer):
    async def ask():
        return await asyncio.wait_for(BatchEngine(answer).generate([1], Sampling()), 20)
    with pytest.raises(EngineError):
        asyncio.run(ask())


def trainer(tmp_path, environment=PythonEnvironment, tasks=None, **options):
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **SMALL | options)
    return TIRTrainer(tiny_policy(), [answer_reward], args, tasks or make_tasks("arithmetic", n=8), environment_factory=environment)


@pytest.mark.parametrize("advantage", ["grpo", "gtpo"])
def test_training_goes_on_while_one_group_is_whole(advantage, tmp_path):
    t = trainer(tmp_path, advantage=advantage)
    lost = {noise_seed(t.args.seed, "train", 1, row, 0) for row in (2, 5)}     # two rows of the first group fail at their first turn
    t.engine = breaks(t.model, lambda ids, sampling: sampling.seed in lost)
    t.train()
    index = open_run(t.run_dir).index()
    assert (index.stop == "failed").sum() == 2 and len(index) == 16
    assert index[index.stop == "failed"].reward.isna().all() and all(p.isfinite().all() for p in t.model.parameters())


def test_no_whole_group_ends_the_run_with_what_the_engine_said(tmp_path):
    t = trainer(tmp_path)
    t.engine = breaks(t.model, lambda ids, sampling: True)
    with pytest.raises(EngineError, match="No group of rollouts is whole, 16 of 16 failed: The server is gone."):
        t.train()
    assert open_run(t.run_dir).status() == "failed"


def test_prompts_longer_than_the_context_end_with_a_sentence(tmp_path):
    tasks = make_tasks("arithmetic", n=2).map(lambda row: {"prompt": [{"role": "user", "content": "x" * 5000}]})
    with pytest.raises(EngineError, match="fill the model's context"):
        trainer(tmp_path, tasks=tasks).train()


class Flaky(PythonEnvironment):
    "An environment whose sandbox fails on one expression, and that notes when it is closed."
    closed = 0

    def python(self, code: str) -> str:
        """
        Run Python code and return what it prints.

        Args:
            code: Python source.
        """
        if code == "1":
            raise SandboxFault("the sandbox does not answer")
        return super().python(code)

    def _close(self):
        super()._close()
        Flaky.closed += 1


def test_a_sandbox_fault_never_becomes_an_observation():
    Flaky.closed, environment = 0, Flaky()
    environment._close, before = environment._close, Flaky.closed
    format = ChatFormat(TOK, [environment.python])
    prompt = format.prompt([{"role": "user", "content": "hi"}])
    bad = '<tool_call>\n{"name": "python", "arguments": {"code": "1"}}\n</tool_call>'
    fine = asyncio.run(rollout(prompt, Says(CALL, "85"), environment, format, RolloutLimits(1000)))
    lost = asyncio.run(rollout(prompt, Says(CALL, bad, "85"), environment, format, RolloutLimits(1000)))
    assert fine.stop is StopReason.ANSWER and (lost.stop, lost.turns, lost.error) == (StopReason.FAILED, [], "sandbox: the sandbox does not answer")
    assert Flaky.closed == before + 2, "what a rollout leaves running is closed with it"


# ---- is it our policy?


def test_an_engine_with_other_weights_is_found_out(tmp_path):
    "The canary: an engine whose copy is stale stops the run, one whose copy is right does not."
    def go(folder, stale):
        t = trainer(folder, max_steps=2)
        theirs = AutoModelForCausalLM.from_pretrained(tiny_policy())
        class Copy(GenerateEngine):
            def ready(self, version=0):
                if version == 0 or not stale:
                    theirs.load_state_dict(t.model.state_dict())
                return super().ready(version)
        t.engine, t.canary.needed = Copy(theirs, TOK), True
        t.args.sync_tolerance = 1e-4
        t.train()
        return t
    log = [x for x in go(tmp_path / "right", False).state.log_history if "sync/canary_gap" in x]
    assert len(log) == 2 and all(x["sync/canary_gap"] < 1e-4 and x["sync/canary_seconds"] > 0 for x in log)
    with pytest.raises(EngineError, match=re.escape("does not sample from the policy that is trained")):
        go(tmp_path / "stale", True)


def test_new_weights_are_sampled_from_at_once(model):
    "transformers' generate has no copy: after a change of weights it is what a fresh engine on them is."
    moved = AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()
    engine, prompt, sampling = GenerateEngine(moved, TOK), TOK.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"), Sampling(8, seed=5)
    def ask(engine, version):
        with engine.ready(version):
            return asyncio.run(engine.generate(prompt, sampling))
    old = ask(engine, 0)
    with torch.no_grad():
        moved.model.norm.weight *= 0.5
    assert ask(engine, 1) == ask(GenerateEngine(moved, TOK), 1) != old


def test_rollouts_that_importance_sampling_removes_are_counted(tmp_path):
    t = trainer(tmp_path)
    t.model.train()
    t._checked = True   # no rollouts lie behind these tensors
    mask = torch.ones(4, 3, dtype=torch.long)
    mask[2, 1:] = 0
    check_tensors(t, None, {"importance_sampling_ratio": torch.tensor([[1.0], [0.0], [0.0], [0.5]]), "completion_mask": mask})
    check_tensors(t, None, {"importance_sampling_ratio": torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 2.0, 0], [0, 0, 0]]), "completion_mask": mask})
    assert t._metrics["train"]["sync/removed_rollouts"] == [2.0, 3.0]


def test_the_gap_between_sampler_and_trainer_is_logged_and_on_record(tmp_path):
    t = trainer(tmp_path)
    t.train()
    log = next(x for x in t.state.log_history if "sync/gap_max" in x)
    assert 0 <= log["sync/gap_mean"] <= log["sync/gap_max"] < 1e-3
    row = open_run(t.run_dir).trajectory(open_run(t.run_dir).index().id.iloc[0])
    wrote = [bool(m) for m in row.mask]
    assert abs(row.logprob[wrote] - row.sampling_logprob[wrote]).max() < 1e-3
    assert {"rollout/generation_seconds", "rollout/tool_seconds", "rollout/tool_latency_p90", "rollout/stop_answer"} <= set(log)


def test_a_wrong_mask_stops_the_first_batch(tmp_path, monkeypatch):
    t, made = trainer(tmp_path), trainer_module.as_generated
    def wrong(*args):
        ids, completion_ids, mask, *rest = made(*args)
        return ids, completion_ids, [[1] * len(m) for m in mask], *rest
    monkeypatch.setattr(trainer_module, "as_generated", wrong)
    with pytest.raises(MaskError):
        t.train()


# ---- formats and schedules through the trainer


@pytest.mark.parametrize("call_format", ["json", "xml", "fenced", "list"])
def test_training_in_any_format(call_format, tmp_path):
    t = trainer(tmp_path, ENVIRONMENTS, make_tasks("all", n=6), call_format=call_format, advantage="gtpo")
    t.train()
    run = open_run(t.run_dir)
    row = run.trajectory(run.index().id.iloc[0])
    described = make_format(call_format, TOK, t._env_tools[run.index().environment.iloc[0]]).prompt([{"role": "user", "content": "x"}])
    assert TOK.decode(row.prompt_ids).startswith(TOK.decode(described).split("<|im_end|>")[0])


def test_a_template_without_tools_trains_with_calls_as_text(tmp_path):
    "A base model's template knows of no tools: refused as it is, fine with a call format of ours."
    plain = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
    plain.chat_template = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
                           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    del plain.response_template
    def go(call_format):
        args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), call_format=call_format, **SMALL)
        TIRTrainer(tiny_policy(), [answer_reward], args, make_tasks("arithmetic", n=8), processing_class=plain, environment_factory=PythonEnvironment).train()
    with pytest.raises(ValueError, match="does not support tool calling"):
        go(None)
    go("fenced")
    assert open_run(tmp_path / "run").status() == "finished" and not hasattr(plain, "response_template") and "assistant\n" in plain.chat_template


def test_eager_training_gives_the_same_trajectories(tmp_path):
    def go(name):
        t = trainer(tmp_path / name, schedule=name)
        t.train()
        run = open_run(t.run_dir)
        return [run.trajectory(i).ids.tolist() if hasattr(run.trajectory(i).ids, "tolist") else list(run.trajectory(i).ids) for i in run.index().id]
    assert go("turn") == go("eager")


# ---- TRL's sampler in several processes


def test_processes_that_sample_together_stay_in_step():
    "Two processes with unequal numbers of turns, TRL's sampler a collective: whoever is done keeps up, and both end."
    import threading
    from tirlab.trainer.engine_setup import join_sampling, trl_engine
    barrier, calls, shared = threading.Barrier(2, timeout=20), [0, 0], [None, None]
    def process(rank, turns):
        def gather(mine):
            barrier.wait()
            shared[rank] = mine[0]
            barrier.wait()
            return list(shared)
        def sample(prompts, images, fields, n):
            barrier.wait()      # a collective: hangs unless the other samples too
            calls[rank] += 1
            return [TOK.encode("x<|im_end|>") for _ in prompts], None
        engine = trl_engine(sample, 8, [TOK.eos_token_id], gather)
        async def play():
            for _ in range(turns):
                assert (await engine.generate([1], Sampling())).stop == "end"
        asyncio.run(play())
        join_sampling(sample, [1], gather)
    threads = [threading.Thread(target=process, args=a, daemon=True) for a in ((0, 2), (1, 5))]
    [t.start() for t in threads]
    [t.join(30) for t in threads]
    assert not any(t.is_alive() for t in threads) and calls == [5, 5]


# ---- found in review, kept found


def leaves(code: str) -> str:
    """
    Leave.

    Args:
        code: Anything.
    """
    raise SystemExit(2)


async def cancels(code: str) -> str:
    """
    Cancel itself.

    Args:
        code: Anything.
    """
    raise asyncio.CancelledError


@pytest.mark.parametrize("tool,said", [(leaves, "2"), (cancels, "cancelled")])
def test_a_tool_that_exits_ends_itself_alone(tool, said):
    from tirlab.rollout.calls import run_call
    async def go():
        return await asyncio.wait_for(run_call(ToolCall(tool.__name__, {"code": "1"}), {tool.__name__: tool}, RolloutLimits(), asyncio.Semaphore(2)), 20)
    assert asyncio.run(go()).content == str({"error": said})


def test_without_tools_a_failed_row_is_no_token_to_learn(tmp_path):
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **SMALL)
    t = TIRTrainer(tiny_policy(), [answer_reward], args, make_tasks("arithmetic", n=8))
    lost = {noise_seed(args.seed, "train", 1, row, 0) for row in (2, 5)}
    t.engine = breaks(t.model, lambda ids, sampling: sampling.seed in lost)
    t.train()
    assert (open_run(t.run_dir).index().stop == "failed").sum() == 2


def test_every_train_takes_the_weights_anew(tmp_path):
    "Steps are counted from 0 in every `train`; an engine that renews its weights by version must not be fooled."
    t = trainer(tmp_path, max_completion_length=48)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_policy())
    class Copy(GenerateEngine):
        version = None
        def ready(self, version=0):
            if version != self.version:
                self.version = version
                theirs.load_state_dict(t.model.state_dict())
            return super().ready(version)
    t.engine, t.canary.needed, t.args.sync_tolerance = Copy(theirs, TOK), True, 1e-4
    t.train()
    t.train()
    with torch.no_grad():
        t.model.model.norm.weight *= 0.9
    t.train()
    t.args.sync_tolerance = None


def test_turn_budgets_hold_with_trls_sampler(tmp_path):
    t = trainer(tmp_path, engine="trl", max_turn_length=5)
    t.train()
    assert max(len(turn.ids) for x in t.batch.trajectories for turn in x.turns) == 5


def test_filters_that_could_not_work_are_refused():
    with pytest.raises(ValueError, match="low_prob"): TIRConfig(void_filter="low_prob", filter_threshold=0.01, engine="trl")
    with pytest.raises(ValueError, match="filter_threshold"): TIRConfig(void_filter="high_ratio")
    with pytest.warns(UserWarning, match="the ratio is always 1: set num_iterations=2"): TIRConfig(void_filter="high_ratio", filter_threshold=2.0)


@pytest.mark.parametrize("faults", [1, 2])
def test_a_lost_sandbox_costs_a_rollout_one_more_try(faults, tmp_path):
    "In the first group each sandbox fails so often: once, and the rollout begins again with its environment reset; twice, and it is dropped with the reason in the trace."
    made, resets = [], []

    class Frail:
        def __init__(self):
            made.append(self)
            self.left = faults * (len(made) <= 8)

        def reset(self, **row):
            resets.append(self)

        def python(self, code: str) -> str:
            """
            Run code.

            Args:
                code: Python.
            """
            self.left -= 1
            if self.left >= 0: raise SandboxFault("gone")
            return "85"

    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=16, num_generations=8, max_completion_length=96, seed=0,
                     report_to="none", save_strategy="no", disable_tqdm=True)
    t = TIRTrainer(tiny_policy(), answer_reward, args, make_tasks("arithmetic", n=8), environment_factory=Frail)
    t.train()
    index, again = open_run(tmp_path / "run").index(), len(resets) - 16
    lost = index[index.stop == "failed"]
    assert again > 0 and len(lost) == (0 if faults == 1 else again)
    assert (lost.dropped == "sandbox: gone").all() and lost.reward.isna().all() and set(lost.group) <= {0}


def test_an_engine_goes_on_after_an_interrupt_that_came_before_it_began():
    engine = BatchEngine(lambda prompts, samplings: [Sampled([1])] * len(prompts), thread=False)

    async def left():
        asyncio.ensure_future(engine.generate([1], Sampling(1)))
        await asyncio.sleep(0)   # it waits, and the batch has not begun

    asyncio.run(left())
    assert asyncio.run(asyncio.wait_for(engine.generate([2], Sampling(1)), 10)).ids == [1]
