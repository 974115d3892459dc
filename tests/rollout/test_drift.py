"""Token in, token out: every chat template that TRL ships, on two kinds of tokenizer; and masks that are wrong are found."""

import json
import random
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import trl.chat_template_utils as trl_templates
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tirlab.rollout import scripted
from tirlab.rollout.drift import MaskError, assert_masks, drift_check, drift_check_model, loss_tensors, usable_format
from tirlab.rollout.scripted import play, respell, scripts
from tirlab.core.formats import ChatFormat, make_format
from tirlab.core.tiny import tiny_policy
from tirlab.core.trajectory import StopReason, Trajectory, Turn, TurnKind

TEMPLATES = Path(trl_templates.__file__).parent / "chat_templates"
NO_TOOLS = "The chat template of this tokenizer cannot render tool calls and their answers; write them as text, e.g. call_format='json', or pass another chat_template=."
NO_PARSER = "How this tokenizer writes calls is not known to TRL; set tokenizer.response_template, or write them as text, e.g. call_format='json'."
NO_TEXT = "The chat template of this tokenizer cannot render a conversation of plain text; pass another one as chat_template=."
NO_PREFIX = "renders earlier messages anew when an answer follows"
REPAIRED = "passes with TRL's training template"

OUTCOME = {   # what becomes of each template TRL ships, with its own calls
    **dict.fromkeys("""gemma4 gemma4_v2 gemma4_v3 gemma4_v4 gemma4_v5 glm4moe glm4moe_training gptoss gptoss_training
        lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl lfm2_v2 lfm2_v2_training llama3_1 llama3_2
        nemotron_3_5_lightning nemotron_3_5_lightning_training nemotron_3_nano nemotron_3_nano_training
        nemotron_3_super nemotron_3_super_training nemotron_3_ultra nemotron_3_ultra_training
        qwen2_5 qwen2_5_training qwen3_5_nothink qwen3_5_nothink_training qwen3_5_think qwen3_5_think_training
        qwen3_6 qwen3_6_training qwen3_8 qwen3_8_training qwen3_instruct_2507 qwen3_instruct_2507_training
        qwen3_training qwen3_vl qwen3_vl_training""".split(), "passes"),
    "qwen3": REPAIRED,
    **dict.fromkeys("""cohere cohere_training cohere2 cohere2_training deepseek_r1_distill deepseek_r1_distill_training
        gemma gemma_training gemma3 gemma3_training idefics3 idefics3_training lfm2 lfm2_training llama3 llama3_training
        llava_next llava_next_training phi3 phi3_training phi3_5 phi3_5_training
        qwen2_5_vl qwen2_5_vl_training smolvlm smolvlm_training""".split(), NO_TOOLS),
    **dict.fromkeys("""deepseekv3 deepseekv3_training diffusion_gemma diffusion_gemma_training
        muse_glimmer muse_glimmer_training""".split(), NO_PARSER),
}
AS_TEXT = {   # what becomes of them with calls as plain text; the others pass
    **dict.fromkeys("llava_next llava_next_training".split(), NO_TEXT),
}
ENDS = {   # family -> tokens that end a turn, the tokenizer's first; ChatML's for the rest
    "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek": ["<｜end▁of▁sentence｜>"], "diffusion_gemma": ["<turn|>"], "gemma": ["<end_of_turn>"],
    "gemma4": ["<eos>", "<turn|>", "<|tool_response>"], "glm4moe": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"], "idefics3": ["<end_of_utterance>"], "llama3": ["<|eot_id|>"], "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>"], "phi3": ["<|end|>"], "smolvlm": ["<end_of_utterance>"], "": ["<|im_end|>"],
}
TAGS = """<|im_start|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <|assistant|> <|system|> <arg_key> </arg_key> <arg_value>
    </arg_value> <|turn> <|tool> <tool|> <|tool_call> <tool_call|> <tool_response|> <|channel> <channel|> <|start|> <|message|> <|channel|> <|end|>
    <|start_header_id|> <|end_header_id|> <|python_tag|> <|tool_call_start|> <|tool_call_end|> <|tool_response_start|> <|tool_response_end|>""".split()


