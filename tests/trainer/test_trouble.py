"""What can go wrong in a batch, and what it must not cost: rows that fail, prompts that do not fit, tools that leave something behind."""

import asyncio
import decimal
import functools
import os
import threading

import pytest
import torch
from small import small_policy
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, open_run, tiny_policy
from tirlab.rollout.calls import RolloutLimits, abandoned_tools, run_call
from tirlab.rollout.engines import EngineError, GenerateEngine, Sampled, Sampling, generate, noise_seed
from tirlab.core.schemas import tool_schemas
from tirlab.trainer.batch_credit import check_tensors
from tirlab.trainer.engine_setup import Canary
from tirlab.core.trajectory import ToolCall, ToolError

TOK = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
SMALL = dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=64, max_steps=1, learning_rate=1e-4, save_strategy="no", disable_tqdm=True, report_to="none")


def trainer(folder, reward=answer_reward, dataset=None, environment=PythonEnvironment, policy=None, **options):
    args = TIRConfig(output_dir=str(folder), run_dir=str(folder / "run"), **SMALL | options)
    return TIRTrainer(policy or small_policy(), [reward], args, dataset or make_tasks("arithmetic", n=8), make_tasks("arithmetic", "test", 8), environment_factory=environment)


class Breaks(GenerateEngine):
    "Loses the rows whose first turn has one of these seeds."
    def __init__(self, t, *names): self.lost = {noise_seed(t.args.seed, *n, 0) for n in names}; super().__init__(t.model, TOK, thread=False)

    async def generate(self, ids, sampling):
        if sampling.seed in self.lost: raise EngineError("a hiccup")
        return await super().generate(ids, sampling)


def test_one_failed_row_of_a_further_round_does_not_end_the_run(tmp_path):
    "The second round of sampling is one group, and it is not whole; the first round's is."
    def half(completions, **kwargs): return [0.0 if i < 4 and len(completions) > 4 else float(i % 2) for i in range(len(completions))]
    t = trainer(tmp_path, half, oversample=1.0, min_reward_std=1e-3, oversample_rounds=2)
    t.engine = Breaks(t, ("train", 1, 8))
    t.train()
    index = open_run(t.run_dir).index()
    assert (index.stop == "failed").sum() == 1 and index.dropped.isna().sum() >= 4


def test_all_groups_broken_is_an_error_also_after_further_rounds(tmp_path):
    t = trainer(tmp_path, oversample=1.0, min_reward_std=1e-3, oversample_rounds=1, trace=False)
    t.engine = Breaks(t, *[("train", 1, row) for row in range(0, 64, 4)])
    with pytest.raises(EngineError, match="No group of rollouts is whole.*a hiccup"): t.train()


def test_one_failed_row_does_not_end_an_evaluation(tmp_path):
    t = trainer(tmp_path, per_device_eval_batch_size=4, eval_strategy="steps", eval_steps=1)
    t.engine = Breaks(t, ("eval", 1, 5))
    t.train()
    index = open_run(t.run_dir).index()
    assert t.state.global_step == 1 and (index[index.split == "eval"].stop == "failed").sum() == 1


def test_an_evaluation_draws_the_same_every_time(tmp_path):
    t, seen = trainer(tmp_path, trace=False, per_device_eval_batch_size=8), []
    for _ in range(2):
        t.evaluate()
        seen.append([x.completion_ids for x in t.batch.trajectories])
    assert seen[0] == seen[1]


def test_a_prompt_longer_than_the_context_costs_its_own_group(tmp_path):
    "A model with 256 positions, one task of two that does not fit: it never reaches the model, and training goes on."
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOK), n_positions=256, n_embd=32, n_layer=1, n_head=2, eos_token_id=TOK.eos_token_id, pad_token_id=TOK.pad_token_id))
    model.config._name_or_path = "gpt"
    tasks = make_tasks("arithmetic", n=2).map(lambda row, i: row | ({"prompt": [{"role": "user", "content": "x" * 500}]} if i == 0 else {}), with_indices=True)
    args = TIRConfig(output_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **SMALL)
    TIRTrainer(model, [answer_reward], args, tasks, processing_class=TOK, environment_factory=PythonEnvironment).train()
    index, run = open_run(tmp_path / "run").index(), open_run(tmp_path / "run")
    lost = index[index.stop == "context"]
    assert len(lost) == 4 and lost.dropped.notna().all() and lost.group.nunique() == 1 and len(run.trajectory(lost.id.iloc[0]).prompt_ids) > 256


