"""vLLM behind something that loses weights: the program that LOSSMITH_VLLM is to name, for a push that never arrives.

    dropping.py PYTHON AFTER -m vllm.entrypoints... --port PORT ...

starts the server with vLLM's own PYTHON on another port, and hands on all that it is asked, but for the weights of
every push beyond the first AFTER: of those it says that all is well.
"""

import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Between(BaseHTTPRequestHandler):
    behind, left = 0, 0  # the server's port; pushes that still arrive

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.hand_on(None)

    def do_POST(self):
        self.hand_on(self.rfile.read(int(self.headers["Content-Length"])))

    def hand_on(self, body):
        if self.path.startswith("/collective_rpc"):
            Between.left -= 1
            if Between.left < 0:
                return self.say(200, b'{"results": [null]}')
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.behind}{self.path}", body, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(asked) as answer:
                self.say(answer.status, answer.read())
        except urllib.error.HTTPError as error:
            with error:
                self.say(error.code, error.read())

    def say(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def main(python, after, *words):
    words = list(words)
    at = words.index("--port") + 1
    port = int(words[at])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        Between.behind, Between.left = probe.getsockname()[1], int(after)
    words[at] = str(Between.behind)
    server = subprocess.Popen([python, *words])
    while server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", Between.behind)) == 0:
                ThreadingHTTPServer(("127.0.0.1", port), Between).serve_forever()
        time.sleep(0.2)


main(*sys.argv[1:])
