"""Records in and out: other trainers' files, exports, and the tokens of a run under another checkpoint."""
import gzip
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trace_rows import make_row, make_run

from tirlab.all import PythonEnvironment, TIRConfig, TIRTrainer, answer_reward, make_tasks, tiny_policy
from tirlab.cli.main import main
from tirlab.plots.export import export_html
from tirlab.traces.imports import import_traces
from tirlab.eval.scores import score_run
from tirlab.traces.run import RunError, RunWriter, TraceRow, open_run
from tirlab.core.trajectory import without_nulls

DATA = Path(__file__).parents[1] / "data"


def right(completions, answer, **kwargs):
    return answer_reward(completions, answer)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "Two steps of training, recorded by us and, through `log_completions`, by TRL."
    folder = tmp_path_factory.mktemp("trained")
    args = TIRConfig(output_dir=str(folder / "out"), run_dir=str(folder / "run"), max_steps=2, per_device_train_batch_size=16, num_generations=8, max_completion_length=120, learning_rate=5e-3, temperature=0.7,
                     save_strategy="no", disable_tqdm=True, report_to="none", seed=0, advantage="grpo", log_completions=True, num_completions_to_print=0, logging_steps=1)
    trainer = TIRTrainer(tiny_policy(), right, args, make_tasks("arithmetic", n=8), environment_factory=PythonEnvironment)
    trainer.train()
    trainer.save_model(str(folder / "last"))
    trainer._tokenizer.save_pretrained(str(folder / "last"))
    return folder


