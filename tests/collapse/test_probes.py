"""Control-token probabilities against all logits in float64, for heads of every make; what TRL's trainer computes is untouched; errors with names."""

import inspect
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils as fused_head
from trl.trainer.utils import add_fused_lm_head

from tirlab.all import RolloutLimits, Sampling, TIRConfig, TIRTrainer, answer_reward, evaluate, make_tasks, tiny_policy
from tirlab.collapse.control_signals import merge_signals, step_signals, token_roles
from tirlab.core.turns import control_ids
from tirlab.collapse.probes import ControlProbe, Probed, ProbeError, concat_probed, control_logprobs, read_probed, single_tokens, surprise
from tirlab.envs.tasks import ENVIRONMENTS
from tirlab.core.trajectory import StopReason, ToolCall, ToolError, ToolResult, Trajectory, Turn, TurnKind

VOCAB, TOKENS = 211, {"a": 3, "b": 7, "c": 0, "d": 210}
SMALL = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
             bos_token_id=None, eos_token_id=1)
HEADS = {   # config class, what is peculiar to it
    "Qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True)),
    "Qwen2 untied": ("Qwen2", dict(tie_word_embeddings=False)),
    "Qwen3": ("Qwen3", dict(head_dim=16)),
    "Llama": ("Llama", dict()),
    "Gemma2, soft cap": ("Gemma2", dict(head_dim=16, final_logit_softcapping=2.0)),
    "Gemma3, soft cap": ("Gemma3", dict(head_dim=16, final_logit_softcapping=1.5)),
    "Gemma3": ("Gemma3", dict(head_dim=16)),
    "Cohere, logit scale": ("Cohere", dict(logit_scale=0.0625)),
    "Granite, logits scaling": ("Granite", dict(logits_scaling=0.2)),
    "Phi, bias": ("Phi", dict()),
}


def make(name, temperature=0.7, dtype=torch.float32, seed=0, **options):
    "A random model, its head's weights and biases large enough to matter, with TRL's fused head."
    family, peculiar = HEADS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**SMALL | peculiar)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        head = model.get_output_embeddings()
        head.weight.mul_(10)
        if head.bias is not None: head.bias.normal_()
    model = model.to(dtype).train()
    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"), **options)
    return model


