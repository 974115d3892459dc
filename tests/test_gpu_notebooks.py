"""Notebooks that need a GPU: the same cells on a CPU, with the tiny policy in the model's place."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "nbs" / "gpu").glob("*.ipynb"))
SWAPS = {r'MODEL, STEPS, USE_VLLM = .*': "MODEL, STEPS, USE_VLLM = tiny_policy(), 2, False", r'\("train", 2048\), \("test", 128\)': '("train", 16), ("test", 1)',
         r"max_completion_length=1024": "max_completion_length=96", r"gradient_accumulation_steps=8": "gradient_accumulation_steps=2"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_cell_runs_with_the_tiny_policy(path, tmp_path, monkeypatch):
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert len(cells) > 5 and all(c.startswith("#| gpu\n") for c in cells)
    code = "\n".join(cells)
    for pattern, swap in SWAPS.items():
        code, n = re.subn(pattern, lambda m, swap=swap: swap, code)
        assert n == 1, pattern
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, str(path), "exec"), names)
    assert names["report"].ok and names["trainer"].state.global_step == 2 and names["run"].status() == "finished"
    assert 0 <= names["before"] <= 1 and 0 <= names["after"] <= 1 and set(names["index"].split) == {"train", "eval"}
