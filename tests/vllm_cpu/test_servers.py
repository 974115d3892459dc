"""`VLLMServerEngine` on real servers on this machine's loopback: ids in and out, new weights, and what fails."""
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from conftest import SETTINGS
from test_engine import prompts_of
from tiny_rollouts import alike, ask, gap, other_weights, roll, scored
from tirlab.rollout.engines import EngineError, Sampling
from tirlab.core.tiny import tiny_policy
from tirlab.core.trajectory import StopReason
from tirlab.rollout.vllm import VLLMEngine
from tirlab.rollout.vllm_servers import VLLMServerEngine

pytestmark = pytest.mark.vllm
HERE = Path(__file__).parent
OPTIONS = ("--dtype float32 --enforce-eager --no-enable-chunked-prefill --block-size 32 --kv-cache-memory-bytes 134217728 --max-model-len 1024 --max-num-seqs 64 --host 127.0.0.1 "
           "--logprobs-mode processed_logprobs --enable-prompt-tokens-details --worker-extension-cls serve.Loads").split()


class Server:
    "A `vllm serve` in a process group of its own."
    def __init__(self, log):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        env = os.environ | SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "serve.py"), "serve", tiny_policy(), "--port", str(port), *OPTIONS]
        with log.open("w") as out: self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env, start_new_session=True)

    def wait(self, seconds=240):
        "Until it is well."
        for _ in range(seconds):
            if self.process.poll() is not None: break
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200: return self
            except httpx.HTTPError: pass
            time.sleep(1)
        raise AssertionError(f"vllm serve did not start:\n{self.log.read_text()[-4000:]}")

    def kill(self):
        try: os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        self.process.wait(30)

    def load(self, folder):
        "Bring weights by a way that works on a CPU."
        httpx.post(f"{self.url}/collective_rpc", json={"method": "load_folder", "args": [str(folder)]}, timeout=60).raise_for_status()


@pytest.fixture(scope="module")
def servers(vllm, tmp_path_factory, report):
    "Two servers, started together. Tests that kill one come last."
    folder, start = tmp_path_factory.mktemp("servers"), time.perf_counter()
    both = [Server(folder / f"{i}.log") for i in range(2)]
    try:
        for s in both: s.wait()
        report(f"two servers up in {time.perf_counter() - start:.0f} s")
        yield both
    finally:
        for s in both: s.kill()


@pytest.fixture
def urls(servers): return [s.url for s in servers]


class Stub(BaseHTTPRequestHandler):
    "Well by its own account, and no good."
    def log_message(self, *args): pass
    def send(self, status, text):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self): self.send(200, "")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        if self.server.mood == "hang": self.server.over.wait(60)
        elif self.server.mood == "drop": pass
        elif callable(self.server.mood): self.send(200, json.dumps(self.server.mood(asked["prompt"])))
        else: self.send(*self.server.mood)


def answers(ids=(5, 6), logprobs=(-1.0, -1.0), **more):
    "A stub's mood: an answer of the right shape."
    parts = {"tokens": [f"token_id:{i}" for i in ids], "token_logprobs": logprobs}
    return lambda prompt: {"choices": [{"token_ids": ids, "prompt_token_ids": prompt, "finish_reason": "stop", "logprobs": parts}]} | more


MOODS = {"500": (500, '{"error": "EngineDeadError"}'), "not JSON": (200, "<html>Bad gateway</html>"), "cut": (200, '{"choices": [{"token_ids": [1, 2'),
         "no ids": (200, '{"choices": [{"text": "37"}]}'), "a list": (200, "[]"), "hang": "hang", "drop": "drop",
         "lengths": (200, '{"choices": [{"token_ids": [1, 2], "prompt_token_ids": [], "finish_reason": "stop", "logprobs": {"tokens": [], "token_logprobs": []}}]}'),
         "404": (404, "gone"), "401": (401, "who are you?"), "brackets": (200, "[" * 200_000), "usage": answers(usage=[1]),
         "cached": answers(usage={"prompt_tokens_details": {"cached_tokens": "x"}}), "cached too many": answers(usage={"prompt_tokens_details": {"cached_tokens": 10**400}}),
         "negative": answers((-5, 6)), "huge": answers((2**40, 6)), "outside": answers((100_000, 6)), "likelier than certain": answers(logprobs=(3.0, -1.0)),
         "minus infinity": answers(logprobs=(-9999.0, -1.0)), "long number": answers(logprobs=(-10**400, -1.0))}


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.handle_error, server.daemon_threads, server.asked, server.over = lambda *a: None, True, 0, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()


