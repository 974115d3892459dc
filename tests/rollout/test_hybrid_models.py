"""Every kind of layer a model may have: hybrid, recurrent, windowed, sparse. Two layers each, random weights, sampled as a forward pass says."""

import asyncio
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tirlab.rollout.engines
from tirlab.all import (Clamp, ContinuousEngine, GenerateEngine, PythonEnvironment, Sampling, TIRConfig, TIRTrainer, answer_reward, evaluate,
                        make_tasks, tiny_policy)
from tirlab.rollout.continuous import fitting_engine, why_not_paged
from tirlab.rollout.engines import generate
from tirlab.eval.evaluate import restore

TOK = AutoTokenizer.from_pretrained(tiny_policy())
CORE = dict(vocab_size=len(TOK), hidden_size=32, num_hidden_layers=2, pad_token_id=TOK.pad_token_id, eos_token_id=TOK.eos_token_id, bos_token_id=TOK.eos_token_id)
BASE = CORE | dict(intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=2048)
LINEAR = BASE | dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4,
                     layer_types=["linear_attention", "full_attention"])
MOE = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32)
MAMBA = BASE | dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_ssm=64, mamba_d_state=8, mamba_expand=2, mamba_n_groups=1, mamba_chunk_size=16)
STATES = dict(state_size=8, num_heads=4, head_dim=16, n_groups=1, chunk_size=16)
WINDOW = BASE | dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
LATENT = {k: v for k, v in BASE.items() if k != "head_dim"} | dict(
    num_key_value_heads=2, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, first_k_dense_replace=2, n_group=1,
    topk_group=1, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=32)
HYBRID = {
    "qwen3_5_text": LINEAR, "qwen3_next": LINEAR | MOE, "lfm2": BASE | dict(layer_types=["conv", "full_attention"]),
    "nemotron_h": BASE | dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=8, n_groups=1, chunk_size=16, layers_block_type=["linear_attention", "full_attention"]),
    "jamba": BASE | dict(attn_layer_period=2, attn_layer_offset=1, num_experts=2, num_experts_per_tok=1, mamba_d_state=8, mamba_dt_rank=4, use_mamba_kernels=False),
    "bamba": MAMBA | dict(attn_layer_indices=[1]), "falcon_h1": MAMBA,
}
OTHERS = {   # pure recurrence; states that are not in a cache; compressed keys; a cache with a layer of its own; attention that nobody can replace
    "mamba": CORE | dict(state_size=8), "mamba2": CORE | STATES, "minimax": BASE | dict(layer_types=["linear_attention", "full_attention"], block_size=16, num_local_experts=2, num_experts_per_tok=1),
    "rwkv": CORE | dict(context_length=512, attention_hidden_size=32), "recurrent_gemma": BASE | dict(lru_width=32, attention_window_size=64, block_types=["recurrent", "attention"]),
    "deepseek_v3": LATENT, "deepseek_v4": BASE, "openai-gpt": dict(vocab_size=len(TOK), n_embd=32, n_layer=2, n_head=2, n_positions=512),
    "bloom": dict(vocab_size=len(TOK), hidden_size=32, n_layer=2, n_head=2), "gpt_oss": WINDOW | dict(num_local_experts=2, num_experts_per_tok=1),
}
PAGED = {"qwen3": BASE, "gemma3_text": WINDOW, "mistral": BASE | dict(sliding_window=8), "olmo3": WINDOW}
ALL = HYBRID | OTHERS | PAGED
QUICK = ("qwen3_5_text", "qwen3_next", "lfm2", "nemotron_h", "falcon_h1", "minimax", "mamba", "qwen3", "gemma3_text")
SAMPLED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
EACH = [Sampling(4, seed=row) for row in range(4)]
WORDS = TOK.encode("rab has 37, then +48, then *6. How many?", add_special_tokens=False)
PROMPTS = {"equal": [WORDS] * 4, "unequal": [WORDS[:5], WORDS + WORDS, WORDS[:4], WORDS[:5]], "two by two, unequal": [WORDS[:5], WORDS] * 2}


def make(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **ALL[name]), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1: p.normal_(0, 0.15)      # so that layers and positions matter
    return model


def ask(engine, prompts):
    async def go():
        with engine.ready(): return await asyncio.wait_for(asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, EACH))), 30)
    return asyncio.run(go())


def apart(model, prompts, turns):
    "Largest distance, nats, of sampled log-probabilities from those of the model's own forward pass, a row at a time."
    def one(prompt, turn):
        with torch.no_grad(): logits = model(torch.tensor([prompt + turn.ids])).logits[0, len(prompt) - 1:-1]
        return (logits.log_softmax(-1).gather(1, torch.tensor(turn.ids)[:, None])[:, 0] - torch.tensor(turn.logprobs)).abs().max().item()
    return max(map(one, prompts, turns))


