"""Run folders that are odd and not damaged: rows of an older version, texts that are empty or no UTF-8, no turns, words nobody knows, ids twice. Every reader reads them."""
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_app import PAGES, app
from trace_rows import CONTROL, make_row, make_run

from tirlab.traces.annotations import bookmark, config_diff, read_bookmarks
from tirlab.plots.export import export_dataset, export_html
from tirlab.plots.groups import prompts, rollout_html
from tirlab.traces.rows import SCHEMA, write_scored
from tirlab.traces.search import control_spikes, find, search_parts
from tirlab.traces.terminal import overview, shown
from tirlab.traces.run import TraceRow, open_run

NOTHING = dict(ids=[], text=[], mask=[], turn=[])
HALF = "half \ud83d"
ROWS = {
    "no tokens": lambda: TraceRow(id="a", step=4, **NOTHING), "no turns": lambda: TraceRow(id="a", step=4, **NOTHING, prompt_ids=[1], prompt_text=["q"], stop="failed"),
    "empty texts": lambda: TraceRow(id="a", step=4, ids=[1, 2], text=["", ""], mask=[1, 0], turn=[0, 0], prompt_ids=[1], prompt_text=[""], answer="", stop="", task="", environment="", dropped="", turn_kinds=[""]),
    "unknown words": lambda: make_row(4, 0, id="a", stop="out of luck", origin="a dream", phase="dpo", turn_kinds=["sung", "whistled", "hummed", "x"], dropped="bad weather", split="holdout"),
    "lone surrogates": lambda: make_row(4, 0, id="a", answer=HALF, stop=HALF, task=HALF, hint=HALF, dropped=HALF, environment=HALF, origin=HALF, notes=HALF, turn_kinds=[HALF], rewards={HALF: 1.0}),
    "no group of its own": lambda: make_row(4, 0, id="a", group=-1), "turns that nobody counted": lambda: make_row(4, 0, id="a", turn_kinds=[], turn_rewards=[], turn_advantages=[]),
    "only observations": lambda: TraceRow(id="a", step=4, ids=[1, 2], text=["x", "y"], mask=[0, 0], turn=[0, 0], stop="context"),
    "no numbers": lambda: make_row(4, 0, id="a", reward=None, rewards=None, logprob=None, entropy=None, advantage=None, sampling_logprob=None, calls=None, failed_calls=None, scored_at=None),
}


def odd_run(path, row):
    "A run whose last step holds the row twice: the later one counts."
    writer = make_run(path, steps=3, status="running")
    writer.append_index(writer.write_tokens(4, [make_row(4, 1), make_row(4, 0, id=row.id, split=row.split)]))
    writer._last = None, set()
    writer.append_index(writer.write_tokens(4, [row], row.split if row.split == "eval" else "train"))
    writer.close()
    return open_run(path)


def as_older(path):
    "The newest token file as a version wrote it that knew fewer columns, and an index without their lines."
    kept = [n for n in SCHEMA.names if n not in ("origin", "hint", "task", "dropped", "environment", "surprise", "sampling_logprob", "control", "iteration", "phase", "notes", "scored_at")]
    for file in path.glob("tokens/*.parquet"):
        pq.write_table(pq.read_table(file).select(kept).append_column("from the future", pa.nulls(pq.read_metadata(file).num_rows)), file)
    lines = [json.loads(x) for x in (path / "index.jsonl").read_text().splitlines()]
    (path / "index.jsonl").write_text("".join(json.dumps({k: v for k, v in x.items() if k in (*kept, "file", "row", "prompt", "last_turn", "turns", "tokens", "model_tokens")} | {"new": [1]}) + "\n" for x in lines))
    (path / "steps.jsonl").unlink()