def batch(rows=5, prompt=6, completion=9, padding="left", seed=1):
    "Inputs padded on one side of the prompt and on the right of the completion, and labels of the completions."
    rng = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(VOCAB, (rows, prompt + completion), generator=rng), torch.ones(rows, prompt + completion, dtype=torch.long)
    for i in range(rows):
        if padding == "left": mask[i, :i % prompt] = 0
        mask[i, prompt + completion - i:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return ids, mask, labels


def watched(model, probe, ids, mask, labels, width=9, size=None):
    "TRL's log-probabilities of the completions and what the probe heard, in pieces of `size` rows."
    size, logps = size or len(ids), []
    with probe.watch(model):
        for i in range(0, len(ids), size):
            logps.append(model(input_ids=ids[i:i + size], attention_mask=mask[i:i + size], labels=labels[i:i + size], fused_lm_head=True).log_probs[:, -width:])
    logps = torch.cat(logps)
    return logps, *probe.read(logps)


def reference(model, ids, mask, width=9, temperature=0.7):
    "Log-probabilities of the whole vocabulary, (B, width, V), by the model's own forward in float64."
    with torch.no_grad(): logits = model.double()(input_ids=ids, attention_mask=mask).logits
    return (logits.double()[:, -width - 1:-1] / temperature).log_softmax(-1)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_against_all_logits(name, padding):
    model, (ids, mask, labels) = make(name), batch(padding=padding)
    _, control, squares = watched(model, ControlProbe(TOKENS), ids, mask, labels)
    full, scored = reference(model, ids, mask), labels[:, -9:] != -100
    assert control.shape == (5, 9, 4) and control.dtype == torch.float32
    assert (control - full[..., list(TOKENS.values())])[scored].abs().max() <= 1e-5
    assert (squares - (2 * full).logsumexp(-1))[scored].abs().max() <= 1e-5
    assert control[~scored].isnan().all() and squares[~scored].isnan().all() and (~scored).any()


@pytest.mark.parametrize("name", ["Qwen2 tied", "Gemma2, soft cap", "Phi, bias", "Granite, logits scaling"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_within_twice_the_heads_own_error(name, autocast, record_property):
    "The reference takes the hidden states that the head got; what remains is the head's rounding."
    model, (ids, mask, labels) = make(name, dtype=torch.float32 if autocast else torch.bfloat16), batch(rows=24, completion=15)
    got, listener = {}, fused_head._ChunkedLogProbFunction
    def kernel(hidden, weight, bias, *rest): got.update(hidden=hidden, weight=weight, bias=bias, softcap=rest[3], scale=rest[4]); return listener.apply(hidden, weight, bias, *rest)
    fused_head._ChunkedLogProbFunction = SimpleNamespace(apply=kernel)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): logp, control, _ = watched(model, ControlProbe(TOKENS), ids, mask, labels, 15)
    finally: fused_head._ChunkedLogProbFunction = listener
    rounded = lambda x: x.detach().bfloat16().double()
    z = rounded(got["hidden"]) @ rounded(got["weight"]).T + (0 if got["bias"] is None else rounded(got["bias"]))
    z = z * got["scale"]
    if got["softcap"] is not None: z = got["softcap"] * (z / got["softcap"]).tanh()
    full, scored = (z / 0.7).log_softmax(-1).view(24, -1, VOCAB)[:, -15:], labels[:, -15:] != -100
    own = (logp - full.gather(-1, ids[:, -15:, None])[..., 0])[scored].abs().max().item()
    ours = (control - full[..., list(TOKENS.values())])[scored].abs().max().item()
    record_property("head_error", own), record_property("probe_error", ours)
    print(f"{name}: the head's own error {own:.1e}, the probe's {ours:.1e}")
    assert ours <= 2 * own and own > 1e-4


def test_a_head_in_float32_over_a_bfloat16_backbone():
    "`cast_lm_head_to_fp32`: the head's precision is the kernel's business, and so the probe's."
    model, (ids, mask, labels) = make("Qwen2 untied", cast_lm_head_to_fp32=True), batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, control, _ = watched(model, ControlProbe(TOKENS | {"y": 5}), ids.masked_fill(labels != -100, 5), mask, labels.masked_fill(labels != -100, 5))
        logp, *_ = watched(model, ControlProbe(TOKENS), ids.masked_fill(labels != -100, 5), mask, labels.masked_fill(labels != -100, 5))
    scored = labels[:, -9:] != -100
    assert (control[..., 4] - logp)[scored].abs().max() <= 1e-5   # the sampled token itself; in bfloat16 it would be 1e-2


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_pieces_come_in_order(size):
    model, inputs = make("Qwen3"), batch()
    whole, pieces = (watched(model, ControlProbe(TOKENS), *inputs, size=s)[1] for s in (None, size))
    assert torch.allclose(whole, pieces, atol=1e-6, equal_nan=True)


def test_long_batches_are_read_in_chunks(monkeypatch):
    model, inputs = make("Phi, bias"), batch()
    whole = watched(model, ControlProbe(TOKENS), *inputs)[1]
    monkeypatch.setattr("tirlab.collapse.probes.CHUNK", 4)
    assert torch.allclose(whole, watched(model, ControlProbe(TOKENS), *inputs)[1], atol=1e-6, equal_nan=True)


def test_kernels_that_get_the_scored_positions_only(monkeypatch):
    "As on a GPU; the kernel itself stays the one of the CPU."
    model, inputs = make("Gemma2, soft cap"), batch()
    everywhere = watched(model, ControlProbe(TOKENS), *inputs)
    monkeypatch.setattr(fused_head, "_use_triton", lambda device: True)
    for here, there in zip(everywhere, watched(model, ControlProbe(TOKENS), *inputs)): assert torch.allclose(here, there, atol=1e-6, equal_nan=True)


def test_shifted_labels():
    model, (ids, mask, labels) = make("Llama"), batch()
    probe, shifted = ControlProbe(TOKENS), torch.cat([labels[:, 1:], labels.new_full((5, 1), -100)], 1)
    with probe.watch(model): out = model(input_ids=ids, attention_mask=mask, shift_labels=shifted, fused_lm_head=True)
    assert torch.allclose(probe.read(out.log_probs)[0][:, -10:-1], watched(model, ControlProbe(TOKENS), ids, mask, labels)[1], atol=1e-6, equal_nan=True)


def test_gradient_checkpointing_counts_once_and_gradients_stay():
    grads = []
    for checkpointing, watching in ((False, False), (False, True), (True, True)):
        model, (ids, mask, labels), probe = make("Qwen2 tied"), batch(), ControlProbe(TOKENS)
        if checkpointing: model.gradient_checkpointing_enable()
        if watching: loss, control, _ = watched(model, probe, ids, mask, labels)
        else: loss = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -9:]
        loss.sum().backward()
        assert not probe._pieces   # the backward pass adds nothing
        grads.append([p.grad for p in model.parameters()])
        if watching: assert control.shape == (5, 9, 4) and not control.requires_grad
    for plain, watching, checkpointed in zip(*grads): assert torch.equal(plain, watching) and torch.allclose(plain, checkpointed, atol=1e-6)


def test_nothing_is_left_behind():
    model, kernel = make("Qwen2 tied"), fused_head._ChunkedLogProbFunction
    ids, mask, labels = batch()
    with pytest.raises(ZeroDivisionError), ControlProbe(TOKENS).watch(model):
        assert fused_head._ChunkedLogProbFunction is not kernel and model._forward_pre_hooks
        raise ZeroDivisionError
    assert fused_head._ChunkedLogProbFunction is kernel is ChunkedLogProbFunction and not model._forward_pre_hooks
    probe, other = ControlProbe(TOKENS), make("Qwen2 tied", seed=1)
    with probe.watch(model): other(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)   # somebody else's forward pass
    assert not probe._pieces


def test_no_control_token_at_all():
    "As where a syntax has none of its own: the squares are still there."
    _, control, squares = watched(make("Qwen2 tied"), ControlProbe({}), *batch())
    assert control.shape == (5, 9, 0) and squares.isfinite().any()
    assert token_roles([Trajectory([0], [], StopReason.FAILED)], {}, 2).forbidden.shape == (1, 2, 0)


def test_a_batch_without_labels():
    "As a micro-batch of failed rollouts."
    ids, mask, labels = batch()
    _, control, squares = watched(make("Qwen2 tied"), ControlProbe(TOKENS), ids, mask, labels.fill_(-100))
    assert control.shape == (5, 9, 4) and control.isnan().all() and squares.isnan().all()


def test_two_probes_at_once():
    model, (ids, mask, labels) = make("Qwen2 tied"), batch()
    a, b = ControlProbe({"a": 3}), ControlProbe({"b": 7})
    with a.watch(model), b.watch(model): out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    both = watched(model, ControlProbe({"a": 3, "b": 7}), ids, mask, labels, 14)[1]
    assert torch.allclose(torch.cat([p.read(out.log_probs)[0] for p in (a, b)], -1), both, atol=1e-6, equal_nan=True)


# PEFT

def lora(**options):
    peft = pytest.importorskip("peft")
    model = make("Qwen2 untied")
    torch.manual_seed(2)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    return model, wrapped


@pytest.mark.parametrize("options", [dict(target_modules=["q_proj", "v_proj"]), dict(target_modules=["q_proj"], modules_to_save=["lm_head"])], ids=["backbone", "head trained whole"])
def test_adapters_on_the_backbone(options):
    model, wrapped = lora(**options)
    if "modules_to_save" in options:
        with torch.no_grad(): wrapped.get_output_embeddings().weight.add_(0.3)
    ids, mask, labels = batch()
    _, control, _ = watched(wrapped, ControlProbe(TOKENS), ids, mask, labels)
    full, scored = reference(wrapped, ids, mask), labels[:, -9:] != -100
    assert (control - full[..., list(TOKENS.values())])[scored].abs().max() <= 1e-5


def test_an_adapter_on_the_head_is_refused():
    _, wrapped = lora(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ProbeError, match="carries an adapter"), ControlProbe(TOKENS).watch(wrapped): pass


def test_prompt_learning_is_refused():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make("Qwen2 untied"), peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(ProbeError, match="Prompt learning"), ControlProbe(TOKENS).watch(wrapped): pass


def test_compiled_models_are_refused():
    model = make("Qwen2 untied")
    with pytest.raises(ProbeError, match="compiled"), ControlProbe(TOKENS).watch(torch.compile(model)): pass
    model.compile()
    with pytest.raises(ProbeError, match="compiled"), ControlProbe(TOKENS).watch(model): pass


# Bad input

class Odd(nn.Module):
    def get_output_embeddings(self): return None


@pytest.mark.parametrize("model, tokens, sentence", [
    (Odd(), TOKENS, "Odd has no output embeddings"), (nn.Linear(2, 2), TOKENS, "Linear has no output embeddings"),
    (None, {"far": VOCAB}, "Control token 211 is not among the 211 of the head"),
], ids=["no head", "no language model", "no such token"])
def test_heads_that_cannot_be_read(model, tokens, sentence):
    model = model or make("Qwen2 tied")
    with pytest.raises(ProbeError, match=sentence), ControlProbe(tokens).watch(model): pass
    probe = ControlProbe(tokens, strict=False)
    with pytest.warns(UserWarning, match=sentence), probe.watch(model): pass
    with warnings.catch_warnings():   # once is enough
        warnings.simplefilter("error")
        with probe.watch(model): pass
        control, squares = probe.read(torch.zeros(2, 3, requires_grad=True))
    assert control.shape == (2, 3, len(tokens)) and control.isnan().all() and squares.isnan().all() and not squares.requires_grad


def test_a_model_without_the_fused_head():
    model, probe, (ids, mask, labels) = make("Qwen2 tied"), ControlProbe(TOKENS), batch()
    with probe.watch(model): model(input_ids=ids, attention_mask=mask, labels=labels)
    with pytest.raises(ProbeError, match="not run"): probe.read(torch.zeros(5, 9))


def test_nan_logits_have_a_name_and_a_place():
    (ids, mask, labels), model = batch(), make("Qwen2 untied")
    with torch.no_grad(): model.get_output_embeddings().weight[100, 0] = torch.nan   # no control token, nobody's label
    with pytest.raises(ProbeError, match="NaN at 35 positions"): watched(model, ControlProbe(TOKENS), ids, mask, labels)
    with pytest.warns(UserWarning, match="NaN"): assert watched(model, ControlProbe(TOKENS, strict=False), ids, mask, labels)[1].isnan().all()


def test_labels_that_do_not_fit_are_refused_and_the_loss_goes_on():
    model, (ids, mask, labels) = make("Qwen2 tied"), batch()
    inner = model.model.forward
    model.model.forward = lambda *a, **k: SimpleNamespace(last_hidden_state=inner(*a, **k).last_hidden_state.repeat(1, 2, 1))   # what nobody's backbone does
    twice = torch.cat([labels, labels], 1)
    def forward(self, labels=None, **kwargs): return self.fused(labels=twice, **kwargs)
    model.fused, model.forward = model.forward, forward.__get__(model)
    plain = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs
    with pytest.raises(ProbeError, match="scored 145 positions where the labels name 35 of 70"), ControlProbe(TOKENS).watch(model):
        model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    probe = ControlProbe(TOKENS, strict=False)
    with pytest.warns(UserWarning, match="cannot place them"), probe.watch(model):
        assert torch.equal(plain, model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs)


def test_a_control_token_that_the_tokenizer_splits():
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy())
    assert single_tokens(control_ids(tokenizer)) == {"<tool_call>": 259, "</tool_call>": 260, "<|im_end|>": 258}
    found = control_ids(tokenizer) | {"</think>": tokenizer.encode("</think>")}
    with pytest.raises(ProbeError, match="'</think>' into 8"): single_tokens(found)
    with pytest.warns(UserWarning, match="'</think>'.*not probed"): assert list(single_tokens(found, strict=False)) == ["<tool_call>", "</tool_call>", "<|im_end|>"]


