"A model behind an OpenAI-compatible server on this machine that follows a script, in one piece or as a stream."
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


def call(name, **arguments): return {"name": name, "arguments": arguments}


def message_of(turn, number):
    "A turn of a script, text or a list of calls, as a message of the protocol."
    if isinstance(turn, str): return {"role": "assistant", "content": turn}
    calls = [{"id": f"c{number}_{i}", "type": "function", "function": {"name": c["name"], "arguments": json.dumps(c["arguments"])}} for i, c in enumerate(turn)]
    return {"role": "assistant", "content": None, "tool_calls": calls}


@contextmanager
def scripted(choose, seen=None):
    "Serve `choose(messages)`, the script of a conversation; its turn is the number of turns that the conversation has."
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args): pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None: seen.append(body)
            number = sum(m["role"] == "assistant" for m in body["messages"])
            script = choose(body["messages"])
            message = message_of(script[min(number, len(script) - 1)], number)
            choice = {"index": 0, "finish_reason": "tool_calls" if message.get("tool_calls") else "stop"}
            base = {"id": "x", "created": 1, "model": body["model"], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
            if body.get("stream"):
                delta = message | ({"tool_calls": [c | {"index": i} for i, c in enumerate(message["tool_calls"])]} if message.get("tool_calls") else {})
                data = f"data: {json.dumps(base | {'object': 'chat.completion.chunk', 'choices': [choice | {'delta': delta}]})}\n\ndata: [DONE]\n\n".encode()
            else: data = json.dumps(base | {"object": "chat.completion", "choices": [choice | {"message": message}]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream" if body.get("stream") else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally: server.shutdown(); server.server_close()
