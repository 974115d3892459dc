"""What the trainer refuses, in one sentence, before a model is loaded or a token is sampled; and what looks alike and must not be refused."""

import re
import warnings
from typing import get_args

import pytest
import torch
from datasets import Dataset, DatasetDict
from small import small_policy
from test_drift import AS_TEXT, ENDS, NO_PARSER, NO_TOOLS, OUTCOME, ends_of, tokenizer
from test_trl_suite import multiply
from transformers import AutoTokenizer, HfArgumentParser, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig
from trl.experimental.async_grpo import AsyncGRPOConfig

from tirlab.core.settings import SettingError
from tirlab.all import Clamp, PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks

SMALL = dict(per_device_train_batch_size=4, num_generations=4, max_completion_length=64, max_steps=1, learning_rate=1e-4, save_strategy="no", disable_tqdm=True, report_to="none", trace=False)
TASKS = make_tasks("arithmetic", n=6)


def config(folder, **options): return TIRConfig(output_dir=str(folder / "out"), run_dir=str(folder / "run"), **SMALL | options)


def make(folder, options=None, **given):
    given = dict(model=small_policy(), reward_funcs=[answer_reward], train_dataset=TASKS, environment_factory=PythonEnvironment) | given
    return TIRTrainer(args=given.pop("args", None) or config(folder, **options or {}), **given)


def refused(folder, *words, error=ValueError, train=False, **given):
    "The one sentence, which has all words; nothing is left behind."
    with pytest.raises(error) as caught:
        trainer = make(folder, **given)
        if train: trainer.train()
    said = str(caught.value)
    assert all(w in said for w in words) and "\n" not in said, said
    assert train or not any((folder / name).exists() for name in ("out", "run"))
    return said


# ---- the configuration


DECLARED = {f.name: f.type for c in reversed(TIRConfig.__mro__) for f in vars(c).get("__dataclass_fields__", {}).values() if f.init}
NUMBERS = [n for n, t in DECLARED.items() if {int, float} & {t, *get_args(t)} and str not in get_args(t)]
TRUTHS = [n for n, t in DECLARED.items() if bool in (t, *get_args(t)) and str not in get_args(t)]


def refused_value(name, value, words):
    with pytest.raises(SettingError, match=words) as error: TIRConfig(**{name: value})
    assert (error.value.field, error.value.value) == (name, value)


def test_text_for_every_number_and_every_truth_is_refused():
    assert len(NUMBERS) > 90 and len(TRUTHS) > 60 and {"learning_rate", "gamma", "num_generations", "tool_timeout"} <= {*NUMBERS}
    for name in NUMBERS:
        refused_value(name, "1e-4", "number")
    for name in TRUTHS: refused_value(name, "False", "True or False")
    for name in ("reward_weights", "turn_reward_weights", "accuracy_band", "clip_cov_bounds"):
        for value in (["0.5"], "0.5"): refused_value(name, value, "list of numbers")


def test_what_python_calls_numbers_passes():
    args = TIRConfig(learning_rate=1, gamma=1, max_steps=10.0, eval_steps=0.5, min_reward_std=None, trace=0, accuracy_band=(0, 1))
    assert (args.learning_rate, args.accuracy_band) == (1, (0, 1))


def test_a_parsers_types_change_nothing():
    "transformers' parser of command lines writes other types into the fields."
    HfArgumentParser(TIRConfig)
    assert TIRConfig(include_num_input_tokens_seen="all").include_num_input_tokens_seen == "all"
    args = HfArgumentParser(TIRConfig).parse_args_into_dataclasses(["--learning_rate", "1e-4", "--trace", "False", "--accuracy_band", "0.1", "0.9"])[0]
    assert (args.learning_rate, args.trace, args.accuracy_band) == (1e-4, False, [0.1, 0.9])


# ---- the arguments


class ScoresNothing:
    def __call__(self, completions, **kwargs): return [0.0] * len(completions)