@pytest.mark.parametrize("advantage", ["grpo", "lite_ppo"])
def test_equal_rewards_are_no_signal_also_where_floats_round(advantage, tmp_path):
    "The mean of eight times 0.7 is not 0.7: the step is skipped all the same, and the weights stay."
    t = trainer(tmp_path, lambda completions, **kwargs: [0.7] * len(completions), num_generations=8, advantage=advantage, trace=False)
    before = [p.clone() for p in t.model.parameters()]
    t.train()
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters())) and [m["skipped_steps"] for m in t.state.log_history if "skipped_steps" in m] == [1.0]


def test_rollouts_that_importance_sampling_removed_are_counted(tmp_path):
    "TRL's ratio is 1 on observations: a rollout is removed when every token of the model's is."
    t = trainer(tmp_path, trace=False)
    ratio, tool = torch.tensor([[0.0, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]), torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, 0]])
    t.model.train()
    t._checked = True   # no rollouts lie behind these tensors
    check_tensors(t, None, {"importance_sampling_ratio": ratio, "completion_mask": torch.ones(3, 4, dtype=torch.long), "tool_mask": tool})
    assert t._metrics["train"]["sync/removed_rollouts"] == [1.0]


def test_the_canary_asks_everyone_who_was_brought_weights():
    "Two servers, the second with other weights; and one that is synced again at the same version."
    class Model(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32
        def forward(self, ids, logits_to_keep): return type("Out", (), {"logits": torch.zeros(1, logits_to_keep, 4)})
    class Server:
        def __init__(self, logp): self.logp = logp
        async def generate(self, ids, sampling): return Sampled([1, 2], [self.logp] * 2)
    class Engine:
        def fresh(self): return self.now
    true, engine, canary = float(torch.tensor(0.25).log()), Engine(), Canary(TIRConfig(temperature=1.0))
    engine.now = [Server(true), Server(true - 0.4)]
    canary.sample(engine, [1, 2, 3], 1)
    with pytest.raises(EngineError, match="differ by up to 0.4"): canary.check(Model())
    engine.now = [Server(true)]
    canary.sample(engine, [1, 2, 3], 1)
    assert canary.check(Model())["sync/canary_gap"] < 1e-6
    engine.now = []
    canary.sample(engine, [1, 2, 3], 2)
    assert canary.check(Model()) == {}


def test_where_nobody_can_be_asked_the_batch_is_the_canary(tmp_path):
    "Several processes that sample together: the gap of their rollouts stops the run, before the optimiser steps."
    t = trainer(tmp_path, trace=False)
    t.canary = Canary(t.args, needed=False, collective=True)
    t.train()
    before, t.canary, inner = [p.clone() for p in t.model.parameters()], Canary(t.args, needed=False, collective=True), t.engine._sample
    t.engine._sample = lambda prompts, samplings: [Sampled(s.ids, [p - 0.1 for p in s.logprobs], s.stop) for s in inner(prompts, samplings)]
    with pytest.raises(EngineError, match="0.1 nats a token from the trainer's"): t.train()
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters()))


def test_training_with_continuous_batching_is_training_with_generate(tmp_path):
    "The same rollouts and the same step, whichever of transformers' engines sampled."
    rows = []
    for engine in ("generate", "continuous"):
        t = trainer(tmp_path / engine, engine=engine, schedule="turn", max_steps=2, policy=tiny_policy())
        t.train()
        run = open_run(t.run_dir)
        rows.append([list(run.trajectory(i).ids) for i in run.index().id])
    assert rows[0] == rows[1] and len(rows[0]) == 16