# The real trainer

def trl_step(kind, args, folder, probe=None):
    "Loss and gradients of a batch that the trainer itself sampled, and what the probe made of it."
    common = dict(output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=96, seed=3, save_strategy="no", report_to="none", disable_tqdm=True,
                  use_cpu=True, bf16=False, gradient_checkpointing=False, temperature=0.7, **args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = kind[0](tiny_policy(), answer_reward, kind[1](**common), make_tasks("all", n=2), environment_factory=ENVIRONMENTS)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        torch.manual_seed(0)
        inputs = trainer._generate_and_score_completions([x for x in trainer.train_dataset for _ in range(4)])
    inner, scores = GRPOTrainer._get_per_token_logps_and_entropies, []
    def score(self, model, *args, **kwargs):
        with probe.watch(model) if probe else nullcontext(): scores.append(inner(self, model, *args, **{"batch_size": 3} | kwargs))
        return scores[-1]
    with mock.patch.object(GRPOTrainer, "_get_per_token_logps_and_entropies", score): loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return trainer, inputs, loss.item(), [p.grad for p in trainer.model.parameters()], scores


@pytest.mark.parametrize("kind", [(GRPOTrainer, GRPOConfig), (TIRTrainer, TIRConfig)], ids=["TRL", "tirlab"])
def test_the_trainers_loss_is_the_same_to_the_bit(kind, tmp_path):
    probe = ControlProbe({"<tool_call>": 259, "</tool_call>": 260, "<|im_end|>": 258})
    extra = dict(trace=False) if kind[0] is TIRTrainer else {}
    _, _, plain, grads, _ = trl_step(kind, extra, tmp_path)
    trainer, inputs, loss, others, (score,) = trl_step(kind, extra, tmp_path, probe)
    assert loss == plain and all(torch.equal(a, b) for a, b in zip(grads, others))
    seen = read_probed(probe, score[0], score[1], inputs, trainer.args)
    logp, wrote = score[0].detach(), (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    ids, attention = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1), torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    full = reference(trainer.model, ids, attention, logp.shape[1])
    assert (seen.control - full[..., [259, 260, 258]])[wrote].abs().max() <= 5e-5   # a trained policy: logits of 40, through float32 layers
    sampled = inputs["completion_ids"][..., None] == torch.tensor([259, 260, 258])
    assert torch.allclose(seen.control[sampled & wrote[..., None]], logp[..., None].expand_as(sampled)[sampled & wrote[..., None]], atol=1e-5)
    onehot = torch.nn.functional.one_hot(inputs["completion_ids"], full.shape[-1]) - full.exp()
    assert (seen.surprise - onehot.norm(dim=-1))[wrote].abs().max() <= 2e-3   # float32 where a token is certain
    assert (seen.wrote == wrote).all() and seen.control[~wrote].isnan().all() and (seen.mask == wrote).all()


# What is known about a token

def fake(like, pieces=None):
    "A probe that measured all of a batch."
    probe = ControlProbe(TOKENS)
    probe._pieces = [(torch.randn(*like.shape, 4), -torch.rand(like.shape), torch.ones_like(like, dtype=torch.bool))]
    return probe


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo"])
def test_probed_by_hand(level, loss_type):
    torch.manual_seed(0)
    logp, old, sampler, entropy = -torch.rand(3, 5), -torch.rand(3, 5), -torch.rand(3, 5), torch.rand(3, 5)
    sampler[1] = torch.nan
    complete, tools = torch.tensor([[1] * 5, [1] * 4 + [0], [1] * 3 + [0] * 2]), torch.tensor([[1, 0, 1, 1, 0]] * 3)
    inputs = dict(completion_mask=complete, tool_mask=tools * torch.tensor([[1], [1], [0]]), advantages=torch.tensor([1.0, -1.0, 0.5]), old_per_token_logps=old, sampling_per_token_logps=sampler)
    args = SimpleNamespace(epsilon=0.2, epsilon_high=0.3, delta=None, loss_type=loss_type, importance_sampling_level=level)
    seen, mask = read_probed(fake(logp), logp, entropy, inputs, args, wrote=tools), (complete * inputs["tool_mask"]).bool()
    assert (seen.mask == mask).all() and (seen.wrote == (complete * tools).bool()).all()   # the third row was filtered, and is still seen
    for i in range(3):
        whole = sum((logp - old)[i, t].item() for t in range(5) if mask[i, t]) / max(int(mask[i].sum()), 1)
        for t in range(5):
            if not seen.wrote[i, t]:
                assert all(getattr(seen, n)[i, t].isnan().all() for n in ("control", "logp", "entropy", "surprise", "gap", "ratio", "advantage"))
                continue
            ratio = torch.tensor((logp - old)[i, t].item() if level == "token" else whole).exp().item()
            assert seen.ratio[i, t].item() == pytest.approx(ratio, abs=1e-6) and seen.advantage[i, t] == inputs["advantages"][i]
            flat = (ratio > 1.3 if inputs["advantages"][i] > 0 else ratio < 0.8) and loss_type in ("dapo", "grpo")
            assert seen.clipped[i, t] == (flat and bool(mask[i, t]))
            assert seen.gap[i, t].isnan() if i == 1 else seen.gap[i, t].item() == pytest.approx((logp - sampler)[i, t].item(), abs=1e-6)


def test_probed_without_anything_else():
    logp = -torch.rand(2, 4)
    args = SimpleNamespace(epsilon=0.2, epsilon_high=None, delta=None, loss_type="dapo", importance_sampling_level="token")
    seen = read_probed(fake(logp), logp, logp, dict(completion_mask=torch.ones(2, 4), advantages=torch.ones(2, 4)), args)
    assert seen.ratio.eq(1).all() and seen.gap.isnan().all() and not seen.clipped.any() and seen.mask.all()


def test_concatenation_pads_on_the_right():
    def piece(rows, width): return Probed(("a",), torch.zeros(rows, width, 1), *(torch.zeros(rows, width) for _ in range(6)), *(torch.ones(rows, width, dtype=torch.bool) for _ in range(2)))
    whole = concat_probed([piece(2, 3), piece(1, 5)])
    assert whole.control.shape == (3, 5, 1) and whole.wrote.tolist() == [[True] * 3 + [False] * 2] * 2 + [[True] * 5] and whole.mask.tolist() == whole.wrote.tolist()


def test_control_logprobs_in_float64_keep_their_digits():
    rng = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((9, 8), (VOCAB, 8), (VOCAB,)))
    full, targets = (hidden @ weight.T + bias).log_softmax(-1), torch.arange(9)
    ours = control_logprobs(hidden, weight, bias, targets, full[targets, targets], torch.tensor([5, 9]))
    assert (ours - full[:, [5, 9]]).abs().max() < 1e-13
    assert surprise(full[targets, targets], (2 * full).logsumexp(-1)).isfinite().all()


