"""`VLLMEngine` on the real vLLM: its log-probabilities, its prefixes, its failures."""
import asyncio
import threading
import time

import pytest
import torch
from tiny_rollouts import ROWS, alike, ask, gap, other_weights, roll, scored
from tirlab.rollout.engines import EngineError, Sampling
from tirlab.core.trajectory import StopReason
from tirlab.rollout.vllm import VLLMEngine

pytestmark = pytest.mark.vllm


def prompts_of(tok, n=8, size=200):
    "Prompts of a few blocks."
    text = "".join(tok.apply_chat_template(r["prompt"], tokenize=False) for r in ROWS[::8]) * 3
    return [tok.encode(text)[i:size + i] for i in range(n)]


def loader(llm, model):
    "Brings a model's weights into vLLM as TRL does."
    theirs = llm.llm_engine.model_executor.driver_worker.model_runner.model
    return lambda: theirs.load_weights((name, p.data) for name, p in model.named_parameters())


@pytest.fixture
def engine(llm, model):
    "An engine with the tiny policy's own weights, whatever the test before did."
    return VLLMEngine(llm, sync=loader(llm, model))


def test_rollouts_and_their_logprobs(engine, llm, model, tok, report):
    before = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    with engine.ready(0): done = roll(engine, tok)
    after = {m.name: m.value - before[m.name] for m in llm.get_metrics() if hasattr(m, "value")}
    assert len(done) == 64 and all(t.stop is not StopReason.FAILED and t.turns for t in done) and max(len(t.turns) for t in done) > 1
    difference, rate = gap(model, done), engine.prefix_cache_hit_rate()
    report(f"64 rollouts, {sum(len(t.turns) for t in done)} turns: prefix cache hit rate {rate:.1%}, log-probabilities within {difference:.1e} of transformers'")
    assert difference < 1e-3 and rate > 0
    assert rate == pytest.approx(after["vllm:prefix_cache_hits"] / after["vllm:prefix_cache_queries"])


def test_seeds_schedules_and_loops(engine, tok):
    with engine.ready(0): first, again, turn, other = [[t.completion_ids for t in roll(engine, tok, s, x)] for s, x in ((0, "eager"), (0, "eager"), (0, "turn"), (1, "eager"))]
    assert first == again == turn != other


def test_schedule_turn_is_the_same_bits(engine, tok):
    def bits(version):
        with engine.ready(version): return [(t.completion_ids, t.logprobs) for t in roll(engine, tok, schedule="turn")]
    assert bits(0) == bits(1)   # a new version: no prefix is left from the first


def test_prompts_are_computed_whole(llm, model, tok):
    "More prompt tokens than a step takes, each prompt with a seed: computed in parts, all requests would die of it."
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    scheduler.enable_chunked_prefill = True
    engine = VLLMEngine(llm, sync=loader(llm, model))
    assert not scheduler.enable_chunked_prefill and 64 * 200 > scheduler.max_num_batched_tokens
    assert len(ask(engine, prompts_of(tok, 64))) == 64


def test_a_context_that_no_step_holds_is_warned_of(llm, monkeypatch):
    scheduler = llm.llm_engine.vllm_config.scheduler_config
    monkeypatch.setattr(scheduler, "enable_chunked_prefill", True)
    monkeypatch.setattr(llm.llm_engine.model_config, "max_model_len", scheduler.max_num_batched_tokens + 1)
    with pytest.warns(UserWarning, match="max_num_batched_tokens of at least"): VLLMEngine(llm)
    assert scheduler.enable_chunked_prefill   # a longer prompt would wait forever


def test_requests_of_one_pass_are_in_one_step(engine, llm, monkeypatch):
    counts, real = [], llm.llm_engine.step
    def step():
        counts.append(llm.llm_engine.get_num_unfinished_requests())
        return real()
    monkeypatch.setattr(llm.llm_engine, "step", step)
    async def slowly(row):
        time.sleep(2e-3)   # a step takes no longer
        return await engine.generate([5, 6, row], Sampling(1, seed=row))
    async def all_of_them(): return await asyncio.gather(*map(slowly, range(64)))
    with engine.ready(0): asyncio.run(all_of_them())
    assert counts[0] == 64


def test_weights_are_fresh_once(llm):
    synced = VLLMEngine(llm, sync=lambda: None)
    assert not synced.fresh()
    told = []
    for version in (0, 0, 1):
        with synced.ready(version): told += [synced.fresh(), synced.fresh()]
    assert told == [[synced], [], [], [], [synced], []]
    never = VLLMEngine(llm)
    with never.ready(0): assert never.fresh() == [never]
    with never.ready(1): assert never.fresh() == []


@pytest.mark.parametrize("sampling", [Sampling(24, temperature=0.7), Sampling(24, top_k=5), Sampling(24, top_p=0.8), Sampling(24, temperature=0)], ids=str)
def test_logprobs_are_those_after_temperature_and_filters(engine, model, tok, sampling):
    prompts = prompts_of(tok, 4)
    for prompt, turn in zip(prompts, ask(engine, prompts, 0, sampling), strict=True):
        assert (scored(model, prompt, turn.ids, sampling) - torch.tensor(turn.logprobs)).abs().max() < 1e-3