def ends_of(name): return ENDS[max((f for f in ENDS if name.startswith(f)), key=len)]


@cache
def trained(kind):
    "A tokenizer trained on the spot, as JSON: byte-level BPE with merges, or as SentencePiece does it, with a space in front and bytes for what is unknown."
    corpus = [f.read_text() for f in sorted(TEMPLATES.glob("qwen*.jinja"))] + ["The answer is 85. I will add them up. print(37+48)"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
    t = Tokenizer(models.BPE(**{} if kind == "bytes" else {"unk_token": "<unk>"}))
    if kind == "bytes": t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    else: t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    t.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    if kind == "bytes": return t.to_str()
    state = json.loads(t.to_str())
    for token in ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]: state["model"]["vocab"].setdefault(token, len(state["model"]["vocab"]))
    state["model"] |= {"byte_fallback": True, "fuse_unk": True}
    t = Tokenizer.from_str(json.dumps(state))
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return t.to_str()


def tokenizer(name, kind="bytes"):
    "A tokenizer with a template of TRL's, its tokens, and the response template that TRL knows for it or for what it repairs."
    ends = ends_of(name)
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained(kind)), eos_token=ends[0], pad_token="<pad>", bos_token="<s>")
    tok.add_tokens([AddedToken(e, special=True, normalized=False) for e in ends[1:]])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS if t not in ends])
    for stem in (name.removesuffix("_training"), name):
        tok.chat_template = (TEMPLATES / f"{stem}.jinja").read_text()
        if OUTCOME[stem] in ("passes", REPAIRED) and tok.response_template is None: trl_templates.add_response_schema(tok)
    return tok


def usable(name, kind="bytes", call_format=None):
    tok = tokenizer(name, kind)
    return usable_format(tok, call_format, tok.convert_tokens_to_ids(ends_of(name)))


@cache
def report_of(name, kind="bytes"):
    "What the check finds with a template's own calls; of the other tokenizer, where a spelling may change something."
    talks = scripts(ends_of(name)[0])
    if kind == "pieces": talks = {n: talks[n] for n in ("text first", "spaces", "unicode", "written out")}
    return drift_check(usable(name, kind), talks), 2 * len(talks)


def test_the_table_names_every_template_that_trl_ships():
    assert sorted(OUTCOME) == sorted(f.stem for f in TEMPLATES.glob("*.jinja"))
    count = lambda outcome: sum(o == outcome for o in OUTCOME.values())
    assert (count("passes"), count(REPAIRED), count(NO_TOOLS), count(NO_PARSER)) == (39, 1, 26, 6)


def test_the_two_tokenizers_spell_differently():
    texts = [tokenizer("qwen2_5", kind).convert_ids_to_tokens(tokenizer("qwen2_5", kind).encode("an 日", add_special_tokens=False)) for kind in ("bytes", "pieces")]
    assert texts == [["an", "Ġ", "æ", "Ĺ", "¥"], ["▁an", "▁", "<0xE6>", "<0x97>", "<0xA5>"]]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("name", OUTCOME)
def test_template(name, kind):
    if OUTCOME[name] in (NO_TOOLS, NO_PARSER):
        with pytest.raises(ValueError) as e: usable(name, kind)
        assert str(e.value) == OUTCOME[name]
        return
    format = usable(name, kind)
    assert (format.chat_template is not None) == (OUTCOME[name] == REPAIRED)
    report, rows = report_of(name, kind)
    assert report.ok, str(report)
    assert len(report.rows) == rows - 2 * any("Skipped" in n for n in report.notes)
    own, other = ([r for r in report.rows if r.spelling == s] for s in ("own", "other"))
    assert all(r.encoded.tokens > 0 for r in other), "another spelling must be seen as drift where text is encoded again"
    assert all(r.rendered.tokens >= 1 for r in other)
    assert sum(r.encoded.tokens for r in own) < sum(r.encoded.tokens for r in other) / 3