def read_everything(run, folder, id):
    "What pages, terminal, search and exports do."
    index, steps, out = run.index(), run.steps(), io.StringIO()
    row = run.trajectory(id)
    (run.path / "scores/last").mkdir(parents=True)
    write_scored(run.path / "scores/last" / index[index.id == id].file.iloc[0], [id], [np.full(len(row.ids), -.5)])
    (run.path / "scores/last/scores.json").write_text('{"model": "m"}')
    assert len(run.scored("last", id)) == len(row.ids)
    console = Console(file=out, width=180)
    console.print(shown(row)), console.print(overview(run))
    out.getvalue().encode()
    export_html(run, folder / "page.html", id=id)
    assert export_dataset(run, folder / "data").get("unreadable") is None
    table = prompts(index[index.step == 4])
    assert len(table) and index.id.is_unique and run.skipped == 0 and steps.trajectories.sum() == len(index)
    rollout_html(row, run.trajectory(index.id.iloc[0]))
    find(index, text="no such text", kinds=["response"], failed=True, stop=["answer"])
    found = list(search_parts(run, ".", regex=True, rows=find(index, steps=(4, 4))))
    assert not any(part.unreadable for part in found) and len(repr(run).splitlines()) <= 20 and len(repr(row).splitlines()) <= 20 and isinstance(control_spikes(steps, CONTROL), pd.DataFrame)
    bookmark(run.path, id, HALF)
    assert read_bookmarks(run.path)[id]["note"] == "half \ufffd"
    config_diff({"a": run.meta(), "b": run.meta() | {"model": None}})


@pytest.mark.parametrize("older", [False, True], ids=["as it is", "of an older version"])
@pytest.mark.parametrize("row", ROWS)
def test_every_reader_reads_it(tmp_path, row, older):
    run = odd_run(tmp_path / "run", ROWS[row]())
    if older:
        as_older(tmp_path / "run")
        run = open_run(tmp_path / "run")
    read_everything(run, tmp_path, "a")
    assert len(run.index()) == 26 and "".join(run.trajectory("a").text) == "".join(ROWS[row]().text)


@pytest.fixture(scope="module")
def all_odd(tmp_path_factory):
    "One run with every odd row."
    path = tmp_path_factory.mktemp("odd") / "run"
    writer = make_run(path, steps=2, status="running")
    fields = TraceRow.__dataclass_fields__
    rows = [TraceRow(**{f: getattr(row, f) for f in fields} | {"id": f"odd-{i}", "step": 3}) for i, row in enumerate(make() for make in ROWS.values())]
    writer.append_index(writer.write_tokens(3, rows))
    writer.close()
    return path


@pytest.mark.parametrize("page, query", [*((p, {}) for p in PAGES), ("steps.py", {"step": "3"}), ("trajectories.py", {"text": "half"}), *(("trajectory.py", {"id": f"odd-{i}"}) for i in (0, 2, 4))])
def test_every_page_shows_them(all_odd, monkeypatch, page, query):
    app(monkeypatch, all_odd, page, **query)


@pytest.mark.parametrize("page", ["overview.py", "steps.py", "trajectory.py"])
def test_pages_show_an_older_run(tmp_path, monkeypatch, page):
    odd_run(tmp_path / "run", ROWS["no numbers"]())
    as_older(tmp_path / "run")
    app(monkeypatch, tmp_path / "run", page)


def test_a_last_line_without_its_newline_is_kept_by_whoever_goes_on(tmp_path):
    from tirlab.traces.run import RunWriter
    make_run(tmp_path / "run", steps=2)
    for name, cut in (("index", 1), ("steps", 1), ("metrics", 30)):        # whole but for the newline, and torn
        file = tmp_path / f"run/{name}.jsonl"
        file.write_bytes(file.read_bytes()[:-cut])
    writer = RunWriter(tmp_path / "run", {}, resume=True)
    run = open_run(tmp_path / "run")
    assert len(run.index()) == 16 and len(run.steps()) == 2 and len(run.metrics()) == 1 and run.skipped == 0
    writer.close()
