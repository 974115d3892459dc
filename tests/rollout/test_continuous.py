"""Continuous batching: the turns of `generate`, a model that trains in between, nobody who waits forever. Last, transformers' private seams."""

import asyncio
import copy
import gc
import inspect
import random
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.continuous_batching import cache, cache_manager, continuous_api, input_outputs, model_runner, requests, scheduler
from trl.trainer.utils import add_fused_lm_head

from tirlab.rollout.continuous import ContinuousEngine
from tirlab.rollout.engines import EngineError, GenerateEngine, Sampling, noise_seed
from tirlab.core.formats import ChatFormat
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.schedule import rollouts
from tirlab.core.tiny import tiny_policy

TOK = AutoTokenizer.from_pretrained(tiny_policy())
ASKED = [[{"role": "user", "content": f"rab has {n}, then +48, then *6. How many?"}] for n in (7, 37, 381)]
FIRST = [TOK.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in ASKED]
PROMPTS = [FIRST[i % 3] for i in range(9)]
EACH = [Sampling(32, seed=noise_seed(0, 1, row, 0)) for row in range(9)]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_policy())


def ask(engine, prompts=PROMPTS, samplings=EACH):
    async def go():
        with engine.ready():
            return await asyncio.wait_for(asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, samplings)), return_exceptions=True), 30)
    return asyncio.run(go())


def alike(ours, theirs):
    assert [(t.ids, t.stop) for t in ours] == [(t.ids, t.stop) for t in theirs]
    for a, b in zip(ours, theirs):
        assert torch.allclose(torch.tensor(a.logprobs), torch.tensor(b.logprobs), atol=1e-4)


def scored(model, prompt, ids):
    with torch.no_grad():
        return model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(ids) - 1), ids]


def test_log_probabilities_are_those_of_a_forward(model):
    turns = ask(ContinuousEngine(model, TOK))
    for prompt, turn in zip(PROMPTS, turns):
        assert torch.allclose(scored(model.eval(), prompt, turn.ids), torch.tensor(turn.logprobs), atol=1e-4)


@pytest.mark.parametrize("sampling", [
    {}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}, {"temperature": 1.3, "min_p": 0.1}, {"max_new_tokens": 5},
    {"stop": ("</tool_call>", "48")},
], ids=str)
def test_the_turns_of_generate(model, sampling):
    samplings = [replace(s, **sampling) for s in EACH]
    alike(ask(ContinuousEngine(model, TOK), samplings=samplings), ask(GenerateEngine(model, TOK), samplings=samplings))


def test_a_repetition_penalty_counts_the_prompt(model):
    samplings = [replace(s, repetition_penalty=1.4) for s in EACH[:2]]      # one prompt: generate would count padding too
    alike(ask(ContinuousEngine(model, TOK), [FIRST[0]] * 2, samplings), ask(GenerateEngine(model, TOK), [FIRST[0]] * 2, samplings))


def test_requests_that_draw_differently_share_a_step(model):
    samplings = [replace(s, **k) for s, k in zip(EACH, [{}, {"temperature": 0.0}, {"top_k": 3}, {"max_new_tokens": 3}, {"stop": ("8",)}] * 2)]
    alike(ask(ContinuousEngine(model, TOK), samplings=samplings), ask(GenerateEngine(model, TOK), samplings=samplings))