@pytest.mark.parametrize("name", ["gptoss", "llama3_1"])
def test_templates_of_one_call_say_so(name):
    assert [n.split(",")[0] for n in report_of(name)[0].notes] == ["two calls: Skipped"]


def test_what_is_odd_is_noted():
    notes = {name: " ".join(report_of(name)[0].notes) for name in ("qwen2_5", "qwen3_5_think", "glm4moe", "lfm2_v2")}
    assert notes["qwen2_5"] == ""
    assert notes["qwen3_5_think"] == notes["lfm2_v2"] == ""     # spaces at the ends of a text, a quote inside a quote
    assert notes["glm4moe"] == ""     # <|observation|> ends a turn and begins the tool's answer: it stands there once


# --- templates and checkpoints that must be refused

def test_a_template_that_renders_anew_is_refused_with_the_repair_named():
    with pytest.raises(ValueError, match="get_training_chat_template"): drift_check(ChatFormat(tokenizer("qwen3")))


def saved(folder, tok, ends=None):
    tok.save_pretrained(folder)
    if ends: GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_by_name(tmp_path):
    tok = tokenizer("qwen3")
    tok.response_template = None
    report = drift_check_model(saved(tmp_path, tok, [tok.eos_token_id, 5]))
    assert report.ok and report.notes[0].endswith("TRL's training template was used, as TRL does.")
    assert str(report).splitlines()[-1] == "ok: the loss sees the tokens that were sampled, all of them and no others."
    assert report.total("encoded") > 100 and report.total("in_loss") < report.total("tokens")


def test_ends_come_from_the_generation_config(tmp_path):
    tok = tokenizer("glm4moe")
    report = drift_check_model(saved(tmp_path, tok, tok.convert_tokens_to_ids(ends_of("glm4moe"))))
    assert report.ok and not report.notes


@pytest.mark.parametrize("change, sentence", [
    (dict(chat_template=None), "has no chat template; use its instruct version, or pass chat_template=."),
    (dict(eos_token=None), "has no end-of-turn token; set tokenizer.eos_token to what its chat template ends a turn with."),
    (dict(chat_template="{{ messages[0].content }}"), "cannot render tool calls and their answers; write them as text, e.g. call_format='json'"),
    (dict(response_template=None, chat_template=Path(TEMPLATES / "qwen2_5.jinja").read_text() + " "), "is not known to TRL"),
    (dict(chat_template="{{ messages | length }}" + Path(TEMPLATES / "qwen2_5.jinja").read_text()), "TRL has no repair for it; pass a prefix-preserving one as chat_template=."),
])
def test_refusals_are_one_sentence(tmp_path, change, sentence):
    tok = tokenizer("qwen2_5")
    for k, v in change.items(): setattr(tok, k, v)
    with pytest.raises(ValueError) as e: drift_check_model(saved(tmp_path, tok))
    assert sentence in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"): drift_check_model(str(tmp_path))
    with pytest.raises(ValueError, match="yaml"): drift_check_model(tiny_policy(), "yaml")


# --- calls as text

@pytest.mark.parametrize("kind", ["bytes", "pieces"])
@pytest.mark.parametrize("call_format", ["json", "xml", "fenced", "list"])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama3"])
def test_calls_as_text(name, call_format, kind):
    report = drift_check(usable(name, kind, call_format))
    assert report.ok, str(report)
    assert report.total("encoded") > 30


