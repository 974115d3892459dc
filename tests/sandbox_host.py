"""Runs code in the sandbox on behalf of a test, as whatever user it was started: a request a line on stdin, an answer a line on stdout, both JSON."""
import json
import sys

from tirlab.sandbox import Limits, run_python

for line in sys.stdin:
    request = json.loads(line)
    run = run_python(request["code"], Limits(**request["limits"]), request["isolation"])
    print(json.dumps(dict(status=run.status.value, text=str(run), stdout=run.stdout, seconds=run.seconds)), flush=True)
