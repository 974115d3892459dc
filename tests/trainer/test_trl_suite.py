"""Every documented use of TRL's GRPOTrainer, as one table: run with TRL's trainer, with ours at the README's TRL values, and with ours as it comes.

At TRL's values a case leaves the same weights, metrics and calls of rewards, bit for bit; as it comes it must train, and hand rewards the same kinds of things.
`DIFFERENT` names every case in which ours does something else on purpose, and the README's table gives the reason. `make test` runs a part (`QUICK`), `make test-slow` all.
"""

import asyncio
import functools
import os
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, Callable

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM,
                          Qwen3ForSequenceClassification, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback)
from trl import GRPOConfig, GRPOTrainer

from tirlab.core import schemas
from tirlab.all import TIRConfig, TIRTrainer, make_tasks, tiny_policy
from tirlab.envs.tasks import ENVIRONMENTS

README = dict(malformed_calls="stop", max_observation_chars=None, max_concurrent_tools=1, engine="trl", skip_empty_steps=False, logging_steps=10,
              gradient_checkpointing=True, trace=False)     # the README's table, column "TRL's behaviour"
TOK = AutoTokenizer.from_pretrained(tiny_policy(), padding_side="left")
SEEN = []   # what rewards were handed


# ---- data, rewards, tools and environments


def texts(n=6): return Dataset.from_dict({"prompt": [f"Count to {i}: one" for i in range(n)], "level": list(range(n)), "note": [f"n{i}" for i in range(n)]})


def chats(n=6): return texts(n).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})


def tasks(n=6): return make_tasks("all", n=n)


def said(completion): return completion if isinstance(completion, str) else " ".join(m.get("content") or "" for m in completion)


def spread(prompts, completions, completion_ids, **kwargs):
    "A reward that depends on every token, so that groups vary."
    SEEN.append((type(prompts[0]), type(completions[0]), sorted(k for k in kwargs)))
    return [zlib.crc32(repr(list(map(int, ids))).encode()) % 11 / 10 for ids in completion_ids]


def length(completions, **kwargs): return [float(len(said(c))) for c in completions]


def none_for_some(completion_ids, **kwargs): return [None if len(ids) % 2 else 1.0 for ids in completion_ids]


def never(completions, **kwargs): return [None] * len(completions)


def by_column(completions, level, note, **kwargs): return [len(said(c)) % (v + 2) + len(w) for c, v, w in zip(completions, level, note)]


def by_progress(completion_ids, trainer_state, **kwargs): return [trainer_state.global_step + len(ids) % 3 for ids in completion_ids]


def logs(completion_ids, log_extra, log_metric, **kwargs):
    log_extra("size", [len(i) for i in completion_ids])
    log_metric("sizes", sum(map(len, completion_ids)) / len(completion_ids))
    return [float(len(i) % 3) for i in completion_ids]


async def later(completion_ids, **kwargs):
    await asyncio.sleep(0)
    return [float(sum(map(int, ids)) % 5) for ids in completion_ids]


class Callable_:
    "A reward that is an object, as TRL documents none but takes."
    __name__ = "object_reward"
    def __call__(self, completion_ids, **kwargs): return [float(len(ids) % 4) for ids in completion_ids]


