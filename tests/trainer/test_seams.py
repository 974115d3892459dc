"""TRL's private seams that tirlab enters through, in one place. A change of TRL's that moves one of them fails here first."""

import inspect

import pytest
import trl
from trl import GRPOTrainer

from tirlab.trainer.trainer import TIRTrainer

OURS = {n for c in TIRTrainer.__mro__ if c.__module__.startswith("tirlab") for n in vars(c)}   # ours, and what it inherits of ours

SEAMS = {
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "_generate": ["self", "prompts"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_get_train_sampler": ["self", "dataset"],
    "log": ["self", "logs", "start_time"],
}
CALLED = {   # methods of TRL's that tirlab calls -> what they take
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations", "has_tool_images"],
    "_calculate_rewards": SEAMS["_calculate_rewards"],
}
READ = {   # attributes that TRL sets and tirlab reads -> the method that sets them
    "self.environments": "_generate_and_score_completions", "self._env_tools": "__init__", "self.environment_factories": "__init__", "self._multi_environment": "__init__",
    "self._standalone_tools": "__init__", "self.tools": "__init__", "self.reward_funcs": "__init__",
    "self.reward_weights": "__init__", "self.reward_func_names": "__init__", "self._tokenizer": "__init__", "self.async_loop": "__init__",
    "self.chat_template": "__init__", "self.chat_template_kwargs": "__init__", "self._logs": "__init__", "self._metrics": "__init__", "self._pending_extra_logs": "__init__",
    "self.vllm_generation": "__init__", "self.num_generations_eval": "__init__", "self._dist": "__init__", "self.eos_token_ids": "__init__", "self._environment_pool": "__init__",
    "self.aux_loss_enabled": "__init__", "self._buffered_inputs": "__init__", "self._step": "__init__", "self._last_loaded_step": "__init__",
}


def test_the_version_is_the_one_that_was_read():
    assert trl.__version__ == "1.16.0"


@pytest.mark.parametrize("name", SEAMS)
def test_overridden_methods_take_what_they_took(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == SEAMS[name]
    assert name in OURS, "the list names a seam that is not entered"


def test_every_override_is_listed():
    theirs = {n for n, f in inspect.getmembers(GRPOTrainer, inspect.isfunction) if n in OURS}
    assert theirs == {*SEAMS, "__init__", "train", "evaluate", "_get_per_token_logps_and_entropies", "_load_best_model"}


@pytest.mark.parametrize("attribute", READ)
def test_attributes_are_set_where_they_were(attribute):
    source = inspect.getsource(getattr(GRPOTrainer, READ[attribute]))
    assert f"{attribute} = " in source or f"{attribute}, " in source or f"{attribute}: " in source


@pytest.mark.parametrize("name", CALLED)
def test_methods_that_are_called_take_what_they_took(name):
    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == CALLED[name]


def test_the_shape_of_what_is_handed_over():
    generate, score = inspect.getsource(GRPOTrainer._generate), inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "return prompt_ids, completion_ids, tool_mask, completions, logprobs, extra_fields, images, tool_images" in generate
    assert '"advantages": advantages' in score and "advantages.dim() == 1" in inspect.getsource(GRPOTrainer._compute_loss)
    assert inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies).rstrip().endswith("return logps, entropies, aux_loss")


def test_without_environments_trl_takes_prompts_and_rewards_as_they_are():
    "The rows that TRL is given are drawn and reset; in between it asks once for generations and once for rewards."
    score = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert 'prompts = [x["prompt"] for x in inputs]' in score and "if self.environments:\n            for i, (prompt, environment, x)" in score
    assert score.count(") = self._generate(prompts)") == 1 and score.count("self._calculate_rewards(") == 1 and score.count(".reset(") == 1


def test_the_loss_asks_once_for_log_probabilities_and_then_reads_advantages():
    "So the forward pass can be run first, and handed over."
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    assert loss.count("self._get_per_token_logps_and_entropies(") == 1 and loss.index("self._get_per_token_logps_and_entropies(") < loss.index('advantages = inputs["advantages"]')
    assert "compute_entropy=True" in loss and "compute_aux_loss=self.aux_loss_enabled" in loss and "batch_size" not in loss.split("self._get_per_token_logps_and_entropies(")[1].split(")")[0]


def test_the_kernel_that_the_probe_listens_to():
    "The probe stands in for this function of the fused head; tests/collapse/test_probes.py holds its arguments and answers."
    from trl.trainer import utils
    assert "_ChunkedLogProbFunction.apply(" in inspect.getsource(utils) and hasattr(utils._ChunkedLogProbFunction, "apply")