@pytest.mark.parametrize("name", OUTCOME)
def test_template_with_calls_as_text(name):
    if name not in AS_TEXT:
        assert drift_check(usable(name, call_format="json"), {"two calls": scripts(ends_of(name)[0])["two calls"]}).ok
        return
    with pytest.raises(ValueError) as e: usable(name, call_format="json")
    assert AS_TEXT[name] in str(e.value)


# --- the check itself can fail

def rolled(change):
    "tirlab's rollout, with a trajectory that was tampered with afterwards."
    original = scripted.rollout
    async def tampered(*args): return change(await original(*args), args[3])
    return tampered


def test_a_rollout_that_encodes_again_is_found(monkeypatch):
    def encode_again(t, format):
        tok = format.tokenizer
        return replace(t, turns=[replace(n, ids=tok.encode(tok.decode(n.ids).strip(), add_special_tokens=False)) for n in t.turns])
    format = usable("qwen2_5")
    honest = drift_check(format)
    monkeypatch.setattr(scripted, "rollout", rolled(encode_again))
    report = drift_check(format)
    assert not report.ok and "ok:" not in str(report)
    drifted = {(r.name, r.spelling) for r in honest.rows if r.encoded.tokens}
    assert {tuple(p.split(" spelling:")[0].split(", ")) for p in report.problems} == drifted and len(drifted) == 10
    assert all("tokens are not those that were sampled" in p or "mask is not 1 exactly" in p for p in report.problems)


def test_a_wrong_mask_in_the_trajectory_is_found(monkeypatch):
    def late(t, format):
        first = t.turns[0]
        return replace(t, turns=[replace(first, ids=first.ids[:-1], observation_ids=first.ids[-1:] + first.observation_ids)] + t.turns[1:])
    monkeypatch.setattr(scripted, "rollout", rolled(late))
    report = drift_check(usable("qwen2_5"), {"one call": scripts("<|im_end|>")["one call"]})
    assert len(report.problems) == 2 and all("mask is not 1 exactly" in p for p in report.problems)


def test_a_parser_that_does_not_fit_is_found():
    tok = tokenizer("qwen2_5")
    tok.response_template = tokenizer("qwen3_5_think").response_template
    report = drift_check(make_format(None, tok, []), {"one call": scripts("<|im_end|>")["one call"]})
    assert not report.ok and "1 calls were written and 0 read" in report.problems[0]


def test_nothing_played_is_not_ok():
    two = {"two calls": scripts("<|eot_id|>")["two calls"]}
    assert drift_check(usable("llama3_1"), two).problems == ["No script could be played."]


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_respelling_keeps_the_text_and_special_tokens(kind):
    tok, changed = tokenizer("qwen2_5", kind), 0
    for seed in range(20):
        ids = tok.encode("The answer is naïve 日本 🙂, print(37+48)<|im_end|>\n", add_special_tokens=False)
        other = respell(tok, ids, random.Random(seed))
        assert tok.decode(other) == tok.decode(ids) and other.count(tok.eos_token_id) == 1
        changed += other != ids
    assert changed == 20


# --- assert_masks

END = 9


@pytest.fixture
def batch():
    "Rows: two calls and an answer; an answer at once; cut off by the limit; failed."
    turn = lambda ids, observed=(): Turn(list(ids), {}, TurnKind.RESPONSE, observation_ids=list(observed))
    rollouts = [Trajectory([1], [turn([2, 3, END], [4, 5]), turn([6, END], [4]), turn([7, END])], StopReason.ANSWER),
                Trajectory([1], [turn([8, END])], StopReason.ANSWER), Trajectory([1], [turn([2, END], [4]), turn([6, 6])], StopReason.LENGTH),
                Trajectory([1], [], StopReason.FAILED)]
    return rollouts, *loss_tensors(rollouts, 0)


def checked(batch, ids=None, there=None, wrote=None):
    t, i, c, w = batch
    assert_masks(t, i if ids is None else ids, c if there is None else there, w if wrote is None else wrote, [END], str)