def files(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


# -- scores

def test_the_checkpoint_that_sampled_gives_the_recorded_numbers(trained, tmp_path):
    run = open_run(shutil.copytree(trained / "run", tmp_path / "run"))
    score_run(run, tiny_policy(), "first")
    assert main(["trace", "score", str(run.path), "--model", str(trained / "last")]) == 0
    apart = {}
    for name in run.index().id:
        row = run.trajectory(name)
        first, last = run.scored("first", name), run.scored("last", name)
        known = ~np.isnan(row.logprob)
        assert first.dtype == np.float32 and len(first) == len(row.ids) and known.any() and not np.isnan(first[row.mask == 1]).any() and np.isnan(first[row.mask == 0]).all()
        if row.step == 1:
            np.testing.assert_allclose(first[known], row.logprob[known], atol=2e-5)      # the policy it began with, at the run's temperature
        apart.setdefault(row.step, []).append((np.abs(first - row.logprob)[known].max(), np.abs(first - last)[known].max()))
    assert max(a for a, _ in apart[2]) > 1e-2 and max(b for _, b in apart[1]) > 1e-2      # and not those of another
    assert set(run.scores()) == {"first", "last"} and run.scores()["last"]["scored"] == len(run.index()) and run.scores()["last"]["temperature"] == 0.7


def test_scoring_goes_on_where_it_was(trained, tmp_path, capsys):
    run = open_run(shutil.copytree(trained / "run", tmp_path / "run"))
    folder = score_run(run, tiny_policy(), "tiny")
    before = files(folder)
    first, second = sorted(folder.glob("*.parquet"))
    second.unlink()
    first.write_bytes(b"kept as it is")
    score_run(run, tiny_policy(), "tiny")
    assert second.read_bytes() == before[second.name] and first.read_bytes() == b"kept as it is"
    with pytest.raises(RunError, match="remove it and score again"):
        run.scored("tiny", run.index().id.iloc[0])
    assert main(["trace", "score", str(run.path), "--model", str(trained / "last"), "--name", "tiny"]) == 2 and "another name" in capsys.readouterr().err
    assert main(["trace", "score", str(run.path), "--model", str(tmp_path / "nowhere")]) == 2 and "there is no such folder" in capsys.readouterr().err


def test_other_tokens_are_refused(trained, tmp_path):
    run = open_run(trained / "run")
    row = run.trajectory(run.index().id.iloc[0])
    odd = {f: getattr(row, f) for f in ("id", "step", "mask", "turn", "prompt_ids", "prompt_text", "text")}
    for name, ids, says in (("beyond", row.ids + 100_000, "knows .* tokens, the run has number"), ("moved", row.ids[::-1].copy(), "score with a checkpoint that has the run's tokenizer")):
        writer = RunWriter(tmp_path / name, {})
        writer.append_index(writer.write_tokens(row.step, [TraceRow(**odd, ids=ids)]))
        with pytest.raises(RunError, match=says):
            score_run(open_run(tmp_path / name), tiny_policy(), "x")
        assert not (tmp_path / name / "scores").exists()


# -- imports

def test_what_trl_logged_of_the_same_rollouts(trained, tmp_path):
    "TRL's own files of a training that we recorded too: same steps, same rewards and advantages, same last words, and no numbers that TRL does not log."
    before = files(trained / "out")
    told = import_traces(trained / "out/completions", tmp_path / "run")
    assert files(trained / "out") == before
    ours, theirs, run = open_run(trained / "run").index(), open_run(tmp_path / "run").index(), open_run(tmp_path / "run")
    assert told == run.meta()["source"] and (told["format"], told["trajectories"], told["skipped"]) == ("trl", 32, 0)
    key = lambda index: sorted(zip(index.step, index.reward, index.mean_advantage.round(4), index.turns))
    assert key(ours) == key(theirs) and set(theirs.step) == {1, 2} and theirs.rewards.iloc[0].keys() == {"right"}
    assert 0 < theirs.calls.sum() <= ours.calls.sum()                    # TRL keeps no calls that it cannot parse
    assert theirs.groupby(["step", "group"]).size().tolist() == ours.groupby(["step", "group"]).size().tolist()
    assert theirs[["tokens", "model_tokens", "mean_logprob", "mean_entropy", "failed_calls", "tool_seconds", "scored_at"]].isna().all(axis=None)
    row = run.trajectory(theirs.id.iloc[0])
    assert (row.ids == -1).all() and np.isnan(row.logprob).all() and "".join(row.text).startswith("[assistant] ")
    assert run.status() == "finished" and run.metrics().reward.tolist() == pytest.approx(ours.groupby("step").reward.mean().tolist())


def prime(step, **changes):
    n = 8
    columns = {name: [None, None, -.1, -.2, None, -.3, -.4, None] for name in ("inference_logprobs", "trainer_logprobs", "entropy", "mismatch_kl", "importance_ratio")}
    return dict(schema_version=1, step=step, rank=1, micro_step=0, micro_sequence_idx=0, export_sequence_idx=0, env_name="adder", token_ids=list(range(30, 30 + n)), position_ids=list(range(n)),
                loss_mask=[False, False, True, True, False, True, True, False], advantages=[.5] * n, is_masked=[False] * n) | columns | changes


def test_token_exports_of_prime_rl(tmp_path):
    folder = tmp_path / "token_exports"
    for step in (10, 9):
        (folder / f"step_{step}").mkdir(parents=True)
        (folder / f"step_{step}/rank_1.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (prime(step), prime(step, token_ids=[31] * 8), prime(step, token_ids=[1]), {"step": step})))
        (folder / f"step_{step}/STABLE").touch()
    (folder / "step_10/rank_2.jsonl").write_text(json.dumps(prime(10, rank=2)) + '\n{"schema_version": 1, "st')   # still being written
    before = files(folder)
    assert main(["trace", "import", str(folder), "--out", str(tmp_path / "run"), "--tokenizer", str(tiny_policy())]) == 0
    run = open_run(tmp_path / "run")
    index = run.index()
    assert files(folder) == before and index.id.tolist() == ["000009-1-000", "000009-1-001", "000010-1-000", "000010-1-001", "000010-2-000"] and run.meta()["source"]["skipped"] == 4
    assert index[["reward", "calls", "failed_calls", "tool_seconds"]].isna().all(axis=None) and index.group.tolist() == [0, 1, 0, 1, 0]
    row = run.trajectory("000009-1-000")
    assert row.prompt_ids.tolist() == [30, 31] and row.mask.tolist() == [1, 1, 0, 1, 1, 0] and row.turn.tolist() == [0, 0, 0, 1, 1, 1] and row.environment == "adder"
    for column in (row.logprob, row.sampling_logprob, row.entropy):
        np.testing.assert_allclose(column.astype("float32"), [-.1, -.2, np.nan, -.3, -.4, np.nan], rtol=1e-3)
    assert "".join(row.text) != "" and not row.text[0].startswith("⟨")
    import_traces(folder / "step_9", tmp_path / "bare")
    assert open_run(tmp_path / "bare").trajectory("000009-1-000").text[0] == "⟨32⟩"


def test_traces_that_verifiers_wrote(tmp_path):
    "A file of verifiers 0.4's own writer: a trace with tokens, one with two branches, one without tokens (evaluation), and an episode that failed before it began."
    source = shutil.copytree(DATA / "verifiers", tmp_path / "source")
    shutil.copytree(source / "rollouts/step_42/train/all", source / "rollouts/step_42/train/effective")     # a part of the others, not read twice
    before = files(source)
    for name, tokenizer in (("words", None), ("tokens", str(tiny_policy()))):
        told = import_traces(source, tmp_path / name, tokenizer)
        assert (told["format"], told["trajectories"], told["skipped"]) == ("verifiers", 4, 1)
    assert files(source) == before
    for name in ("words", "tokens"):
        index = open_run(tmp_path / name).index()
        assert index.reward.tolist() == [1.0, 0.0, 0.0, 1.0] and set(index.step) == {42} and set(index.split) == {"train"} and set(index.environment) == {"adder"} and set(index.task) == {"sum-3"}
        assert set(index.stop) == {"agent_completed"} and index.turns.tolist() == [2] * 4 and index.calls.tolist() == [1] * 4 and index.group.nunique() == 1 and set(index.answer) == {"5"}
    words, tokens = open_run(tmp_path / "words"), open_run(tmp_path / "tokens")
    assert words.index().tokens.isna().all() and tokens.index().tokens.tolist()[:3] == [8, 8, 7] and np.isnan(tokens.index().tokens.iloc[3])
    row = tokens.trajectory("000042-0-001")
    np.testing.assert_allclose(row.sampling_logprob, [-.1, -.2, -.3, np.nan, np.nan, np.nan, -.4, -.5])
    np.testing.assert_allclose(row.logprob, [-.11, -.21, -.31, np.nan, np.nan, np.nan, -.4, -.5])
    assert row.ids.tolist() == [8, 9, 10, 11, 12, 13, 14, 15] and row.prompt_ids.tolist() == list(range(1, 8))
    unknown = words.trajectory("000042-0-000")
    assert unknown.failed_calls is None and np.isnan(unknown.tool_seconds) and unknown.calls == 1 and words.steps()[["failed_calls", "tool_seconds", "tokens"]].isna().all(axis=None)
    assert '[tool] 5' in "".join(words.trajectory("000042-0-000").text) and 'add({"a":2,"b":3})' in "".join(words.trajectory("000042-0-000").text)


def test_rollout_dumps_of_verl(tmp_path):
    folder = tmp_path / "dumps"
    folder.mkdir()
    for step in (2, 10):
        (folder / f"{step}.jsonl").write_text("".join(json.dumps(dict(input=f"user\nq{i // 2}", output="a\nb", gts="7", score=i % 2, step=step, acc=0.5, request_id="r", note="x")) + "\n" for i in range(4)))
    import_traces(folder, tmp_path / "run")
    run = open_run(tmp_path / "run")
    index = run.index()
    assert index.step.tolist() == [2] * 4 + [10] * 4 and index.reward.tolist() == [0, 1] * 4 and index.group.tolist() == [0, 0, 1, 1] * 2 and set(index.answer) == {"7"}
    assert index.rewards.iloc[0] == {"acc": 0.5} and index[["calls", "tokens"]].isna().all(axis=None)
    assert "".join(run.trajectory("000010-0-003").text) == "a\nb" and run.trajectory("000010-0-003").turn.tolist() == [0, 0]


@pytest.mark.parametrize("make, says", [
    (lambda p: None, "There is nothing at"),
    (lambda p: p.mkdir(), "holds no records that are known"),
    (lambda p: (p.mkdir(), (p / "completions_00001.parquet").write_bytes(b""), (p / "1.jsonl").write_text("")), "records of trl and verl"),
    (lambda p: (p.mkdir(), (p / "completions_00001.parquet").write_bytes(b"PAR1")), "Nothing in .* could be read"),
    (lambda p: (p.mkdir(), pq.write_table(pa.table({"x": [1]}), p / "completions_00001.parquet")), "Nothing in .* could be read"),
    (lambda p: (p.mkdir(), (p / "traces.jsonl").write_text('{"traces": [{"nodes": [{"message": 3}]}]}\n{"traces": 5}\n{"traces": [{"nodes": 7}]}\n')), "Nothing in .* could be read"),
    (lambda p: (p.mkdir(), (p / "rank_0.jsonl").write_bytes(b"\xff\x00\n" * 9)), "Nothing in .* could be read"),
])
def test_what_cannot_be_imported_is_a_sentence(tmp_path, capsys, make, says):
    make(tmp_path / "source")
    assert main(["trace", "import", str(tmp_path / "source"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(says, said) and said.endswith(".") and not (tmp_path / "run").exists()


def test_a_half_copied_file_hides_only_itself(trained, tmp_path):
    source = shutil.copytree(trained / "out/completions", tmp_path / "source")
    file = sorted(source.iterdir())[0]
    file.write_bytes(file.read_bytes()[:-100])
    told = import_traces(source, tmp_path / "run")
    assert told["unreadable"] == [file.name] and told["trajectories"] == 16 and len(open_run(tmp_path / "run").index()) == 16


# -- exports

class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


EVIL = ['<script>alert(1)</script>', '</span></section><img src=x onerror=alert(2)>', '<a href="javascript:alert(3)">', '" onmouseover="alert(4)', '\x1b]0;owned\x07', '\u202e', '\x00', '\ud800', "x"]


def test_a_page_that_stands_alone_and_runs_nothing(tmp_path, capsys):
    writer = RunWriter(tmp_path / "run", {"control_tokens": EVIL})
    n = len(EVIL)
    rows = [make_row(1, i, ids=range(n), text=[*EVIL[:-1], "x" * (1_000_000 if i == 3 else 1)], mask=[1] * n, turn=[0] * n, logprob=[-1.] * n, entropy=None, advantage=None, sampling_logprob=None, prompt_text=EVIL, answer=EVIL[1], stop=EVIL[0], turn_kinds=[EVIL[0]]) for i in range(4)]
    writer.append_index(writer.write_tokens(1, rows))
    assert main(["trace", "export", str(tmp_path / "run"), "--step", "1", "--group", "0", "--html", str(tmp_path / "group.html")]) == 0
    page = (tmp_path / "group.html").read_text()
    read = Reader()
    read.feed(page)
    assert not {"script", "img", "a", "iframe", "link", "object", "form"} & set(read.tags) and not [k for k, _ in read.attributes if k.startswith("on") or k in ("src", "href")]
    assert not re.search(r"url\(|@import|https?://", page) and "default-src 'none'" in page and sum(r.id in page for r in rows) == 4
    shown = "".join(read.text)
    assert "<script>alert(1)</script>" in shown and "\x1b" not in page and "\x00" not in page and "\u202e" not in page
    assert main(["trace", "show", str(tmp_path / "run"), rows[0].id]) == 0 and main(["trace", "show", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "\x1b]" not in printed and "\x07" not in printed and "\u202e" not in printed and "<script>alert(1)</script>" in printed


def test_a_datasets_folder_holds_every_column(trained, tmp_path):
    from datasets import load_from_disk
    assert main(["trace", "export", str(trained / "run"), "--datasets", str(tmp_path / "data")]) == 0
    run, back = open_run(trained / "run"), load_from_disk(tmp_path / "data")["train"]
    assert back["id"] == run.index().id.tolist()
    for name in ("000001-0-000", "000002-0-007"):
        row, entry = run.trajectory(name), back[back["id"].index(name)]
        assert entry["text"] == row.text and entry["rewards"] == [{"name": "right", "value": row.reward}] and entry["ids"] == row.ids.tolist()
        for column in ("logprob", "sampling_logprob", "entropy"):
            np.testing.assert_array_equal(np.array(entry[column], "float32"), getattr(row, column).astype("float32"))
        np.testing.assert_array_equal(np.array(entry["control"], "float32").reshape(row.control.shape), row.control.astype("float32"))


@pytest.mark.parametrize("words, says", [
    ("--html x.html", "Say what to export"), ("--id nobody --html x.html", "There is no trajectory nobody"), ("--step 1 --group 99 --html x.html", "There is no group 99"),
    ("", "Say where to"), ("--datasets .", "is not empty"), ("--id 000001-0-000 --metric beauty --html x.html", "There is no metric beauty"),
])
def test_what_cannot_be_exported_is_a_sentence(tmp_path, capsys, monkeypatch, words, says):
    make_run(tmp_path / "run", steps=1)
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "export", str(tmp_path / "run"), *words.split()]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "x.html").exists()


# -- what records of others look like in the wild

def jsonl(rows, end="\n"):
    return "\n".join(json.dumps(x) for x in rows) + end


def verl(i=0, **more):
    return dict(input=f"user\nq{i}", output="a b", gts="7", score=1.0, step=3) | more


ENCODINGS = {"as usual": lambda s: s.encode(), "no newline at the end": lambda s: s.rstrip("\n").encode(), "torn at the end": lambda s: (s + '{"input": "a", "outp').encode(), "BOM": lambda s: b"\xef\xbb\xbf" + s.encode(),
             "CRLF": lambda s: s.replace("\n", "\r\n").encode(), "UTF-16": lambda s: s.encode("utf-16"), "gz": lambda s: gzip.compress(s.encode()), "zst in frames": lambda s: frames(s.encode())}


def frames(data):
    "A seekable .zst file as prime-rl seals its chunks: frames, and one that is to be skipped."
    half, codec = len(data) // 2, pa.Codec("zstd")
    return b"".join(codec.compress(part, asbytes=True) for part in (data[:half], data[half:])) + b"\x5e\x2a\x4d\x18" + (9).to_bytes(4, "little") + b"seektable"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_file_is_read_to_its_last_line(tmp_path, encoding):
    suffix = {"gz": ".gz", "zst in frames": ".zst"}.get(encoding, "")
    (tmp_path / f"3.jsonl{suffix}").write_bytes(ENCODINGS[encoding](jsonl(verl(i) for i in range(3))))
    told = import_traces(tmp_path, tmp_path / "run")
    index = open_run(tmp_path / "run").index()
    assert (told["format"], told["trajectories"], told["skipped"]) == ("verl", 3, 0) and index.step.tolist() == [3] * 3 and index.reward.tolist() == [1.0] * 3 and index.last_turn.tolist() == ["a b"] * 3


def test_bytes_that_are_no_utf8_are_marked_and_nothing_else_is_lost(tmp_path):
    (tmp_path / "3.jsonl").write_bytes(jsonl([verl(output="caf#")]).encode().replace(b"#", b"\xe9") + jsonl([verl(output="x", extra="\ud83d")]).encode())
    assert import_traces(tmp_path, tmp_path / "run")["trajectories"] == 2
    run = open_run(tmp_path / "run")
    assert "".join(run.trajectory("000003-0-000").text) == "caf\ufffd" and run.skipped == 0 and "\ufffd" in run.trajectory("000003-0-001").notes


@pytest.mark.parametrize("field, value, reward, rewards, answer, notes", [
    ("gts", 2, 1.0, {}, "2", None), ("gts", [2, 3], 1.0, {}, "[2, 3]", None), ("gts", None, 1.0, {}, None, None), ("gts", "007", 1.0, {}, "007", None),
    ("score", "0.5", 0.5, {}, "7", None), ("score", -math.inf, -math.inf, {}, "7", None), ("score", True, 1.0, {}, "7", None), ("score", None, None, {}, "7", None), ("score", 10**400, math.inf, {}, "7", None),
    ("acc", 1, 1.0, {"acc": 1.0}, "7", None), ("acc", True, 1.0, {"acc": 1.0}, "7", None), ("acc", "0.5", 1.0, {"acc": 0.5}, "7", None), ("length", 12, 1.0, {"length": 12.0}, "7", None),
    ("pred", "42", 1.0, {}, "7", '{"pred": "42"}'), ("request_id", "r", 1.0, {}, "7", '{"request_id": "r"}'), ("info", {"a": [1]}, 1.0, {}, "7", '{"info": {"a": [1]}}'),
    ("step", "4", 1.0, {}, "7", None), ("step", 10**30, 1.0, {}, "7", None)])
def test_every_field_of_a_record_is_kept(tmp_path, field, value, reward, rewards, answer, notes):
    (tmp_path / "3.jsonl").write_text(jsonl([verl(**{field: value})]))
    import_traces(tmp_path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    line, row = run.index().iloc[0], run.trajectory(run.index().id.iloc[0])
    same = lambda a, b: a == b or (a is None or a != a) and (b is None or b != b)
    assert same(line.reward, reward) and same(row.reward, reward) and row.rewards == rewards and row.answer == answer and row.notes == notes and line.step == (4 if value == "4" else 3)


def test_a_table_of_trl_with_every_kind_of_column(tmp_path):
    call = lambda name, **arguments: [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}]
    rows = [dict(step=1, prompt="q", completion=call("add", a=1, b=2), right=1.0, advantage=.5, answer=7, done=True, pred="x", my_score="0.25"),
            dict(step=1, prompt="q", completion=call("weather", city="Rome"), right=None, advantage=-.5, answer=8, done=False, pred=None, my_score="bad")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "completions_00001.parquet")
    import_traces(tmp_path, tmp_path / "run")
    one, two = map(open_run(tmp_path / "run").trajectory, ("000001-0-000", "000001-0-001"))
    assert "".join(one.text).strip() == '[assistant] add({"a": 1, "b": 2})' and "".join(two.text).strip() == '[assistant] weather({"city": "Rome"})'
    assert one.rewards == {"right": 1.0, "done": 1.0, "my_score": 0.25} and two.rewards == {"right": None, "done": 0.0} and (one.answer, two.answer) == ("7", "8")
    assert json.loads(one.notes) == {"pred": "x"} and json.loads(two.notes) == {"my_score": "bad"}


def test_arguments_of_a_table_are_those_that_were_given():
    from datasets import Dataset
    call = lambda name, arguments: {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}
    rows = [{"prompt": [{"role": "user", "content": "q"}, call("f", {"a": 1}), call("g", {"b": {"c": [{"d": 1}, {"e": 2}]}}), call("h", {})]}]
    back = Dataset.from_list(rows)[0]["prompt"]
    given = [m["tool_calls"][0]["function"]["arguments"] for m in without_nulls(back)[1:]]
    assert given == [{"a": 1}, {"b": {"c": [{"d": 1}, {"e": 2}]}}, {}] and "b" in back[1]["tool_calls"][0]["function"]["arguments"]
    odd = ["text", {"role": "user", "content": None}, {"role": "assistant", "tool_calls": ["x", {"name": "f", "arguments": '{"a": null}'}]}, {"tool_calls": None}]
    assert without_nulls(odd) == odd


NODES = [dict(message=dict(role="user", content="2+3?"), parent=None, sampled=False, token_ids=[1, 2], mask=[False, False]),
         dict(message=dict(role="assistant", content="5"), parent=0, sampled=True, token_ids=[3, 4], mask=[False, True], logprobs=[-.5]),
         dict(message=dict(role="assistant", content="6"), parent=0, sampled=True, token_ids=[3, 5], mask=[False, True], logprobs=[-math.inf])]


def episode(id, step, kind="train"):
    return dict(id=id, env={"id": "adder"}, run={"type": kind, "work": {"type": kind, "step": step}}, traces=[dict(id=f"{id}-t", nodes=NODES, rewards={"right": {"score": 1.0, "weight": None}}, metrics={"length": 2}, stop_condition="done")])


@pytest.mark.parametrize("layout", ["stream.jsonl", "stream/", "step"])
def test_the_layouts_of_prime_rl(tmp_path, layout):
    "Episodes in one stream, in chunks of it, or in a folder a step; what was learnt later is beside them, and is put where it belongs. Indices and unfinished traces are none."
    base = tmp_path / "out" / ("rollouts/step_7/train" if layout == "step" else "monitors/file/traces")
    for folder in ("annotations", "live", "stream"): (base / folder).mkdir(parents=True)
    episodes = [episode("a", 7), episode("b", 8, "eval"), episode("c", 7)]
    if layout == "stream.jsonl":
        (base / "stream.jsonl").write_text(jsonl(episodes))
        (base / "index.jsonl").write_text(jsonl({"line": i, "offset": 0} for i in range(3)))
    elif layout == "stream/":
        (base / "stream/00000.jsonl.zst").write_bytes(frames(jsonl(episodes[:2]).encode()))
        (base / "stream/00001.jsonl").write_text(jsonl(episodes[2:]))
        (base / "stream/00001.jsonl.zst").write_bytes(b"being sealed")
        (base / "stream.index.jsonl").write_text(jsonl([{"line": 1, "chunk": 0, "offset": 0}]))
    else:
        (base / "traces.jsonl").write_text(jsonl(episodes))
    (base / "live/x.jsonl").write_text('{"trace": "x"}\n')
    first = [dict(version=1, trace_id="a-t", info={"train": {"effective": True}}, branches=[dict(index=0, advantages=[None, None, None, .5]), dict(index=1, advantages=[None, None, None, -.5])])]
    later = [dict(version=1, trace_id="a-t", info={"train": {"trained": 8}}, branches=[dict(index=1, trainer_logprobs=[None, None, None, -2.0], entropies=[None, None, None, .25]), dict(index=9, advantages=[1])][:1]), {"trace_id": 3}]
    for name, updates in (("orchestrator", first), ("trainer", later)):
        place = base / f"annotations/{name}.jsonl" if layout != "stream/" else base / f"annotations/{name}/00000.jsonl"
        place.parent.mkdir(exist_ok=True)
        place.write_text(jsonl(updates))
        (base / f"annotations/{name}.index.jsonl").write_text(jsonl([{"trace_id": "a-t", "chunk": 0, "offset": 0, "info": {}}]))
    told = import_traces(tmp_path / "out", tmp_path / "run", str(tiny_policy()))
    run = open_run(tmp_path / "run")
    index = run.index()
    assert (told["format"], told["trajectories"], told["skipped"], told["unreadable"]) == ("verifiers", 6, 0, [])
    assert sorted(zip(index.split, index.step)) == [("eval", 8)] * 2 + [("train", 7)] * 4 and set(index.environment) == {"adder"} and set(index.reward) == {1.0}
    one, two = map(run.trajectory, ("000007-0-000", "000007-0-001"))
    assert one.advantage.tolist() == [.5] and two.advantage.tolist() == [-.5] and two.logprob.tolist() == [-2] and two.entropy.tolist() == [.25] and np.isnan(one.logprob).all()
    assert two.sampling_logprob.tolist() == [-math.inf] and json.loads(one.notes) == {"metrics": {"length": 2}, "info": {"train": {"effective": True, "trained": 8}}}


def result(i, **more):
    return dict(example_id=i // 2, prompt=[{"role": "user", "content": f"q{i // 2}"}], answer="5", reward=float(i % 2), metrics={"right": float(i % 2), "length": 3}, right=float(i % 2), length=3,
                completion=[{"role": "assistant", "content": None, "tool_calls": [json.dumps({"id": "x", "name": "add", "arguments": '{"a": 2}'})]}, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "It is 5."}],
                info={"level": 2}, stop_condition="answered", is_completed=True, is_truncated=False, error=None) | more


def test_results_of_vf_eval(tmp_path):
    folder = tmp_path / "outputs/evals/adder--m/1f2e"
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text(jsonl([result(0), result(1), result(2, completion="Five.", stop_condition=None, is_truncated=True), {"x": 1}, result(3)], end=""))
    (folder / "metadata.json").write_text('{"env_id": "adder", "model": "m"}')
    told = import_traces(tmp_path / "outputs", tmp_path / "run")
    run = open_run(tmp_path / "run")
    index = run.index()
    assert (told["format"], told["trajectories"], told["skipped"]) == ("vf-eval", 4, 1)
    assert index.reward.tolist() == [0, 1, 0, 1] and index.group.tolist() == [0, 0, 1, 1] and set(index.environment) == {"adder"} and set(index.split) == {"eval"} and index.stop.tolist() == ["answered", "answered", "length", "answered"]
    assert index.calls.fillna(-1).tolist() == [1, 1, -1, 1] and index.turns.tolist() == [2, 2, 1, 2] and index.rewards.iloc[1]["right"] == 1.0 and set(index.answer) == {"5"}
    row = run.trajectory(index.id.iloc[1])
    assert 'add({"a": 2})' in "".join(row.text) and json.loads(row.notes) == {"info": {"level": 2}}


@pytest.mark.parametrize("kind, lines", {"verl": [verl()], "vf-eval": [result(0)], "verifiers": [episode("a", 7)], "prime-rl": [prime(3)]}.items())
def test_a_file_of_another_name_is_known_by_its_content(tmp_path, kind, lines):
    (tmp_path / "mine.jsonl").write_text(jsonl(lines))
    assert import_traces(tmp_path / "mine.jsonl", tmp_path / "run")["format"] == kind and len(open_run(tmp_path / "run").index()) >= 1


def test_an_import_cannot_be_scored_and_says_so(tmp_path, capsys):
    (tmp_path / "3.jsonl").write_text(jsonl([verl()]))
    import_traces(tmp_path, tmp_path / "run")
    assert main(["trace", "score", str(tmp_path / "run"), "--model", str(tiny_policy())]) == 2
    assert "holds words, not the tokens of a model" in capsys.readouterr().err and not (tmp_path / "run/scores").exists()


def test_an_import_has_words_and_not_tokens(tmp_path, capsys):
    (tmp_path / "3.jsonl").write_text(jsonl([verl(pred="42")]))
    import_traces(tmp_path, tmp_path / "run")
    run = open_run(tmp_path / "run")
    export_html(run, tmp_path / "page.html", id=run.index().id.iloc[0])
    page = (tmp_path / "page.html").read_text()
    assert "2 words" in page and "token" not in re.sub(r"<style>.*?</style>", "", page, flags=re.S)
    assert main(["trace", "show", str(tmp_path / "run"), run.index().id.iloc[0]]) == 0
    out = capsys.readouterr().out
    assert '{"pred": "42"}' in out and "token" not in out