# Roles and signals

def slow_forbidden(trajectory, tokens, end="<|im_end|>"):
    "(T, K) where a control token must not appear, token by token."
    out = []
    for turn in trajectory.turns:
        inside = False
        for n, i in enumerate(turn.ids):
            rules = {"<tool_call>": inside, "</tool_call>": not inside, end: inside or n == 0}
            out.append([rules.get(name, True) for name in tokens])
            inside = i == tokens["<tool_call>"] or (inside and i != tokens["</tool_call>"])
        out += [[False] * len(tokens)] * len(turn.observation_ids)
    return out


@given(st.lists(st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 3)), max_size=4), min_size=1, max_size=4), st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_roles_are_the_loop(rows, more):
    tokens = {"<tool_call>": 1, "</tool_call>": 2, "<|im_end|>": 3, "<|im_start|>": 4}
    turn = lambda ids, n: Turn(ids, {"role": "assistant", "content": ""}, TurnKind.RESPONSE, observation_ids=[1] * n)
    batch = [Trajectory([0], [turn(*x) for x in row], StopReason.ANSWER) for row in rows]
    width = max(len(t.completion_ids) for t in batch) + more
    roles = token_roles(batch, tokens, width)
    for i, t in enumerate(batch):
        n = len(t.completion_ids)
        assert roles.forbidden[i, :n].tolist() == slow_forbidden(t, tokens) and not roles.forbidden[i, n:].any()
        assert roles.sampled[i, :n].tolist() == [[m == 1 and x == c for c in tokens.values()] for x, m in zip(t.completion_ids, t.mask)]
        assert roles.turn[i].tolist() == t.turn_of_token + [-1] * (width - n) and int(roles.start[i].sum()) == len(t.turns)