def test_a_right_batch_passes(batch):
    checked(batch)
    rollouts, ids, there, wrote = batch
    assert (there * wrote).sum(1).tolist() == [7, 2, 4, 0] and ids.shape == (4, 10)
    assert_masks(rollouts[1:2], ids[1:2], there[1:2], None, [END], str)
    assert_masks([], ids[:0], there[:0], None, [END], str)
    checked(batch, there=there.bool(), wrote=wrote.bool())


@pytest.mark.parametrize("row, at, value, sentence", [
    (0, 0, 0, "Row 0: token 0, '2', belongs to turn 0 and is not in the loss."),
    (0, 2, 0, "Row 0: token 2, '9', ends turn 0 and is not in the loss."),
    (0, 9, 0, "Row 0: token 9, '9', ends turn 2 and is not in the loss."),
    (0, 7, 1, "Row 0: token 7, '4', is an observation and is in the loss."),
    (1, 2, 1, "Row 1: token 2, '0', is padding and is in the loss."),
    (3, 0, 1, "Row 3: token 0, '0', is padding and is in the loss."),
])
def test_one_wrong_position_is_named(batch, row, at, value, sentence):
    wrong = (batch[2] * batch[3]).clone()
    wrong[row, at] = value
    with pytest.raises(MaskError) as e: checked(batch, there=torch.ones_like(wrong), wrote=wrong)
    assert str(e.value) == sentence


def test_every_wrong_position_is_found(batch):
    loss = batch[2] * batch[3]
    for row in range(loss.shape[0]):
        for at in range(loss.shape[1]):
            wrong = loss.clone()
            wrong[row, at] = 1 - wrong[row, at]
            with pytest.raises(MaskError, match=f"Row {row}: token {at},"): checked(batch, there=torch.ones_like(wrong), wrote=wrong)


def test_inverted_shifted_and_missing_masks(batch):
    _, ids, there, wrote = batch
    for wrong in (1 - wrote, wrote.roll(1, 1), torch.ones_like(wrote), torch.zeros_like(wrote)):
        with pytest.raises(MaskError, match="Row 0"): checked(batch, wrote=wrong)


def test_wrong_tokens_and_rows(batch):
    rollouts, ids, there, wrote = batch
    changed = ids.clone()
    changed[2, 2] = 5    # an observation, which no mask would show
    with pytest.raises(MaskError, match="Row 2: token 2 is '5' where '4' was sampled"): checked(batch, ids=changed)
    with pytest.raises(MaskError, match="Row 0: only 9 of 10 tokens are there"): assert_masks(rollouts, ids[:, :9], there[:, :9], wrote[:, :9], [END], str)
    with pytest.raises(MaskError, match="The batch has 4 rows for 3 rollouts"): assert_masks(rollouts[1:], ids, there, wrote, [END], str)
    with pytest.raises(MaskError, match="Row 0"): assert_masks(rollouts[::-1], ids.flip(0).roll(1, 0), there, wrote, [END], str)


def test_truncated_rows_may_be_left_out_as_a_whole_others_not(batch):
    there = batch[2].clone()
    there[2] = 0
    checked(batch, there=there)
    there[1] = 0
    with pytest.raises(MaskError, match="Row 1"): checked(batch, there=there)


def test_an_answer_needs_an_end():
    t = [Trajectory([1], [Turn([2, 3], {}, TurnKind.RESPONSE)], StopReason.ANSWER)]
    with pytest.raises(MaskError, match="'3', which is no end-of-turn token"): assert_masks(t, *loss_tensors(t, 0), [END], str)
    assert issubclass(MaskError, ValueError)


def test_the_samplers_record_is_kept_apart_from_the_trajectory():
    played = play(usable("qwen2_5"), scripts("<|im_end|>")["two calls"], random.Random(3))
    assert played.ids == played.trajectory.completion_ids and played.mask == played.trajectory.mask and sum(played.mask) < len(played.mask)
