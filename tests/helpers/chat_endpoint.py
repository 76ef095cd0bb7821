"""A chat-completions endpoint on this machine, for tests: it says what a test wants it to say."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FakeEndpoint:
    """What was asked, and what is answered.

    Attributes:
        url: The base URL.
        asked: The body and the headers of each request, in order.
        reply: Makes of a request's last message, and of its number from 0 on, the answer's text, or
            a tuple (status, body, headers).
    """

    def __init__(self, url, reply):
        self.url, self.reply, self.asked = url, reply, []

    @property
    def messages(self):
        return [body["messages"][-1]["content"] for body, _ in self.asked]


@contextmanager
def fake_endpoint(reply):
    """Context manager that yields a `FakeEndpoint`."""
    found = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            endpoint = found[0]
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(endpoint.asked)
                endpoint.asked.append((body, dict(self.headers) | {"path": self.path}))
            said = endpoint.reply(body["messages"][-1]["content"], number)
            if isinstance(said, str):
                choice = {"message": {"role": "assistant", "content": said}}
                said = (200, json.dumps({"choices": [choice | {"finish_reason": "stop"}]}), {})
            status, text, headers = said
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    lock = threading.Lock()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # who has asked may be gone
    found.append(FakeEndpoint(f"http://127.0.0.1:{server.server_port}/v1", reply))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield found[0]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
