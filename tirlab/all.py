"The names that a user has at hand: `from tirlab.all import *`. Everything else is imported from its package."
from tirlab.core.trajectory import Trajectory
from tirlab.core.formats import make_format
from tirlab.core.tiny import tiny_policy
from tirlab.sandbox.executions import Limits
from tirlab.sandbox.client import run_python
from tirlab.sandbox.remote import remote
from tirlab.envs.environments import PythonEnvironment, python_environment
from tirlab.envs.tasks import ENVIRONMENTS, make_tasks
from tirlab.envs.math_tasks import math_tasks
from tirlab.envs.bfcl import BFCLEnvironment, bfcl_reward, bfcl_tasks
from tirlab.rollout.calls import RolloutLimits
from tirlab.rollout.engines import GenerateEngine, Sampling
from tirlab.rollout.continuous import ContinuousEngine
from tirlab.rollout.vllm import VLLMEngine
from tirlab.rollout.vllm_servers import VLLMServerEngine
from tirlab.rollout.endpoint import Endpoint
from tirlab.rollout.schedule import rollouts
from tirlab.rollout.drift import drift_check_model
from tirlab.rollout.writers import EndpointWriter
from tirlab.rewards.outcome import answer_reward, format_reward, function_reward, math_reward, tool_success_reward
from tirlab.rewards.shaping import shaped_answer_reward
from tirlab.algorithms.prompts import Replay
from tirlab.config.tir_config import TIRConfig
from tirlab.collapse.monitor import CollapseMonitor, Detectors, collapse_began
from tirlab.collapse.interventions import Clamp
from tirlab.collapse.probe_text import probe
from tirlab.traces.run import Run, open_run
from tirlab.traces.imports import import_traces
from tirlab.plots.figures import training_curves
from tirlab.plots.token_html import token_html
from tirlab.plots.export import export_dataset, export_html
from tirlab.supervision.in_batch import AuxiliarySFT, Hints, OffPolicy
from tirlab.supervision.demonstrations import demonstrate
from tirlab.supervision.lessons import DemonstrationSFT, ErroneousTrajectories, Reflections, RejectionSampling
from tirlab.trainer.trainer import TIRTrainer
from tirlab.trainer.interleave import Interleave, OnAlarm
from tirlab.trainer.live import watch
from tirlab.eval.evaluate import evaluate, evaluate_cells
from tirlab.eval.runs import evaluate_run
from tirlab.eval.estimates import compare_runs
from tirlab.eval.scores import score_run
from tirlab.eval.estimates import majority_vote, pass_at_k
from tirlab.recipes.training import recipe_trainer, train_recipe

__all__ = [
    # core
    "Trajectory", "make_format", "tiny_policy",
    # sandbox
    "Limits", "run_python", "remote",
    # envs
    "PythonEnvironment", "python_environment", "ENVIRONMENTS", "make_tasks", "math_tasks", "BFCLEnvironment",
    "bfcl_reward", "bfcl_tasks",
    # rollout
    "RolloutLimits", "GenerateEngine", "Sampling", "ContinuousEngine", "VLLMEngine", "VLLMServerEngine", "Endpoint",
    "rollouts", "drift_check_model", "EndpointWriter",
    # rewards
    "answer_reward", "format_reward", "function_reward", "math_reward", "tool_success_reward",
    "shaped_answer_reward",
    # algorithms
    "Replay",
    # config
    "TIRConfig",
    # collapse
    "CollapseMonitor", "Detectors", "collapse_began", "Clamp", "probe",
    # traces
    "Run", "open_run", "import_traces",
    # plots
    "token_html", "training_curves", "export_dataset", "export_html",
    # supervision
    "AuxiliarySFT", "Hints", "OffPolicy", "demonstrate", "DemonstrationSFT", "ErroneousTrajectories", "Reflections",
    "RejectionSampling",
    # trainer
    "TIRTrainer", "Interleave", "OnAlarm", "watch",
    # eval
    "evaluate", "evaluate_cells", "evaluate_run", "compare_runs", "score_run", "majority_vote", "pass_at_k",
    # recipes
    "recipe_trainer", "train_recipe",
]