@pytest.mark.parametrize("layers", [["full_attention"] * 2, ["sliding_attention", "full_attention"]], ids=["full", "sliding"])
def test_shared_heads_and_sliding_windows(layers):
    torch.manual_seed(0)
    small = dict(vocab_size=len(TOK), hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    windows = dict(num_hidden_layers=2, layer_types=layers, use_sliding_window="sliding_attention" in layers, sliding_window=12, max_window_layers=0)
    other = Qwen3ForCausalLM(Qwen3Config(**small, **windows, eos_token_id=TOK.eos_token_id))
    samplings = [replace(s, temperature=0.3) for s in EACH]
    alike(ask(ContinuousEngine(other, TOK, 4096), samplings=samplings), ask(GenerateEngine(other, TOK), samplings=samplings))


def test_a_cache_too_small_for_all_at_once(model):
    engine, put_back = ContinuousEngine(model, TOK, 160), []
    with engine.ready(): offload = engine._steps.processor.offloading_manager.offload_requests
    engine._steps.processor.offloading_manager.offload_requests = lambda: put_back.append(offload()) or put_back[-1]
    prompts, long = [FIRST[0][:20]] * 6, [replace(s, temperature=50.0, max_new_tokens=100) for s in EACH[:6]]   # noise seldom ends by itself
    alike(ask(engine, prompts, long), ask(GenerateEngine(model, TOK), prompts, long))
    assert sum(put_back) > 0                                            # some had to start again, from the token they had reached


def test_prompts_longer_than_a_step(model):
    prompts = [(FIRST[0] * 50)[: 700 + 50 * i] for i in range(4)]       # 3100 tokens, of which a step takes 2048
    alike(ask(ContinuousEngine(model, TOK), prompts, EACH[:4]), ask(GenerateEngine(model, TOK), prompts, EACH[:4]))


def test_prefixes_are_shared_between_rows_and_turns(model):
    engine = ContinuousEngine(model, TOK)
    async def go():
        with engine.ready():
            firsts = await asyncio.gather(*(engine.generate(FIRST[1], s) for s in EACH[:8]))
            rows = engine.prefix_hit_rate
            seconds = [FIRST[1] + t.ids + FIRST[0] for t in firsts]
            return rows, firsts, seconds, await asyncio.gather(*(engine.generate(p, s) for p, s in zip(seconds, EACH)))
    rows, firsts, prompts, turns = asyncio.run(go())
    full = len(FIRST[1]) // 16 * 16
    assert rows == pytest.approx(7 * full / (8 * len(FIRST[1])))
    found = engine.prefix_hit_rate * (8 * len(FIRST[1]) + sum(map(len, prompts))) - 7 * full
    assert found >= sum((len(FIRST[1]) + len(t.ids) - 2) // 16 * 16 for t in firsts)      # a page that only the last step filled is not kept
    alike(turns, ask(GenerateEngine(model, TOK), prompts, EACH[:8]))


def python(code: str) -> str:
    """
    Run Python code.

    Args:
        code: An expression.
    """
    return str(len(code))


def test_the_turn_schedule_gives_the_same_bits(model):
    engine = ContinuousEngine(model, TOK)
    format = ChatFormat(TOK, [python])
    def go(e, schedule):
        with e.ready():
            return rollouts(PROMPTS, e, [{"python": python}] * 9, [format] * 9, RolloutLimits(96), seed=(3,), schedule=schedule)
    one, two, fresh = go(engine, "turn"), go(engine, "turn"), go(ContinuousEngine(model, TOK), "turn")
    eager, static = go(engine, "eager"), go(GenerateEngine(model, TOK), "turn")
    assert [t.logprobs for t in one] == [t.logprobs for t in two] == [t.logprobs for t in fresh] and max(len(t.turns) for t in one) > 1
    assert [t.completion_ids for t in one] == [t.completion_ids for t in eager] == [t.completion_ids for t in static]


def gradients(model):
    model.zero_grad()
    model(torch.tensor([FIRST[0]]), labels=torch.tensor([FIRST[0]])).loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_the_model_trains_as_if_nothing_had_been_there(model):
    model.train()
    before, config = gradients(model), copy.deepcopy(model.config.to_dict())
    engine = ContinuousEngine(model, TOK)
    for _ in range(2):
        ask(engine)
        assert all(torch.equal(a, b) for a, b in zip(before, gradients(model)))
    with pytest.raises(KeyError), engine.ready():
        assert not model.training and model.config._attn_implementation == "paged|tirlab"
        raise KeyError
    assert model.training and model.config.to_dict() == config and model.config._attn_implementation == "sdpa"
    copy.deepcopy(model)


def test_prefixes_of_older_weights_are_never_used(model):
    engine = ContinuousEngine(model, TOK)
    async def turns(e, version):
        with e.ready(version):
            return await asyncio.gather(*(e.generate(p, s) for p, s in zip(PROMPTS, EACH)))
    old = asyncio.run(turns(engine, 0))
    for p, g in zip(model.parameters(), gradients(model)):
        p.data -= 1e-3 * g
    new, again = asyncio.run(turns(engine, 1)), asyncio.run(turns(ContinuousEngine(model, TOK), 1))
    assert new == again and [t.logprobs for t in new] != [t.logprobs for t in old]
    for prompt, turn in zip(PROMPTS, new):
        assert torch.allclose(scored(model.eval(), prompt, turn.ids), torch.tensor(turn.logprobs), atol=1e-4)


def test_a_fused_head_is_no_obstacle(model):
    engine = ContinuousEngine(model, TOK)
    before = ask(engine)
    add_fused_lm_head(model)
    alike(ask(engine), before)
    alike(ask(ContinuousEngine(model, TOK)), before)


def test_the_global_generators_stay_where_they_are(model):
    random.seed(1), torch.manual_seed(1)
    states = torch.random.get_rng_state(), random.getstate()
    ask(ContinuousEngine(model, TOK))
    assert torch.equal(torch.random.get_rng_state(), states[0]) and random.getstate() == states[1]
    unseeded = [Sampling(48)] * 3
    first = ask(ContinuousEngine(model, TOK), FIRST, unseeded)
    torch.random.set_rng_state(states[0])
    assert ask(ContinuousEngine(model, TOK), FIRST, unseeded) == first


def test_no_room(model):
    engine = ContinuousEngine(model, TOK, 256)
    long, empty, good = ask(engine, [FIRST[0] * 20, [], FIRST[0]], EACH[:3])
    assert isinstance(long, EngineError) and "No room" in str(long) and isinstance(empty, EngineError)
    alike([good], ask(GenerateEngine(model, TOK), FIRST[:1], EACH[2:3]))
    tight, = ask(engine, [(FIRST[0] * 9)[:240]], [Sampling(4096, seed=1, temperature=0.0)])
    assert len(tight.ids) <= 15
    assert isinstance(ask(ContinuousEngine(model, TOK), [FIRST[0] * 200], EACH[:1])[0], EngineError)      # the model's context


def broken(engine, error, at=3):
    "Let the step number `at` fail, once."
    step, calls = engine._steps.processor._generation_step, iter(range(1, 10**6))
    def fails(model):
        if next(calls) == at: raise error
        return step(model)
    engine._steps.processor._generation_step = fails


def slowed(engine):
    "Steps of 20 ms at least, so that something can happen between them."
    step = engine._steps.processor._generation_step
    def slow(model):
        time.sleep(0.02)
        return step(model)
    engine._steps.processor._generation_step = slow


def test_a_step_that_fails_takes_those_with_it_who_asked(model):
    engine = ContinuousEngine(model, TOK)
    good = ask(engine)
    broken(engine, RuntimeError("out of memory"))
    turns = ask(engine)
    done = [i for i, t in enumerate(turns) if not isinstance(t, EngineError)]
    assert all(len(good[i].ids) <= 2 and turns[i] == good[i] for i in done) and len(done) < 9       # had ended before
    assert all("out of memory" in str(t) for i, t in enumerate(turns) if i not in done)
    assert ask(engine) == good
    broken(engine, TypeError("a mistake"), at=1)
    assert all(type(t) is TypeError for t in ask(engine))
    assert ask(engine) == good


def test_a_request_that_fails_fails_alone(model):
    engine = ContinuousEngine(model, TOK)
    good = ask(engine)
    add = engine._steps.scheduler.add_waiting_request
    def refuse(state):
        if int(state.request_id) == 10: raise ValueError("not this one")
        return add(state)
    engine._steps.scheduler.add_waiting_request = refuse
    turns = ask(engine)
    assert isinstance(turns[1], EngineError) and "not this one" in str(turns[1])
    alike(turns[:1] + turns[2:], good[:1] + good[2:])


def test_requests_that_vanish_are_not_waited_for(model):
    engine = ContinuousEngine(model, TOK)
    good = ask(engine)
    engine._steps.scheduler.add_waiting_request = lambda state: None
    assert all(isinstance(t, EngineError) for t in ask(engine))
    del engine._steps.scheduler.add_waiting_request
    assert ask(engine) == good


def test_asking_outside_of_ready(model):
    engine = ContinuousEngine(model, TOK)
    with pytest.raises(RuntimeError, match="inside"):
        asyncio.run(engine.generate(FIRST[0], EACH[0]))
    with engine.ready(), pytest.raises(RuntimeError, match="already"), engine.ready():
        pass
    async def leave_too_early():
        with engine.ready():
            slowed(engine)
            waiting = asyncio.create_task(engine.generate(FIRST[0], EACH[0]))
            await asyncio.sleep(0.01)
        with pytest.raises(EngineError, match="ended"):
            await asyncio.wait_for(waiting, 10)
    asyncio.run(leave_too_early())
    alike(ask(engine), ask(GenerateEngine(model, TOK)))


def test_event_loops_come_and_go(model):
    engine = ContinuousEngine(model, TOK)
    good = ask(engine)
    slowed(engine)
    with engine.ready():
        for i in range(3):
            alike([asyncio.run(engine.generate(PROMPTS[i], EACH[i]))], [good[i]])
        async def some(): asyncio.create_task(engine.generate(PROMPTS[0], EACH[0])); await asyncio.sleep(0.01)
        asyncio.run(some())                                     # this loop is gone before the answer is there
        dead = asyncio.new_event_loop()
        dead.create_task(engine.generate(PROMPTS[0], EACH[0]))
        dead.run_until_complete(asyncio.sleep(0.01))            # and this one never even says so
        alike([asyncio.run(asyncio.wait_for(engine.generate(PROMPTS[1], EACH[1]), 30))], [good[1]])
        assert len(engine._steps.scheduler.active_requests) == 0
        for task in asyncio.all_tasks(dead): task.cancel()
        dead.run_until_complete(asyncio.sleep(0.05))
        dead.close()
    assert ask(engine) == good


def test_a_cancelled_rollout_takes_its_request_with_it(model):
    engine = ContinuousEngine(model, TOK)
    good = ask(engine)
    slowed(engine)
    async def go():
        with engine.ready():
            tasks = [asyncio.create_task(engine.generate(p, s)) for p, s in zip(PROMPTS, EACH)]
            await asyncio.sleep(0.02)
            for t in tasks[::2]: t.cancel()
            turns = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
            free = engine._steps.cache.get_num_free_blocks(), len(engine._steps.scheduler.active_requests)
            return turns, free
    turns, free = asyncio.run(go())
    assert all(isinstance(t, asyncio.CancelledError) for t in turns[::2])
    alike(turns[1::2], good[1::2])
    assert free == (engine._steps.cache.num_blocks, 0)


def test_an_engine_that_goes_gives_its_memory_back(model):
    engine = ContinuousEngine(model, TOK)
    ask(engine)
    steps = engine._steps
    del engine
    gc.collect()
    assert not vars(steps)


@pytest.mark.slow
def test_a_process_ends_quietly():
    code = ("import asyncio; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; from tirlab.rollout.continuous import ContinuousEngine\n"
            "from tirlab.rollout.engines import Sampling; from tirlab.core.tiny import tiny_policy as p\n"
            "e = ContinuousEngine(M.from_pretrained(p()), T.from_pretrained(p()))\n"
            "with e.ready(): print(asyncio.run(e.generate([65, 66], Sampling(4))).stop)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() in ("end", "length") and "Exception" not in done.stderr


# transformers' private seams. A change of transformers' that moves one of them fails here first.

SEAMS = {   # called or replaced -> what it takes
    model_runner.ModelRunner._sample: ["self", "scores", "output_ids"],                                 # replaced: the draw
    continuous_api.ContinuousBatchProcessor._generation_step: ["self", "model"],
    continuous_api.ContinuousBatchProcessor.prepare_next_batch: ["self"],
    continuous_api.ContinuousBatchProcessor.update_batch: ["self"],
    continuous_api.ContinuousBatchProcessor.reset: ["self"],
    cache_manager.BlockManager.__init__: ["self", "num_blocks", "block_size", "tp_on"],                 # made anew: all pages forgotten
    cache.PagedAttentionCache.update: ["self", "key_states", "value_states", "layer_idx", "read_index", "write_index"],
    cache.group_layers_by_attn_type: ["config"],
    scheduler.Scheduler.set_request_cancellation: ["self", "request_id"],
    requests.RequestState.to_generation_output: ["self"],
}
READ = {    # attributes read or set -> where they are set
    "self._block_manager": cache.PagedAttentionCache.__init__, "self._total_prefix_length": cache.PagedAttentionCache.__init__,
    "self.use_prefix_sharing": cache.PagedAttentionCache.__init__, "self.num_blocks": cache.PagedAttentionCache.__init__,
    "self.active_requests": scheduler.Scheduler.reset, "self.waiting_requests": scheduler.Scheduler.reset,
    "self.compute_stream": input_outputs.ContinuousBatchingIOs.__init__, "self.requests_in_batch": input_outputs.ContinuousBatchingIOs.__init__,
    "self.model_runner": continuous_api.ContinuousBatchProcessor.__init__, "self.batch_processor": continuous_api.ContinuousBatchingManager.warmup,
}


def test_the_version_is_the_one_that_was_read():
    assert transformers.__version__ == "5.17.0"


@pytest.mark.parametrize("name", SEAMS, ids=lambda f: f.__qualname__)
def test_what_is_called_takes_what_it_took(name):
    assert list(inspect.signature(name).parameters) == SEAMS[name]


@pytest.mark.parametrize("attribute", READ)
def test_attributes_are_set_where_they_were(attribute):
    source = inspect.getsource(READ[attribute])
    assert f"{attribute} = " in source or f"{attribute}: " in source


def test_what_the_draw_relies_on():
    ios = input_outputs.ContinuousBatchingIOs
    run, prepare = inspect.getsource(model_runner.ModelRunner._forward_process_and_sample), inspect.getsource(ios.prepare_batch_tensors)
    assert "logits = logits.float()" in run and run.rstrip().endswith("self._sample(scores, output_ids)")
    assert "state.position_offset += query_length" in prepare                         # by the time of the draw it counts the new tokens
    assert "logits_indices.append(" in prepare and "if future_state.has_new_token:" in prepare
    assert "self.output_ids[1, : self.num_request_in_batch].view(dtype=torch.float32)" in inspect.getsource(ios.prepare_batch_update)
    assert "if self._generation_thread is None" in inspect.getsource(continuous_api.ContinuousBatchingManager.get_result)   # then it does not wait
    assert "torch.manual_seed" in inspect.getsource(continuous_api.DistributedHelper.set_tp_seed)                  # why the generators are put back
