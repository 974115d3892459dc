"Everything a user needs: `from tirlab.all import *`."
from tirlab.advantages import *
from tirlab.calls import *
from tirlab.confidence import *
from tirlab.bfcl import BFCLEnvironment as BFCLEnvironment, bfcl_reward as bfcl_reward, bfcl_tasks as bfcl_tasks
from tirlab.collapse import Alarm as Alarm, CollapseMonitor as CollapseMonitor, Detectors as Detectors, collapse_began as collapse_began
from tirlab.config import *
from tirlab.continuous import ContinuousEngine as ContinuousEngine
from tirlab.drift import assert_masks as assert_masks, drift_check as drift_check, drift_check_model as drift_check_model
from tirlab.endpoint import Endpoint as Endpoint
from tirlab.engines import *
from tirlab.environments import *
from tirlab.estimates import Estimate as Estimate, interval as interval, majority_vote as majority_vote, pass_at_k as pass_at_k
from tirlab.eval_results import compare_runs as compare_runs
from tirlab.eval_runs import Sampler as Sampler, evaluate_run as evaluate_run
from tirlab.evaluate import Evaluation as Evaluation, evaluate as evaluate, evaluate_cells as evaluate_cells, restore as restore
from tirlab.executions import Execution as Execution, Limits as Limits, SandboxFault as SandboxFault, Status as Status
from tirlab.exports import export_dataset as export_dataset, export_html as export_html
from tirlab.formats import *
from tirlab.imports import import_traces as import_traces
from tirlab.interleave import Interleave as Interleave, OnAlarm as OnAlarm
from tirlab.interpreters import Interpreter as Interpreter
from tirlab.remote import least_loaded as least_loaded, ray_nodes as ray_nodes, remote as remote
from tirlab.interventions import Clamp as Clamp, clamps_from as clamps_from, random_clamps as random_clamps
from tirlab.demonstrations import demonstrate as demonstrate, is_whole as is_whole
from tirlab.mathematics import boxed as boxed, math_tasks as math_tasks
from tirlab.patterns import pattern_judge as pattern_judge, pattern_shares as pattern_shares, reasoning_patterns as reasoning_patterns
from tirlab.presets import PRESETS as PRESETS, preset as preset, preset_plan as preset_plan, preset_trainer as preset_trainer, train_preset as train_preset
from tirlab.reflections import rule_writer as rule_writer
from tirlab.writers import EndpointWriter as EndpointWriter
from tirlab.rewards import *
from tirlab.rollout import *
from tirlab.scores import score_run as score_run
from tirlab.shaping import *
from tirlab.sft_rows import sft_rows as sft_rows
from tirlab.sandbox import run_python as run_python, sandbox_level as sandbox_level
from tirlab.lessons import DemonstrationSFT as DemonstrationSFT, ErroneousTrajectories as ErroneousTrajectories, Reflections as Reflections, RejectionSampling as RejectionSampling
from tirlab.prompts import Replay as Replay
from tirlab.supervision import AuxiliarySFT as AuxiliarySFT, Hints as Hints, OffPolicy as OffPolicy
from tirlab.tasks import *
from tirlab.tiny import *
from tirlab.traces import Run as Run, RunError as RunError, RunWriter as RunWriter, open_run as open_run
from tirlab.trainer import *
from tirlab.trajectory import *
from tirlab.vllm_engine import VLLMEngine as VLLMEngine
from tirlab.vllm_servers import VLLMServerEngine as VLLMServerEngine