def multiply(a: int, b: int) -> int:
    """
    Multiply two integers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


async def wait(text: str) -> str:
    """
    Answer later.

    Args:
        text: What to answer.
    """
    await asyncio.sleep(0)
    return text + "!"


class Counter:
    "An environment with a state, a reset that adds to the prompt, and its own reward."
    def reset(self, **row):
        self.count = 0
        return " The counter is at 0."

    def python(self, code: str) -> str:
        """
        Run code.

        Args:
            code: Python source.
        """
        self.count += len(code)
        return str(self.count)

    def get_reward(self): return float(self.count)


class Judged(Counter):
    async def get_reward(self): return float(self.count)


class Owner(Counter):
    "An environment that owns the data."
    def reset(self, **row):
        self.count = 0
        return "What is 2+2?"


def sees_environments(completion_ids, environments, **kwargs): return [e.count + len(ids) % 3 for e, ids in zip(environments, completion_ids)]


class Notes(TrainerCallback):
    seen = []
    def on_step_end(self, args, state, control, **kwargs): Notes.seen.append(state.global_step)


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = True


# ---- models, made on the spot


def model(**more):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOK), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                        tie_word_embeddings=True, bos_token_id=None, eos_token_id=TOK.eos_token_id, pad_token_id=TOK.pad_token_id, **more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "A random policy and a reward model, saved."
    base = tmp_path_factory.mktemp("models")
    model().save_pretrained(base / "policy")
    TOK.save_pretrained(base / "policy")
    torch.manual_seed(1)
    reward = Qwen3ForSequenceClassification(Qwen3Config(**(model().config.to_dict() | {"num_labels": 1})))
    reward.save_pretrained(base / "judge")
    TOK.save_pretrained(base / "judge")
    return {"policy": str(base / "policy"), "judge": str(base / "judge")}


# ---- the table


@dataclass
class Case:
    "One use: what the trainer and its configuration are given, and what must be so afterwards."
    trainer: dict | Callable = field(default_factory=dict)   # or a function of the folders that returns it
    config: dict = field(default_factory=dict)
    data: Callable | None = texts
    then: Callable | None = None      # says of the trainer whether all is there
    raises: Any = None                # what both raise


def logged(*names): return lambda t: [n for n in names if not any(n in entry for entry in t.state.log_history)] == []


def logged_like(*starts): return lambda t: all(any(k.startswith(s) for entry in t.state.log_history for k in entry) for s in starts)


def folder_holds(*names): return lambda t: all(any(n in f for _, _, files in os.walk(t.args.output_dir) for f in files) for n in names)


def lora(**more): return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **more)


def adapted(folders):
    torch.manual_seed(0)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folders["policy"]), lora())


def experts(folders):
    torch.manual_seed(0)
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=len(TOK), hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                             num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, bos_token_id=None,
                                             eos_token_id=TOK.eos_token_id, pad_token_id=TOK.pad_token_id))
    return dict(model=moe, processing_class=TOK)


def optimizer_of(folders):
    policy = AutoModelForCausalLM.from_pretrained(folders["policy"])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    return dict(model=policy, optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)))


TINY = dict(model=tiny_policy())   # calls tools
LONG = dict(max_completion_length=64)
TOOL_CASES = {
    "functions": Case(dict(tools=[multiply], **TINY), LONG, tasks, logged("tools/call_frequency")),
    "async functions": Case(dict(tools=[wait, multiply], **TINY), LONG, tasks),
    "functions of one call at most": Case(dict(tools=[multiply], **TINY), LONG | dict(max_tool_calling_iterations=1), tasks),
    "no round of tools": Case(dict(tools=[multiply], **TINY), LONG | dict(max_tool_calling_iterations=0), tasks),
    "environment": Case(dict(environment_factory=Counter, reward_funcs=None, **TINY), LONG, tasks, logged("rewards/Counter/mean")),
    "environment and rewards": Case(dict(environment_factory=Counter, reward_funcs=[spread, sees_environments], **TINY), LONG, tasks),
    "environment with an async reward": Case(dict(environment_factory=Judged, reward_funcs=None, **TINY), LONG, tasks, logged("rewards/Judged/mean")),
    "environment and functions": Case(dict(environment_factory=Counter, tools=[multiply, wait], **TINY), LONG, tasks),
    "environment from a function": Case(dict(environment_factory=lambda: Counter(), **TINY), LONG, tasks),
    "environments by name": Case(dict(environment_factory=ENVIRONMENTS, **TINY), LONG, tasks),
    "environments by name, of functions": Case(dict(environment_factory={k: functools.partial(lambda c: c(), c) for k, c in ENVIRONMENTS.items()}, **TINY), LONG, tasks),
    "environment that owns the data": Case(dict(environment_factory=Owner, **TINY), LONG, None),
    "environments without a prompt": Case(dict(environment_factory={"a": Owner, "b": Owner}, **TINY), LONG, lambda: Dataset.from_dict({"environment": ["a", "b"] * 3})),
    "environment in evaluation": Case(dict(environment_factory=Counter, **TINY), LONG | dict(eval_strategy="steps", eval_steps=1), tasks),
    "environment, streamed": Case(dict(environment_factory=Counter, **TINY), LONG, lambda: tasks().to_iterable_dataset()),
    "environment, template variables": Case(dict(environment_factory=Counter, **TINY), LONG | dict(chat_template_kwargs={"enable_thinking": False}), tasks),
    "environment and weights": Case(dict(environment_factory=Counter, reward_funcs=[spread, length], **TINY), LONG | dict(reward_weights=[0.5, 0.1]), tasks),
    "environment, lora": Case(dict(environment_factory=Counter, peft_config=lora(), **TINY), LONG, tasks),
    "environment, reference": Case(dict(environment_factory=Counter, **TINY), LONG | dict(beta=0.1), tasks, logged("kl")),
    "environment, log of completions": Case(dict(environment_factory=Counter, **TINY), LONG | dict(log_completions=True), tasks),
    "environment, truncated masked": Case(dict(environment_factory=Counter, **TINY), LONG | dict(mask_truncated_completions=True), tasks),
}
CASES = {
    "plain text": Case(),
    "conversations": Case(data=chats),
    "other columns, kept from models": Case(dict(reward_funcs=by_column)),
    "one reward": Case(dict(reward_funcs=length)),
    "several rewards": Case(dict(reward_funcs=[spread, length]), {}, texts, logged("rewards/spread/mean", "rewards/length/mean")),
    "rewards of None": Case(dict(reward_funcs=[none_for_some, spread])),
    "nothing but None": Case(dict(reward_funcs=never)),
    "async reward": Case(dict(reward_funcs=[later, spread])),
    "reward that is an object": Case(dict(reward_funcs=[Callable_()])),
    "reward sees the state": Case(dict(reward_funcs=by_progress)),
    "reward logs": Case(dict(reward_funcs=logs), dict(log_completions=True), texts, logged("sizes")),
    "reward model by name": Case(lambda f: dict(reward_funcs=f["judge"])),
    "reward model as an object": Case(lambda f: dict(reward_funcs=[AutoModelForSequenceClassification.from_pretrained(f["judge"], num_labels=1), length]), data=chats),
    "reward model with its tokenizer": Case(lambda f: dict(reward_funcs=[f["judge"], length], reward_processing_classes=[TOK, None])),
    "weights": Case(dict(reward_funcs=[spread, length]), dict(reward_weights=[0.7, 0.01])),
    "normalised before the sum": Case(dict(reward_funcs=[spread, length]), dict(multi_objective_aggregation="normalize_then_sum")),
    **{f"scale_rewards {s}": Case({}, dict(scale_rewards=s)) for s in (True, False, "batch", "none")},
    **{f"loss {n}": Case({}, dict(loss_type=n, **({"importance_sampling_level": "sequence"} if n == "luspo" else {})))
       for n in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")},
    "sequence ratios": Case({}, dict(importance_sampling_level="sequence", num_iterations=2)),
    "two-sided clipping": Case({}, dict(delta=2.0, epsilon_high=0.3, num_iterations=2)),
    "off-policy mask": Case({}, dict(off_policy_mask_threshold=0.5, num_iterations=2)),
    "reference": Case({}, dict(beta=0.1), texts, logged("kl")),
    "reference, unbiased": Case({}, dict(beta=0.1, use_bias_correction_kl=True, num_iterations=2)),
    "reference that follows": Case({}, dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=0.5)),
    "reference of an object": Case(lambda f: dict(model=AutoModelForCausalLM.from_pretrained(f["policy"])), dict(beta=0.1)),
    "several iterations": Case({}, dict(num_iterations=2, max_steps=4)),
    "accumulation": Case({}, dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, num_generations=4)),
    "generation batch": Case({}, dict(generation_batch_size=8, max_steps=4)),
    "steps per generation": Case({}, dict(steps_per_generation=2, max_steps=4)),
    "groups larger than a batch": Case({}, dict(per_device_train_batch_size=2, num_generations=4, gradient_accumulation_steps=4)),
    "in order": Case({}, dict(shuffle_dataset=False)),
    "epochs": Case({}, dict(max_steps=-1, num_train_epochs=2)),
    "streamed": Case(data=lambda: texts().to_iterable_dataset()),
    "evaluation": Case({}, dict(eval_strategy="steps", eval_steps=1), texts, logged("eval_reward")),
    "evaluation of fewer": Case({}, dict(eval_strategy="steps", eval_steps=1, num_generations_eval=2, per_device_eval_batch_size=2)),
    "evaluation of parts": Case(dict(eval_dataset=lambda: {"a": texts(2), "b": texts(3)}), dict(eval_strategy="steps", eval_steps=1, max_steps=1), texts, logged_like("eval_a_", "eval_b_")),
    "evaluation of a DatasetDict": Case(dict(eval_dataset=lambda: DatasetDict({"a": texts(2)})), dict(eval_strategy="steps", eval_steps=1), texts, logged_like("eval_a_")),
    "evaluation, streamed": Case(dict(eval_dataset=lambda: texts(2).to_iterable_dataset()), dict(eval_strategy="steps", eval_steps=1)),
    "evaluation at the start": Case({}, dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)),
    "callbacks": Case(dict(callbacks=[Notes()]), {}, texts, lambda t: Notes.seen[-2:] == [1, 2]),
    "callback that stops": Case(dict(callbacks=[Stops]), {}, texts, lambda t: t.state.global_step == 1),
    "own optimizer": Case(optimizer_of),
    "model as an object": Case(lambda f: dict(model=AutoModelForCausalLM.from_pretrained(f["policy"]))),
    "model_init_kwargs": Case({}, dict(model_init_kwargs={"dtype": "float32", "attn_implementation": "eager"})),
    "mixture of experts": Case(experts, dict(router_aux_loss_coef=0.01)),
    "own tokenizer": Case(dict(processing_class=TOK)),
    "lora": Case(dict(peft_config=lora())),
    "lora, checkpointing": Case(dict(peft_config=lora()), dict(gradient_checkpointing=True)),
    "lora, reference": Case(dict(peft_config=lora()), dict(beta=0.1)),
    "lora model": Case(lambda f: dict(model=adapted(f))),
    "lora model, reference": Case(lambda f: dict(model=adapted(f)), dict(beta=0.1)),
    "checkpointing": Case({}, dict(gradient_checkpointing=True)),
    "entropy of a share": Case({}, dict(top_entropy_quantile=0.2), texts, logged("entropy")),
    "entropy bonus": Case({}, dict(entropy_coef=0.01)),
    "adaptive entropy": Case({}, dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=1.0)),
    "truncated masked": Case({}, dict(mask_truncated_completions=True)),
    "padded": Case({}, dict(pad_to_multiple_of=8)),
    "log of completions": Case({}, dict(log_completions=True, num_completions_to_print=2, log_unique_prompts=True), texts, folder_holds("completions_")),
    "template variables": Case({}, dict(chat_template_kwargs={"enable_thinking": False}), chats),
    "sampling": Case({}, dict(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1)),
    "generation_kwargs": Case({}, dict(generation_kwargs={"do_sample": True, "length_penalty": 1.1})),
    "static cache": Case({}, dict(cache_implementation="dynamic")),
    "float32 head": Case({}, dict(cast_lm_head_to_fp32=True)),
    "dropout off": Case({}, dict(disable_dropout=True)),
    "unused columns": Case({}, dict(remove_unused_columns=True)),
    "checkpoints": Case({}, dict(save_strategy="steps", save_steps=1), texts, folder_holds("trainer_state.json", "model.safetensors")),
    "best model": Case({}, dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="reward")),
    "schedule of the rate": Case({}, dict(lr_scheduler_type="cosine", warmup_steps=1, max_steps=3)),
    "no clipping of gradients": Case({}, dict(max_grad_norm=0.0)),
    "not a dataset": Case(data=lambda: [{"prompt": "x"}], raises=TypeError),
    "weights of another number": Case({}, dict(reward_weights=[1.0, 1.0]), raises=ValueError),
    "tokenizers of another number": Case(dict(reward_processing_classes=[None, None]), raises=ValueError),
    "too few rewards": Case(dict(reward_funcs=lambda completions, **kw: [1.0]), raises=ValueError),
    "no reward": Case(dict(reward_funcs=None), raises=ValueError),
    "no data": Case(data=None, raises=ValueError),
    "environment without reset": Case(dict(environment_factory=type("Bare", (), {})), raises=ValueError),
    "one generation": Case({}, dict(num_generations=1), raises=ValueError),
    "groups that do not fit": Case({}, dict(num_generations=3), raises=ValueError),
    **TOOL_CASES,
}


def build(trainer_class, values, case, folders, out):
    "The trainer of a case."
    given = case.trainer(folders) if callable(case.trainer) else {k: v() if k == "eval_dataset" else v for k, v in case.trainer.items()}
    if isinstance(given.get("reward_funcs"), list): given["reward_funcs"] = list(given["reward_funcs"])   # TRL adds to the list that it is given
    base = dict(output_dir=str(out), learning_rate=0.1, per_device_train_batch_size=4, num_generations=4, per_device_eval_batch_size=4, max_completion_length=8, max_steps=2,
                report_to="none", save_strategy="no", disable_tqdm=True, seed=3)
    if trainer_class is GRPOTrainer: args = GRPOConfig(**dict(use_cpu=True, bf16=False, logging_steps=1) | base | case.config)
    else: args = TIRConfig(**values | dict(logging_steps=1) | base | case.config)
    data = case.data() if case.data else None
    if args.eval_strategy != "no" and "eval_dataset" not in given: given["eval_dataset"] = tasks(2) if case.data is tasks else texts(2)
    return trainer_class(**dict(model=folders["policy"], reward_funcs=spread, args=args, train_dataset=data) | given)


def play(trainer_class, values, case, folders, out):
    "Train a case; what came of it."
    SEEN.clear()
    trainer = build(trainer_class, values, case, folders, out)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    after = [p.detach().clone() for p in trainer.model.parameters()]
    return dict(trainer=trainer, moved=any(not torch.equal(a, b) for a, b in zip(before, after)), weights=after, log=trainer.state.log_history, seen=list(SEEN))


def numbers(log): return [{k: v for k, v in entry.items() if not re.search("time|runtime|per_second", k)} for entry in log]


SAMPLER = "TRL's own sampler"
DIFFERENT = {   # as ours comes: what it says; everything else is as with TRL
    "generation_kwargs": SAMPLER, "static cache": SAMPLER,
}
QUICK = ["plain text", "conversations", "other columns, kept from models", "rewards of None", "async reward", "reward logs", "reference", "steps per generation", "evaluation of parts",
         "lora", "padded", "generation_kwargs", "not a dataset", "too few rewards", "environment and functions", "environments without a prompt"]


def as_table(cases): return [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in cases]


@pytest.mark.parametrize("name", as_table(CASES))
def test_a_use_of_trls_trainer(name, folders, tmp_path):
    case, at = CASES[name], README | dict(logging_steps=1)
    if case.raises:
        for trainer_class, values in ((GRPOTrainer, {}), (TIRTrainer, at), (TIRTrainer, {})):
            with pytest.raises(case.raises): play(trainer_class, values, case, folders, tmp_path / trainer_class.__name__)
        return
    theirs, ours = play(GRPOTrainer, {}, case, folders, tmp_path / "trl"), play(TIRTrainer, at, case, folders, tmp_path / "values")
    assert all(torch.equal(a, b) for a, b in zip(theirs["weights"], ours["weights"], strict=True)) and theirs["seen"] == ours["seen"]
    for a, b in zip(numbers(theirs["log"]), numbers(ours["log"]), strict=True):
        assert {k: b.get(k) for k in a} == pytest.approx(a, nan_ok=True)
    if name in DIFFERENT:
        with pytest.raises(ValueError, match=re.escape(DIFFERENT[name])): play(TIRTrainer, {}, case, folders, tmp_path / "ours")
        return
    own = play(TIRTrainer, {}, case, folders, tmp_path / "ours")
    for run in (theirs, ours, own): assert case.then is None or case.then(run["trainer"])
    assert own["moved"] == theirs["moved"] and set(map(repr, own["seen"])) == set(map(repr, theirs["seen"]))
    assert own["trainer"].state.global_step == theirs["trainer"].state.global_step


def test_what_differs_is_in_the_readme():
    from pathlib import Path
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme[readme.index("Where it differs from TRL on purpose"):]
    for word in ("`GRPOConfig`", "images", "`rollout_func`", "`generation_kwargs`", "`cache_implementation`", "`model.generate`", *(f"`{name}`" for name in README)): assert word in table, word


def test_tools_of_environments_are_functions_and_are_described_once(folders, tmp_path, monkeypatch):
    "What TRL keeps of an environment's tools stays; their schemas are made once, not for every row."
    import transformers.utils
    from transformers.utils import chat_template_utils
    made, make = [], chat_template_utils.get_json_schema
    count = lambda f: (made.append(f), make(f))[1]
    monkeypatch.setattr(transformers.utils, "get_json_schema", count)
    monkeypatch.setattr(chat_template_utils, "get_json_schema", count)
    schemas._SCHEMAS.clear()
    trainer = build(TIRTrainer, {}, CASES["environment"], folders, tmp_path)
    before = len(made)
    trainer.train()
    assert len(made) == before and [[t.__name__ for t in tools] for tools in trainer._env_tools.values()] == [["python"]]
    assert all(callable(t) for tools in trainer._env_tools.values() for t in tools)
