"Everything a user needs: `from tirlab.all import *`."
from tirlab.algorithms.advantages import *
from tirlab.rollout.calls import *
from tirlab.rewards.confidence import *
from tirlab.envs.bfcl import BFCLEnvironment as BFCLEnvironment, bfcl_reward as bfcl_reward, bfcl_tasks as bfcl_tasks
from tirlab.collapse.monitor import Alarm as Alarm, CollapseMonitor as CollapseMonitor, Detectors as Detectors, collapse_began as collapse_began
from tirlab.config.tir_config import *
from tirlab.rollout.continuous import ContinuousEngine as ContinuousEngine
from tirlab.rollout.drift import assert_masks as assert_masks, drift_check as drift_check, drift_check_model as drift_check_model
from tirlab.rollout.endpoint import Endpoint as Endpoint
from tirlab.rollout.engines import *
from tirlab.envs.environments import *
from tirlab.eval.estimates import Estimate as Estimate, interval as interval, majority_vote as majority_vote, pass_at_k as pass_at_k
from tirlab.eval.results import compare_runs as compare_runs
from tirlab.eval.runs import Sampler as Sampler, evaluate_run as evaluate_run
from tirlab.eval.evaluate import Evaluation as Evaluation, evaluate as evaluate, evaluate_cells as evaluate_cells, restore as restore
from tirlab.sandbox.executions import Execution as Execution, Limits as Limits, SandboxFault as SandboxFault, Status as Status
from tirlab.plots.export import export_dataset as export_dataset, export_html as export_html
from tirlab.core.formats import *
from tirlab.traces.imports import import_traces as import_traces
from tirlab.trainer.interleave import Interleave as Interleave, OnAlarm as OnAlarm
from tirlab.sandbox.interpreters import Interpreter as Interpreter
from tirlab.sandbox.remote import least_loaded as least_loaded, ray_nodes as ray_nodes, remote as remote
from tirlab.collapse.interventions import Clamp as Clamp, clamps_from as clamps_from, random_clamps as random_clamps
from tirlab.supervision.demonstrations import demonstrate as demonstrate, is_whole as is_whole
from tirlab.envs.math_tasks import boxed as boxed, math_tasks as math_tasks
from tirlab.rewards.patterns import pattern_judge as pattern_judge, pattern_shares as pattern_shares, reasoning_patterns as reasoning_patterns
from tirlab.recipes.presets import PRESETS as PRESETS, preset as preset, preset_plan as preset_plan, preset_trainer as preset_trainer, train_preset as train_preset
from tirlab.supervision.reflections import rule_writer as rule_writer
from tirlab.rollout.writers import EndpointWriter as EndpointWriter
from tirlab.rewards.outcome import *
from tirlab.rollout.loop import *
from tirlab.rollout.metrics import *
from tirlab.rollout.schedule import *
from tirlab.eval.scores import score_run as score_run
from tirlab.rewards.shaping import *
from tirlab.supervision.lessons import sft_rows as sft_rows
from tirlab.sandbox.client import run_python as run_python, sandbox_level as sandbox_level
from tirlab.supervision.lessons import DemonstrationSFT as DemonstrationSFT, ErroneousTrajectories as ErroneousTrajectories, Reflections as Reflections, RejectionSampling as RejectionSampling
from tirlab.algorithms.prompts import Replay as Replay
from tirlab.supervision.in_batch import AuxiliarySFT as AuxiliarySFT, Hints as Hints, OffPolicy as OffPolicy
from tirlab.envs.tasks import *
from tirlab.core.tiny import *
from tirlab.traces.run import Run as Run, RunError as RunError, RunWriter as RunWriter, open_run as open_run
from tirlab.trainer.trainer import *
from tirlab.core.trajectory import *
from tirlab.rollout.vllm import VLLMEngine as VLLMEngine
from tirlab.rollout.vllm_servers import VLLMServerEngine as VLLMServerEngine