def test_stop_string_and_limit(engine, tok):
    prompt = tok.apply_chat_template(ROWS[0]["prompt"], add_generation_prompt=True, return_dict=False)
    turn, short, stopped = [ask(engine, [prompt], 0, Sampling(n, temperature=0, stop=stop))[0] for n, stop in ((64, ()), (3, ()), (64, ("</tool_call>",)))]
    assert turn.stop == "end" and turn.ids[-1] == tok.eos_token_id
    assert short.stop == "length" and short.ids == turn.ids[:3]
    assert stopped.stop == "end" and stopped.ids == turn.ids[:len(stopped.ids)] and tok.decode(stopped.ids).endswith("</tool_call>")


# New weights

def test_prefixes_of_older_weights_are_not_used(llm, make_llm, model, tok, tmp_path, monkeypatch):
    prompts, greedy = prompts_of(tok), Sampling(24, temperature=0)
    engine = VLLMEngine(llm, sync=loader(llm, model))
    old = ask(engine, prompts, 0, greedy)
    other_weights(model).save_pretrained(tmp_path), tok.save_pretrained(tmp_path)
    fresh = ask(VLLMEngine(make_llm(tmp_path)), prompts, 0, greedy)
    worst = lambda turns: max((scored(model, p, t.ids) - torch.tensor(t.logprobs)).abs().max().item() for p, t in zip(prompts, turns, strict=True))
    cached = engine._cached_tokens
    new = ask(engine, prompts, 1, greedy)
    assert engine._cached_tokens == cached and worst(new) < 1e-3 and alike(new, fresh)
    assert max(abs(x.logprobs[0] - y.logprobs[0]) for x, y in zip(new, old, strict=True)) > 1e-2

    # Had they been kept, one would see it.
    ask(VLLMEngine(llm, sync=loader(llm, fresh_model())), prompts, 0, greedy)
    monkeypatch.setattr(llm, "reset_prefix_cache", lambda: True)
    assert worst(ask(VLLMEngine(llm, sync=loader(llm, model)), prompts, 0, greedy)) > 1e-2


def fresh_model():
    from transformers import AutoModelForCausalLM
    from tirlab.core.tiny import tiny_policy
    return AutoModelForCausalLM.from_pretrained(tiny_policy())


# Failures

def test_cancelled_turns_leave_the_engine(engine, llm, tok):
    async def impatient():
        async with asyncio.timeout(0.3): await asyncio.gather(*(engine.generate(p, Sampling(800)) for p in prompts_of(tok, 4)))
    step = llm.llm_engine.step
    try:
        llm.llm_engine.step = lambda: threading.Event().wait(0.02) and None or [o for o in step() if not o.finished]   # nothing ever ends
        with engine.ready(0), pytest.raises(TimeoutError): asyncio.run(impatient())
        with engine.ready(0): assert not llm.llm_engine.has_unfinished_requests()
    finally: llm.llm_engine.step = step


def test_an_error_in_a_step_ends_live_turns_and_only_those(engine, llm, tok, monkeypatch):
    before = ask(engine, prompts_of(tok), 0)
    step, calls = llm.llm_engine.step, []
    def breaks():
        calls.append(1)
        if len(calls) == 5: raise RuntimeError("illegal memory access")
        return step()
    monkeypatch.setattr(llm.llm_engine, "step", breaks)
    async def all_of_them(): return await asyncio.gather(*(engine.generate(p, Sampling(64)) for p in prompts_of(tok)), return_exceptions=True)
    with engine.ready(0): got = asyncio.run(all_of_them())
    failed = [g for g in got if isinstance(g, EngineError)]
    assert failed and "illegal memory access" in str(failed[0]) and not llm.llm_engine.has_unfinished_requests()
    assert alike(ask(engine, prompts_of(tok), 0), before)


def test_rollouts_of_a_dying_engine_are_failed_not_cut(engine, llm, tok, monkeypatch):
    step, calls = llm.llm_engine.step, []
    def dies():
        calls.append(1)
        if len(calls) > 60: raise RuntimeError("gone")
        return step()
    monkeypatch.setattr(llm.llm_engine, "step", dies)
    with engine.ready(0): done = roll(engine, tok)
    failed = [t for t in done if t.stop is StopReason.FAILED]
    assert failed and all(not t.turns and "gone" in t.error for t in failed)
    assert all(len(t.logprobs) == len(t.completion_ids) for t in done if t.stop is not StopReason.FAILED)


def test_mistakes_are_not_failures(engine, tok):
    with pytest.raises(ValueError, match="1024"): ask(engine, [prompts_of(tok, 1, 200)[0] * 10], 0)


def test_raw_logprobs_are_refused(vllm, llm, monkeypatch):
    monkeypatch.setattr(llm.llm_engine.model_config, "logprobs_mode", "raw_logprobs")
    with pytest.raises(ValueError, match="processed_logprobs"): VLLMEngine(llm)