def test_healthy_turns_have_no_control_token_where_it_must_not_be():
    "What `turn_kind` calls a call or a response, the roles call legal; seen in both kinds and in broken turns of the tiny policy, hot."
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_policy()), AutoTokenizer.from_pretrained(tiny_policy())
    found = evaluate(model, tokenizer, make_tasks("all", n=32, seed=4), ENVIRONMENTS, sampling=Sampling(2**31, temperature=1.4), limits=RolloutLimits(completion_tokens=160)).trajectories
    tokens = {t: tokenizer.convert_tokens_to_ids(t) for t in ("<tool_call>", "</tool_call>", "<|im_end|>", "<|im_start|>", "<tool_response>", "</tool_response>")}
    roles, broken = token_roles(found, tokens, max(len(t.completion_ids) for t in found)), set()
    for i, t in enumerate(found):
        for j, turn in enumerate(t.turns):
            here = roles.turn[i] == j
            wrong = (roles.sampled[i] & roles.forbidden[i])[here].any().item()
            if turn.kind in (TurnKind.TOOL_CALL, TurnKind.RESPONSE): assert not wrong or set(turn.ids) & {tokens["<|im_start|>"], tokens["<tool_response>"], tokens["</tool_response>"]}
            elif wrong: broken.add(turn.kind)
    assert broken and {u.kind for t in found for u in t.turns} >= {TurnKind.TOOL_CALL, TurnKind.RESPONSE}