def test_ids_and_logprobs_are_those_of_the_engine_in_process(urls, llm, model, tok, report):
    engine, prompts = VLLMServerEngine(urls), prompts_of(tok)
    here = ask(VLLMEngine(llm, sync=lambda: load_into(llm, model)), prompts, 0)
    there = ask(engine, prompts, 0)
    assert alike(here, there)
    start = time.perf_counter()
    with engine.ready(0): done = roll(engine, tok)
    seconds, difference = time.perf_counter() - start, gap(model, done)
    report(f"64 rollouts on two servers in {seconds:.1f} s: prefix cache hit rate {engine.prefix_cache_hit_rate():.1%}, log-probabilities within {difference:.1e}")
    assert difference < 1e-3 and engine.prefix_cache_hit_rate() > 0 and all(t.stop is not StopReason.FAILED for t in done)
    with engine.ready(0): assert [t.completion_ids for t in roll(engine, tok)] == [t.completion_ids for t in done]


def load_into(llm, model):
    llm.llm_engine.model_executor.driver_worker.model_runner.model.load_weights((n, p.data) for n, p in model.named_parameters())


def test_what_is_wrong_with_the_request_is_a_mistake(urls, tok):
    with pytest.raises(ValueError, match="404"): ask(VLLMServerEngine(urls, model="another"), prompts_of(tok, 1))


@pytest.mark.parametrize("prompt, size", [(2000, 32), (1010, 32), (1024, 1), (200, 2000)], ids=str)
def test_what_is_too_long_fails_alone(urls, tok, prompt, size):
    engine = VLLMServerEngine(urls)
    with engine.ready(0):
        assert engine.context_tokens == 1024
        with pytest.raises(EngineError, match="1024"): asyncio.run(engine.generate(prompts_of(tok, 1, prompt)[0], Sampling(size)))
        assert all(s.up and s.version == 0 for s in engine._servers)


def test_a_cancelled_turn_is_aborted_on_the_server(urls, tok):
    engine = VLLMServerEngine(urls[:1], options={"ignore_eos": True})
    async def impatient():
        async with asyncio.timeout(0.3): await asyncio.gather(*(engine.generate(p, Sampling(800)) for p in prompts_of(tok)))
    with engine.ready(0), pytest.raises(TimeoutError): asyncio.run(impatient())
    def running(): return sum(float(line.split()[-1]) for line in httpx.get(f"{urls[0]}/metrics").text.splitlines() if line.startswith("vllm:num_requests_running"))
    for _ in range(50):
        if running() == 0: return
        time.sleep(0.1)
    raise AssertionError("still running")


# New weights

def test_prefixes_of_older_weights_are_not_used(servers, urls, make_llm, model, tok, tmp_path):
    prompts, greedy, by_url = prompts_of(tok), Sampling(24, temperature=0), {s.url: s for s in servers}
    worst = lambda turns, m: max((scored(m, p, t.ids) - torch.tensor(t.logprobs)).abs().max().item() for p, t in zip(prompts, turns, strict=True))
    other_weights(model).save_pretrained(tmp_path / "new"), tok.save_pretrained(tmp_path / "new")
    folder, told = {"now": tiny_policy()}, []
    engine = VLLMServerEngine(urls, sync=lambda url: (by_url[url].load(folder["now"]), told.append(url)))
    with pytest.raises(EngineError): asyncio.run(engine.generate(prompts[0], greedy))   # no weights were brought yet
    old = ask(engine, prompts, 0, greedy)
    folder["now"] = tmp_path / "new"
    new, again = ask(engine, prompts, 1, greedy), ask(engine, prompts, 1, greedy)
    assert told == urls * 2 and alike(new, again) and worst(new, model) < 1e-3
    assert alike(new, ask(VLLMEngine(make_llm(tmp_path / "new")), prompts, 0, greedy))
    assert max(abs(x.logprobs[0] - y.logprobs[0]) for x, y in zip(new, old, strict=True)) > 1e-2

    # Had they been kept, one would see it.
    for s in servers: s.load(tiny_policy())
    stale = ask(VLLMServerEngine(urls), prompts, 0, greedy)
    assert worst(stale, type(model).from_pretrained(tiny_policy())) > 1e-2
    folder["now"] = tiny_policy()
    assert worst(ask(engine, prompts, 2, greedy), type(model).from_pretrained(tiny_policy())) < 1e-3