TEXTS = Dataset.from_dict({"prompt": ["a"] * 8})
ARGUMENTS = {   # what is given -> words of the sentence
    "model none": (dict(model=None), ["model is a NoneType"]),
    "model a class": (dict(model=Qwen3ForCausalLM), ["model is a type"]),
    "model nowhere": (dict(model="/nowhere/model"), ["/nowhere/model"]),
    "reward a string": (dict(reward_funcs="answer_reward"), ["answer_reward", "give the function"]),
    "reward no model's name": (dict(reward_funcs=["nobody/nothing"]), ["reward_funcs[0]", "nobody/nothing", "function"]),
    "reward a number": (dict(reward_funcs=[1.0]), ["reward_funcs[0] is a float"]),
    "reward a class": (dict(reward_funcs=[ScoresNothing]), ["the class ScoresNothing", "instance"]),
    "rewards a tuple": (dict(reward_funcs=(answer_reward,)), ["reward_funcs is a tuple"]),
    "args TRL's": (dict(args=GRPOConfig(use_cpu=True, bf16=False)), ["GRPOConfig", "TIRConfig"]),
    "args asynchronous": (dict(args=AsyncGRPOConfig(use_cpu=True, bf16=False)), ["AsyncGRPOTrainer", "TIRConfig"]),
    "rollout_worker": (dict(rollout_worker=print), ["rollout_worker", "AsyncGRPOTrainer"]),
    "rollout_func": (dict(rollout_func=print), ["rollout_func", "GRPOTrainer"]),
    "dataset a list": (dict(train_dataset=[{"prompt": "a"}], error=TypeError), ["train_dataset", "Dataset.from_list"]),
    "dataset a name": (dict(train_dataset="openai/gsm8k", error=TypeError), ["train_dataset", "load_dataset"]),
    "dataset several": (dict(train_dataset=DatasetDict(train=TASKS), error=TypeError), ["DatasetDict", "['train']"]),
    "evaluation a list": (dict(eval_dataset=[{"prompt": "a"}], error=TypeError), ["eval_dataset"]),
    "evaluation of lists": (dict(eval_dataset={"a": [1]}, error=TypeError), ["eval_dataset['a']"]),
    "evaluation without prompts": (dict(eval_dataset=TASKS.rename_column("prompt", "question")), ["evaluation", "`prompt`"]),
    "tokenizer a name": (dict(processing_class="Qwen/Qwen3-0.6B"), ["processing_class", "AutoTokenizer"]),
    "tokenizer a class": (dict(processing_class=AutoTokenizer), ["processing_class", "AutoTokenizer"]),
    "tools a function": (dict(tools=PythonEnvironment().python), ["tools is a method", "[python]"]),
    "tools a string": (dict(tools="python"), ["tools is a str"]),
    "tools of strings": (dict(tools=["python"]), ["'python'", "function"]),
    "tools of classes": (dict(tools=[PythonEnvironment]), ["PythonEnvironment", "function"]),
    "environment an instance": (dict(environment_factory=PythonEnvironment()), ["instance of PythonEnvironment", "class"]),
    "environment a string": (dict(environment_factory="python"), ["environment_factory is 'python'", "a str"]),
    "environments with an instance": (dict(environment_factory={"a": PythonEnvironment()}), ["instance of PythonEnvironment"]),
    "no environments": (dict(environment_factory={}), ["environment_factory", "empty"]),
    "interventions one": (dict(interventions=Clamp("<tool_call>", "start", 0.1)), ["interventions is a Clamp", "list"]),
    "supervision text": (dict(supervision="hints"), ["supervision is a str"]),
    "callbacks one": (dict(callbacks=print), ["callbacks", "list"]),
    "optimizers one": (dict(optimizers=torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)), ["optimizers", "pair"]),
    "wandb missing": (dict(options=dict(report_to="wandb")), ["wandb", "pip install"]),
    "mlflow missing": (dict(options=dict(report_to=["mlflow"])), ["mlflow", "pip install"]),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_an_argument_of_the_wrong_kind(case, tmp_path, monkeypatch):
    given, words = ARGUMENTS[case]
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: pytest.fail("the model was loaded"))
    monkeypatch.setattr("transformers.integrations.integration_utils.is_wandb_available", lambda: False)
    refused(tmp_path, *words, **given)


