"""Start the app for one or several run folders, on this machine only."""
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tirlab.traces.meta import RunError, read_meta, runs_below

MAIN = Path(__file__).with_name("main.py")


def free_port() -> int:
    "Return 8501 if it is free, otherwise a port that the system picks."
    for port in (8501, 0):
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return s.getsockname()[1]
    raise RunError("No free port was found on 127.0.0.1: name one with --port.")


def folders(run_path: str | Path | list) -> list[Path]:
    "Return run folders as absolute paths; of a folder that is none, those below it, the newest first. Raises: RunError where there is none."
    given = [Path(p).resolve() for p in (run_path if isinstance(run_path, (list, tuple)) else [run_path])]
    found = []
    for path in given:
        runs = runs_below(path)
        found += runs if len(runs) == 1 else sorted(runs, key=lambda p: -(read_meta(p).get("created") or 0))
    return list(dict.fromkeys(found))


def command(
    run_path: str | Path | list,   # a run folder, a folder that holds runs, or several
    port: int,                # port on 127.0.0.1
    headless: bool = False,   # do not open a browser
) -> list[str]:               # arguments of the process
    "Return the command that serves the app: loopback only, no usage statistics, no prompt for an e-mail address."
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    options = {"server.address": "127.0.0.1", "server.port": port, "server.headless": str(headless or not display).lower(),
               "server.showEmailPrompt": "false", "server.fileWatcherType": "none", "browser.gatherUsageStats": "false",
               "browser.serverAddress": "127.0.0.1", "client.toolbarMode": "minimal", "client.showErrorLinks": "false",
               "theme.light.primaryColor": "#2F6FB0", "theme.dark.primaryColor": "#5AA2E0"}
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "streamlit", "run", str(MAIN), *flags, "--", *map(str, folders(run_path))]


def launch(
    run_path: str | Path | list,   # a run folder, a folder that holds runs, or several; the first is shown first
    port: int | None = None,    # port on 127.0.0.1; None picks a free one
    headless: bool = False,     # do not open a browser
) -> int:                       # exit code of the server, 0 after Ctrl-C
    "Serve the app until it is stopped. Raises: RunError if a folder is no run and holds none, the port is taken, or streamlit is missing."
    run_path = folders(run_path)
    if importlib.util.find_spec("streamlit") is None:
        raise RunError('The app needs streamlit: pip install "tirlab[app]".')
    if port is not None:
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)) == 0:
                raise RunError(f"Port {port} is in use: give another one, or none to have one picked.")
    port = port or free_port()
    print(f"tirlab app: http://127.0.0.1:{port}  (Ctrl-C stops it)", flush=True)
    if threading.current_thread() is threading.main_thread():   # SIGTERM must stop the server too
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    server = subprocess.Popen(command(run_path, port, headless), stdout=subprocess.DEVNULL)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        server.wait()
