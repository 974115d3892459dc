"""Control tokens, watched through the real trainer: on record for every token, in the log for every step, and done without where they cannot be had."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, open_run, tiny_policy
from tirlab.core.formats import ChatFormat


def trained(folder, steps=1, **options):
    common = dict(output_dir=str(folder), run_dir=str(folder / "run"), max_steps=steps, per_device_train_batch_size=16, num_generations=8, max_completion_length=96, seed=0,
                  learning_rate=1e-4, save_strategy="no", disable_tqdm=True, report_to="none", probe="on", temperature=0.7)
    t = TIRTrainer(tiny_policy(), answer_reward, TIRConfig(**common | options), make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
    t.train()
    return t


def test_what_is_on_record_is_what_the_logits_say(tmp_path):
    "The first step's columns against all logits of the policy it began with."
    t = trained(tmp_path)
    run, model = open_run(t.run_dir), AutoModelForCausalLM.from_pretrained(tiny_policy()).eval()
    names = run.meta()["probed_tokens"]
    ids = t._tokenizer.convert_tokens_to_ids(names)
    assert names == ["<tool_call>", "</tool_call>", "<|im_end|>"]
    for row in map(run.trajectory, run.index().id[:6]):
        with torch.no_grad(): logits = model(torch.tensor([[*row.prompt_ids, *row.ids]])).logits[0, len(row.prompt_ids) - 1:-1] / 0.7
        full, wrote = logits.log_softmax(-1).numpy(), row.mask == 1
        assert row.control.shape == (len(row.ids), 3) and np.isnan(row.control[~wrote]).all() and wrote.any()
        assert np.abs(row.control[wrote] - full[wrote][:, ids]).max() < 2e-2 and np.isnan(row.surprise[~wrote]).all()      # kept in 16 bits
        onehot = np.eye(full.shape[1])[row.ids]
        assert np.abs(row.surprise[wrote] - np.linalg.norm(onehot - np.exp(full), axis=1)[wrote]).max() < 2e-3


def test_a_step_of_several_losses_has_the_signals_of_all(tmp_path):
    "The same 16 rollouts in one loss, and in two: same signals, logged once a step."
    logs = []
    for name, options in (("whole", {}), ("halves", dict(per_device_train_batch_size=8, gradient_accumulation_steps=2))):
        t = trained(tmp_path / name, trace=False, **options)
        logs.append({k: v for m in t.state.log_history for k, v in m.items() if k.startswith("probe/")})
    assert logs[0].keys() == logs[1].keys() and {"probe/tool_call/turn_start_mean", "probe/entropy_mean", "probe/logit_gradient/turn_1"} < logs[0].keys()
    for k, v in logs[0].items():
        if "logit_gradient" not in k: assert logs[1][k] == pytest.approx(v, rel=1e-4, abs=1e-6), k


def test_where_it_cannot_be_had_training_says_so_and_goes_on(tmp_path, monkeypatch):
    "A tokenizer that splits a marker: an error, or a warning and the other markers."
    monkeypatch.setattr(ChatFormat, "control_ids", lambda self: {"<tool_call>": [27, 91], "<|im_end|>": [258]})
    with pytest.raises(ValueError, match="'<tool_call>' into 2"): trained(tmp_path / "on")
    with pytest.warns(UserWarning, match="not probed"): t = trained(tmp_path / "warn", probe="warn")
    run = open_run(t.run_dir)
    assert run.status() == "finished" and run.meta()["probed_tokens"] == ["<|im_end|>"] and len(run.meta()["control_tokens"]) == 2
    assert {k.split("/")[1] for m in t.state.log_history for k in m if "turn_start" in k} == {"im_end"}
    t = trained(tmp_path / "off", probe="off")
    assert not any(k.startswith("probe/") for m in t.state.log_history for k in m) and open_run(t.run_dir).trajectory(run.index().id[0]).control.shape[1] == 0


def test_a_nan_in_the_policy_is_named(tmp_path):
    "A logit that is no number: an error that says where, or a warning and no probe."
    common = dict(output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=8, num_generations=8, max_completion_length=32, report_to="none", trace=False)
    for probe in ("on", "warn"):
        t = TIRTrainer(tiny_policy(), answer_reward, TIRConfig(probe=probe, **common), make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
        t.current_gradient_accumulation_steps = 1
        t.model.train()
        batch = t._generate_and_score_completions([t.train_dataset[0]] * 8)
        with torch.no_grad(): t.model.lm_head.weight[t._tokenizer.convert_tokens_to_ids("<tool_call>")] = torch.nan
        if probe == "on":
            with pytest.raises(ValueError, match="NaN"): t._compute_loss(t.model, batch)
        else:
            with pytest.warns(UserWarning, match="NaN"): t._compute_loss(t.model, batch)