def test_a_folder_without_a_model_names_the_checkpoint_inside(tmp_path):
    for n in (5, 10): (tmp_path / "given" / f"checkpoint-{n}").mkdir(parents=True)
    assert "checkpoint-10" in refused(tmp_path, "config.json", model=str(tmp_path / "given"))
    refused(tmp_path, "config.json", "save_pretrained", model=tmp_path / "given" / "checkpoint-5")


# ---- rows


def answers(values): return TASKS.remove_columns("answer").add_column("answer", values)


def foreign(completions, answer, **kwargs): return [0.0] * len(completions)


def test_fewer_prompts_than_a_batch(tmp_path):
    refused(tmp_path, "6 rows", "8 prompts", "generation_batch_size=32", "num_generations=4", options=dict(per_device_train_batch_size=8, gradient_accumulation_steps=4))
    refused(tmp_path, "dataloader_drop_last", options=dict(dataloader_drop_last=True, per_device_eval_batch_size=16), eval_dataset=TASKS.select(range(2)))
    make(tmp_path, options=dict(per_device_train_batch_size=8, gradient_accumulation_steps=3))


def test_references_that_are_empty(tmp_path):
    for values in ([None] * 6, [""] * 6): refused(tmp_path, "`answer`", "`answer_reward`", "empty in all 6 rows", train_dataset=answers(values))
    make(tmp_path, train_dataset=answers([None] * 5 + ["1"]))
    with pytest.warns(UserWarning, match="`answer`, which reward function `foreign` needs, is empty"): make(tmp_path, reward_funcs=foreign, train_dataset=answers([None] * 6))


@pytest.mark.parametrize("pattern", [r"\boxed", "\boxed", "answr: ", r"<answr>(.*)</answr>"])
def test_a_pattern_that_no_answer_matches(pattern, tmp_path):
    refused(tmp_path, "answer_pattern=", "answer_template", options=dict(answer_pattern=pattern))


@pytest.mark.parametrize("options", [dict(answer_pattern=r"\\boxed"), dict(answer_pattern=r"<answer>.*</answer>"), dict(answer_pattern="FINAL", answer_template="FINAL {}"), dict(answer_pattern="."),
                                     dict(answer_pattern="FINAL", last_turn_prompt="Write FINAL and the number.")])
def test_a_pattern_that_some_answer_matches(options, tmp_path): make(tmp_path, options=options)


def test_a_pattern_that_the_prompts_ask_for(tmp_path):
    make(tmp_path, options=dict(answer_pattern="FINAL:"), train_dataset=make_tasks("arithmetic", n=6, instruction="Write FINAL: and the number."))