def test_a_server_without_the_new_weights_is_told_apart(servers, urls, model, tok, tmp_path):
    (prompt,), by_url, brought = prompts_of(tok, 1), {s.url: s for s in servers}, []
    for s in servers: s.load(tiny_policy())
    other_weights(model).save_pretrained(tmp_path)
    def sync(url):
        brought.append(url)
        if url == urls[0]: by_url[url].load(tmp_path)   # what is sent to the second gets lost
    engine = VLLMServerEngine(urls, sync=sync)
    def gaps():
        "Of each fresh server, and how far it is from the policy."
        turns = {e.server.url: asyncio.run(e.generate(prompt, Sampling(16, seed=1))) for e in engine.fresh()}
        return {url: (scored(model, prompt, t.ids) - torch.tensor(t.logprobs)).abs().max().item() for url, t in turns.items()}
    with engine.ready(1):
        found = gaps()
        assert list(found) == urls and found[urls[0]] < 1e-3 and found[urls[1]] > 1e-2
        assert engine.fresh() == []
    with engine.ready(1): assert engine.fresh() == []
    engine._servers[1].version = None   # it was lost, and came back
    with engine.ready(1): assert list(gaps()) == urls[1:] and brought == [*urls, urls[1]]
    for s in servers: s.load(tiny_policy())


def test_a_server_that_cannot_be_asked_is_out_until_weights_come_again(urls, stub, tok):
    prompt, stub.mood = prompts_of(tok, 1)[0], (500, "")
    engine = VLLMServerEngine([stub.url, urls[0]])
    with engine.ready(0):
        bad, good = engine.fresh()
        with pytest.raises(EngineError, match=stub.url): asyncio.run(bad.generate(prompt, Sampling(8)))
        assert asyncio.run(good.generate(prompt, Sampling(8))).ids and stub.asked == 1
        stub.mood = answers()
        for _ in range(4): asyncio.run(engine.generate(prompt, Sampling(8)))
        assert stub.asked == 1
    with engine.ready(0): assert [e.server.url for e in engine.fresh()] == [stub.url]


def test_a_server_without_nccl_is_left_out(urls, tok):
    from trl.generation.vllm_client import VLLMClient
    engine = VLLMServerEngine(urls, sync=lambda url: VLLMClient(url).init_communicator("cuda:0"))
    with pytest.raises(EngineError, match="weight-transfer"), engine.ready(0): pass
    engine = VLLMServerEngine(urls, sync=lambda url: VLLMClient(url).init_communicator("cuda:0") if url == urls[0] else None)
    with pytest.warns(UserWarning, match="left out"), engine.ready(0): turns = asyncio.run(engine.generate(prompts_of(tok, 1)[0], Sampling(8)))
    assert turns.ids and [s.version for s in engine._servers] == [None, 0]


# What fails

@pytest.mark.parametrize("mood", MOODS)
def test_another_server_answers(urls, stub, tok, mood):
    stub.mood, prompts = MOODS[mood], prompts_of(tok)
    engine = VLLMServerEngine([stub.url, urls[0]], timeout=3 if mood == "hang" else 60, vocab=len(tok))
    assert alike(ask(engine, prompts), ask(VLLMServerEngine(urls[:1]), prompts))
    assert 0 < stub.asked <= 4   # then it was known to fail


@pytest.mark.parametrize("mood", ["500", "cut", "hang", "lengths", "brackets", "usage", "huge"])
def test_when_all_fail_rollouts_fail(stub, tok, mood):
    stub.mood = MOODS[mood]
    engine = VLLMServerEngine([stub.url], timeout=1)
    with engine.ready(0): done = roll(engine, tok)
    assert all(t.stop is StopReason.FAILED and not t.turns and stub.url in t.error for t in done)


def test_one_of_two_is_killed_mid_run(servers, urls, model, tok, report):
    by_url, killed = {s.url: s for s in servers}, []
    engine = VLLMServerEngine(urls, sync=lambda url: by_url[url].load(tiny_policy()))
    ask_first = engine._request
    async def ask_and_kill(server, ids, sampling):
        if server.url == urls[0] and server.live > 4 and not killed:
            killed.append(server.live)
            threading.Timer(0.2, servers[0].kill).start()
        return await ask_first(server, ids, sampling)
    engine._request = ask_and_kill
    with engine.ready(0): done = roll(engine, tok)
    report(f"one of two servers killed with {killed[0]} turns on it: {sum(t.stop is StopReason.FAILED for t in done)} of {len(done)} rollouts failed")
    assert killed and all(t.stop is not StopReason.FAILED for t in done) and gap(model, done) < 1e-3
    assert not engine._servers[0].up and engine._servers[0].version is None
    with pytest.warns(UserWarning, match="left out"), engine.ready(1): assert [t.error for t in roll(engine, tok, 1) if not t.turns] == []
    servers[1].kill()
    with pytest.raises(EngineError, match="No vLLM server is ready"), engine.ready(2): pass


def test_nothing_is_left_behind():
    assert not [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"tests/vllm_cpu/serve.py" in _read(p)]


def _read(path):
    try: return path.read_bytes()
    except OSError: return b""