def test_a_tag_without_a_token_of_its_own_judges_nobody():
    t = Trajectory([0], [Turn([1, 5, 2, 3], {"role": "assistant", "content": ""}, TurnKind.TOOL_CALL)], StopReason.ANSWER)
    assert token_roles([t], {"</tool_call>": 2, "<|im_end|>": 3}, 4).forbidden[0].tolist() == [[False, True]] + [[False, False]] * 3
    assert token_roles([t], {"<tool_call>": 1, "<|im_end|>": 3}, 4).forbidden[0].tolist() == [[False, True]] + [[False, False]] * 3


def test_signals_by_hand():
    "Two rollouts in which every number is known; the second was filtered out of the loss and still counts."
    call = Turn([1, 5, 2, 3], {"role": "assistant", "content": ""}, TurnKind.TOOL_CALL, calls=[ToolCall("f", {})], results=[ToolResult("f", "x")], observation_ids=[7, 7])
    answer = Turn([5, 3], {"role": "assistant", "content": "5"}, TurnKind.RESPONSE)
    broken = Turn([1, 3], {"role": "assistant", "content": ""}, TurnKind.COLLAPSED, results=[ToolResult("tool_call", "?", ToolError.MALFORMED)])
    batch, tokens = [Trajectory([0], [call, answer], StopReason.ANSWER), Trajectory([0], [broken], StopReason.MALFORMED)], {"<tool_call>": 1, "</tool_call>": 2, "<|im_end|>": 3}
    wrote = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0]]).bool()
    control = torch.linspace(0.1, 0.9, 48).view(2, 8, 3).log().masked_fill(~wrote[..., None], torch.nan)
    table = lambda x: torch.full((2, 8), x).masked_fill(~wrote, torch.nan)
    logp, mask = table(-0.5), wrote & torch.tensor([[True], [False]])
    logp[1, 1] = -3.0
    seen = Probed(tuple(tokens), control, logp, table(0.25), table(0.6), table(0.0) + torch.nan, table(1.5), table(-2.0), mask & False, mask)
    signals, p = step_signals(batch, seen, tokens), control.exp()
    at = lambda k, *places: torch.stack([p[i, n, k] for i, n in places]).double()
    places = {"tool_call/sampled": at(0, (0, 0), (1, 0)), "tool_call/turn_start": at(0, (0, 0), (0, 6), (1, 0)), "tool_call/forbidden": at(0, (0, 1), (0, 2), (1, 1)),
              "im_end/forbidden": at(2, (0, 0), (0, 1), (0, 2), (0, 6), (1, 0), (1, 1)), "im_end/sampled": at(2, (0, 3), (0, 7), (1, 1)),
              "end_tool_call/forbidden": at(1, (0, 0), (0, 3), (0, 6), (0, 7), (1, 0))}
    for what, values in places.items():
        assert signals[f"probe/{what}_mean"] == pytest.approx(values.mean().item(), abs=1e-6) and signals[f"probe/{what}_max"] == pytest.approx(values.max().item(), abs=1e-6)
        for q in (10, 50, 90): assert signals[f"probe/{what}_p{q}"] == pytest.approx(values.quantile(q / 100).item(), abs=1e-6)
    wanted = {"state/tool_call": 1 / 3, "state/response": 1 / 3, "state/collapsed": 1 / 3, "state/text_pollution": 0, "void_rate": 1 / 3, "malformed_rate": 0.5, "call_rate": 1 / 3, "turns": 1.5,
              "entropy_mean": 0.25, "probability_min": torch.tensor(-3.0).exp().item(), "effective_batch": 0.5, "clipped_rate": 0.0, "ratio_max": 1.5}
    for name, value in wanted.items(): assert signals[f"probe/{name}"] == pytest.approx(value, abs=1e-6), name
    token = 1 / 6 * 1.5 * 2 * 0.6   # one of six tokens in the loss; the filtered rollout pulls at nothing
    assert signals["probe/logit_gradient/turn_1"] == pytest.approx(token * 2 / 2, abs=1e-6) and signals["probe/logit_gradient/turn_2"] == pytest.approx(token * 2**0.5, abs=1e-6)
    assert not [n for n in signals if n.startswith("probe/gap")] and all(v == v for v in signals.values())


def test_signals_of_nothing():
    "Failed rollouts and a probe that is off: fewer signals, no nan."
    seen = Probed(("<tool_call>",), torch.full((2, 1, 1), torch.nan), *(torch.full((2, 1), torch.nan) for _ in range(6)), *(torch.zeros(2, 1, dtype=torch.bool) for _ in range(2)))
    signals = step_signals([Trajectory([0], [], StopReason.FAILED)] * 2, seen, {"<tool_call>": 1})
    assert signals["probe/effective_batch"] == 0 and signals["probe/turns"] == 0 and all(v == v for v in signals.values()) and not [n for n in signals if "/tool_call/" in n]
    assert merge_signals([signals, {"probe/turns": 2.0}])["probe/turns"] == 1.0


# The seam

def test_the_kernel_takes_what_it_took():
    "TRL's fused head hands its kernel everything that the probe reads, in this order, and takes the squares as the third of its answers."
    assert list(inspect.signature(ChunkedLogProbFunction.forward).parameters) == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs"]
    source = inspect.getsource(add_fused_lm_head)
    assert "per_token = _ChunkedLogProbFunction.apply(" in source and "log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = per_token" in source
    assert "model(**model_inputs, labels=labels, fused_lm_head=True)" in inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
