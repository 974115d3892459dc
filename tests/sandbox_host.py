"""Runs code in the sandbox on behalf of a test, as whatever user it was started: a request a line on stdin, an answer a line on stdout, both JSON.
Many at once. With a number as argument, the sandbox's server believes that the kernel's landlock is of that version."""
import json
import subprocess
import sys
import threading

from tirlab.sandbox.client import Limits, run_python

SERVER = "import sys; from tirlab.sandbox import locks; locks.landlock_abi = lambda: {}; from tirlab.sandbox.fork_server import main; main(int(sys.argv[1]), *sys.argv[2:])"
speaking = threading.Lock()


class OldKernel(subprocess.Popen):
    def __init__(self, command, **options):
        if "tirlab.sandbox.fork_server" in command: command = [*command[:2], "-c", SERVER.format(int(sys.argv[1])), *command[4:]]
        super().__init__(command, **options)


if len(sys.argv) > 1: subprocess.Popen = OldKernel


def run(code, limits, isolation, stays):
    if not stays: return run_python(code, Limits(**limits), isolation)
    from tirlab.sandbox.interpreters import Interpreter
    with Interpreter(Limits(**limits), isolation, "bare") as interpreter: return interpreter.run(code)


def serve(request):
    try: came = run(**request["run"])
    except Exception as e: answer = dict(status="raised", text=repr(e), stdout="")
    else: answer = dict(status=came.status.value, text=str(came), stdout=came.stdout, seconds=came.seconds)
    with speaking: print(json.dumps(answer | {"number": request["number"]}), flush=True)


for line in sys.stdin: threading.Thread(target=serve, args=(json.loads(line),), daemon=True).start()