@pytest.mark.parametrize("name", SAMPLED)
def test_every_architecture_samples_what_a_forward_pass_says(name, monkeypatch):
    model = make(name)
    shared = {kind: generate(model, TOK, prompts, EACH) for kind, prompts in PROMPTS.items()}
    monkeypatch.setattr(tirlab.rollout.engines, "_shared", lambda *_: {})
    for kind, prompts in PROMPTS.items():
        alone = [generate(model, TOK, [p], [s])[0] for p, s in zip(prompts, EACH)]
        for turns in (generate(model, TOK, prompts, EACH), shared[kind]):
            assert [t.ids for t in turns] == [t.ids for t in alone] and apart(model, prompts, turns) < 1e-4, kind


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2", "falcon_h1", "gemma3_text"])
def test_equal_prompts_are_computed_once_where_every_layer_can_be_copied(name):
    model, rows = make(name), []
    model.register_forward_pre_hook(lambda m, a, k: rows.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    generate(model, TOK, PROMPTS["equal"], EACH)
    assert rows[:2] == [(1, len(WORDS) - 1), (4, 1)]


def test_a_layer_that_cannot_be_copied_keeps_prompts_apart():
    for name in ("deepseek_v4", "mamba", "openai-gpt"):      # a kind of its own, no positions, no cache
        assert tirlab.rollout.engines._empty_cache(make(name)) is None


@pytest.mark.parametrize("name", ALL)
def test_continuous_batching_samples_rightly_or_says_why_not(name):
    model, prompts = make(name), PROMPTS["unequal"]
    if name in PAGED:
        assert why_not_paged(model) is None and fitting_engine("continuous", model) == "continuous"
        assert apart(model, prompts, ask(ContinuousEngine(model, TOK, 1024), prompts)) < 1e-4
        return
    with pytest.raises(ValueError, match=f"{type(model).__name__}.*Use engine='generate'"): ContinuousEngine(model, TOK)
    with pytest.warns(UserWarning, match=f"{type(model).__name__}.*engine='generate' does instead"): assert fitting_engine("continuous", model) == "generate"
    assert fitting_engine("vllm", model) == "vllm"      # others have caches of their own


def test_an_engine_says_once_that_rows_are_sampled_one_by_one():
    with pytest.warns(UserWarning, match="minimax.*one by one"): GenerateEngine(make("minimax"), TOK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerateEngine(make("lfm2"), TOK)


def policy(name):
    "A hybrid that ends its turns soon enough."
    model = make(name)
    model.generation_config.eos_token_id = TOK.eos_token_id
    return model.train()


TASKS = make_tasks("arithmetic", n=4)


@pytest.mark.parametrize("name, engine", [("lfm2", "auto"), ("lfm2", "continuous"), ("qwen3_5_text", "continuous"), ("qwen3_next", "generate"), ("nemotron_h", "generate")])
def test_hybrid_models_train(name, engine, tmp_path):
    def reward(completions, **kwargs): return [float(i % 2) for i in range(len(completions))]
    args = TIRConfig(str(tmp_path), engine=engine, max_steps=1, per_device_train_batch_size=4, num_generations=4, max_completion_length=32, learning_rate=1e-3,
                     report_to="none", use_cpu=True, save_strategy="no", logging_steps=1, probe="off", disable_tqdm=True)
    model = policy(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = TIRTrainer(model, [reward], args, TASKS, environment_factory=PythonEnvironment, processing_class=TOK)
    assert trainer.engine_name == "generate" and any("paged" in str(w.message) for w in said) == (engine == "continuous")
    trainer.train()
    assert trainer.state.global_step == 1 and any(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert trainer.state.log_history[0]["sync/gap_max"] < 1e-3      # what was sampled is what the loss sees, paddings and all


def test_hybrid_models_are_evaluated_clamped_or_not():
    model = policy("lfm2").eval()
    sampling = Sampling(8)
    one = evaluate(model, TOK, TASKS, PythonEnvironment, answer_reward, sampling=sampling, k=4)
    free = restore(model, TOK, [Clamp("<tool_call>", high=1.0)], TASKS, PythonEnvironment, answer_reward, sampling=sampling, k=4)
    assert [t.turns[0].ids for t in one.trajectories] == [t.turns[0].ids for t in free.trajectories]
    never = one.trajectories[0].turns[0].ids[0]
    held = restore(model, TOK, [Clamp(TOK.convert_ids_to_tokens(never), high=0.0)], TASKS, PythonEnvironment, answer_reward, sampling=sampling, k=4)
    assert all(never not in turn.ids for t in held.trajectories for turn in t.turns)