def test_plain_prompts_that_name_no_tool(tmp_path):
    plain = TASKS.map(lambda row: {"question": row["prompt"][-1]["content"]}, remove_columns="prompt").rename_column("question", "prompt")
    with pytest.warns(UserWarning, match=r"plain text.*none of the tools \(multiply\)"): make(tmp_path, environment_factory=None, tools=[multiply], train_dataset=plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(tmp_path, environment_factory=None, tools=[multiply], train_dataset=plain.map(lambda row: {"prompt": "You may use multiply. " + row["prompt"]}))
        make(tmp_path, environment_factory=None, train_dataset=plain)
    refused(tmp_path / "json", "call_format", "plain text", environment_factory=None, tools=[multiply], train_dataset=plain, options=dict(call_format="json"))


# ---- what users' functions do


class Asks(PythonEnvironment):
    def reset(self, **row): return "What is 1+1?"


def test_a_renamed_prompt(tmp_path):
    renamed = TASKS.rename_column("prompt", "question")
    refused(tmp_path, "no `prompt`", "question", train=True, train_dataset=renamed)
    make(tmp_path, environment_factory=Asks, train_dataset=renamed).train()
    make(tmp_path, environment_factory={"a": Asks}, train_dataset=Dataset.from_dict({"environment": ["a"] * 4, "answer": ["2"] * 4})).train()


class TakesNothing(PythonEnvironment):
    def reset(self): pass


class TakesAnother(PythonEnvironment):
    def reset(self, prompt, board, **row): pass


class Raises(PythonEnvironment):
    def reset(self, answer, **row): raise KeyError(answer)


@pytest.mark.parametrize("environment", [TakesNothing, TakesAnother, lambda: TakesNothing()])
def test_a_reset_that_does_not_take_the_row(environment, tmp_path): refused(tmp_path, "`reset` of Takes", "def reset(self, **row)", environment_factory=environment)


def test_a_reset_that_raises_names_the_row(tmp_path):
    said = refused(tmp_path, "reset of Raises failed on row 0", "KeyError", "How many?", train=True, environment_factory=Raises)
    assert any(row["prompt"][-1]["content"][:20] in said and row["answer"] in said for row in TASKS)
    plain = Dataset.from_dict({"prompt": ["Use python."] * 4, "answer": ["2"] * 4})
    refused(tmp_path, "`reset` of Asks", "plain text", train=True, environment_factory=Asks, train_dataset=plain)


async def later(completions, **kwargs): return None


BAD_REWARDS = {"None": (lambda completions, **kw: None, "returned None"), "async None": (later, "returned None"), "a number": (lambda completions, **kw: 0.5, "returned a float"),
               "text": (lambda completions, **kw: "good", "returned a str"), "texts": (lambda completions, **kw: ["good"] * len(completions), "'good'"),
               "too few": (lambda completions, **kw: [1.0], "returned 1 rewards, but 4 were expected"), "lists": (lambda completions, **kw: [[1.0]] * len(completions), "a list"),
               "a matrix": (lambda completions, **kw: torch.zeros(len(completions), 1), "a Tensor")}


@pytest.mark.parametrize("case", BAD_REWARDS)
def test_a_reward_that_returns_no_scores(case, tmp_path):
    reward, words = BAD_REWARDS[case]
    reward.__name__ = "tidy"
    refused(tmp_path, "'tidy'", words, train=True, reward_funcs=[answer_reward, reward], options=dict(max_completion_length=40))


def test_scores_of_any_kind_of_number(tmp_path):
    import numpy as np
    for i, scores in enumerate([lambda n: torch.arange(n), lambda n: np.arange(n) > 1, lambda n: (1.0,) * n, lambda n: [None, np.float32(1)] * (n // 2)]):
        make(tmp_path / str(i), reward_funcs=lambda completions, scores=scores, **kw: scores(len(completions)), options=dict(max_completion_length=40)).train()


# ---- templates


def policy(tok):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                                        bos_token_id=None, eos_token_id=tok.convert_tokens_to_ids(next(iter(tok.ends))), pad_token_id=tok.pad_token_id))


def of(name):
    tok = tokenizer(name)
    tok.padding_side, tok.ends = "left", ends_of(name)
    return tok


REFUSED = {n: o for n, o in OUTCOME.items() if o in (NO_TOOLS, NO_PARSER) and not n.endswith("_training")}


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_that_has_no_tools_is_refused_with_the_way_out(name, tmp_path):
    tok = of(name)
    if OUTCOME[name] == NO_PARSER: tok.response_template = None
    refused(tmp_path, "call_format", "json", model=policy(tok), processing_class=tok)


@pytest.mark.parametrize("name", [n for n in AS_TEXT if not n.endswith("_training")])
def test_a_template_that_cannot_carry_text_is_refused(name, tmp_path):
    tok = of(name)
    refused(tmp_path, "template", model=policy(tok), processing_class=tok, options=dict(call_format="json"))


@pytest.mark.parametrize("name", ["gemma3", "llama3", "cohere2"])
def test_the_way_out_is_one(name, tmp_path):
    tok = of(name)
    make(tmp_path, model=policy(tok), processing_class=tok, options=dict(call_format="json"))


def test_every_family_has_its_ends(): assert all(ENDS.values())


class MistralCommonBackend:
    "As transformers' backend: it renders conversations itself and has no template."
    pad_token, eos_token_id, padding_side = "<pad>", 2, "left"
    def apply_chat_template(self, *args, **kwargs): return [1]


def test_a_backend_without_templates_is_named(tmp_path):
    assert re.search("not supported", refused(tmp_path, "MistralCommonBackend", "chat_template", processing_class=MistralCommonBackend()))