# ---- tools


def ask(tool, slots=4, **limits):
    async def go(): return await run_call(ToolCall("tool", {}), {"tool": tool}, RolloutLimits(**limits), asyncio.Semaphore(slots) if slots else None)
    return asyncio.run(go())


def test_functions_that_need_an_order_get_it(tmp_path):
    "Tools that share a counter: with max_concurrent_tools=1 they run one after another, in the trainer's own thread."
    threads, running = [], []

    class Counts(PythonEnvironment):
        def python(self, code: str) -> str:
            """
            Run code.

            Args:
                code: Python.
            """
            running.append(1)
            assert len(running) == 1, "another one is running"
            threads.append(threading.current_thread())
            running.pop()
            return str(len(threads))
    t = trainer(tmp_path, environment=Counts, policy=tiny_policy(), max_concurrent_tools=1, trace=False)
    t.train()
    assert threads and set(threads) == {threading.main_thread()}
    answers = sorted(int(r.content) for x in t.batch.trajectories for r in x.results if r.error is None)
    assert answers == list(range(1, len(threads) + 1))


def test_a_function_finds_nothing_of_the_one_before():
    "Threads are used again; context variables and decimal's precision are not."
    def spoil(): decimal.getcontext().prec = 3; return threading.current_thread().name
    def look(): return decimal.getcontext().prec
    for _ in range(3): ask(spoil)
    assert ask(look).content == "28"


def test_coroutines_count_among_the_tools_that_run_at_once():
    running, most = 0, 0

    async def tool():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return "ok"

    async def go():
        slots = asyncio.Semaphore(2)
        return await asyncio.gather(*(run_call(ToolCall("tool", {}), {"tool": tool}, RolloutLimits(), slots) for _ in range(8)))
    assert {r.content for r in asyncio.run(go())} == {"ok"} and most == 2


def test_a_coroutine_that_will_not_be_cancelled_is_left():
    async def stubborn():
        for _ in range(20):
            try: await asyncio.sleep(0.05)
            except asyncio.CancelledError: pass
        return "late"
    assert ask(stubborn, tool_seconds=0.05).error is ToolError.TIMEOUT


def test_a_child_process_does_not_count_the_parents_functions():
    gate = threading.Event()
    assert ask(lambda: gate.wait(5), tool_seconds=0.02).error is ToolError.TIMEOUT and abandoned_tools() == 1
    pid = os.fork()
    if not pid: os._exit(abandoned_tools())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    gate.set()


def test_schemas_follow_the_function():
    def tool(a: int) -> int:
        """
        Add.

        Args:
            a: A number.
        """
        return a
    first = tool_schemas([tool])[0]["function"]["description"]
    tool.__doc__ = tool.__doc__.replace("Add.", "Subtract.")
    assert (first, tool_schemas([tool])[0]["function"]["description"]) == ("Add.", "Subtract.") and tool_schemas([{"type": "function"}]) == [{"type": "function"}]




# ---- engines


def test_equal_prompts_are_computed_once_and_drawn_like_others():
    "A group's first turns with shared keys and values, and each prompt alone: same tokens, same log-probabilities."
    model = AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()
    prompts = [TOK.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in make_tasks("all", n=3) for _ in range(4)]
    samplings, widths, inner = [Sampling(40, seed=noise_seed(0, i)) for i in range(12)], [], model.forward
    model.forward = functools.wraps(inner)(lambda *args, **kwargs: widths.append(kwargs["input_ids"].shape) or inner(*args, **kwargs))
    together = generate(model, TOK, prompts, samplings)
    longest = max(map(len, prompts))
    assert widths[0] == (3, longest - 1) and widths[1] == (12, 1)
    for prompt, sampling, turn in zip(prompts, samplings, together):
        alone = generate(model, TOK, [prompt], sampling)[0]
        assert alone.ids == turn.ids and alone.logprobs == pytest.approx(turn.logprobs, abs=1e-4)
