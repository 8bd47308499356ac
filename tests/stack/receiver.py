"""Take what Alertmanager sends, in a container of the tests: one line of JSON on standard output for each message."""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        message = self.rfile.read(int(self.headers["content-length"]))
        sys.stdout.write(message.decode().strip() + "\n")
        sys.stdout.flush()
        self.send_response(200)
        self.end_headers()


if __name__ == "__main__":
    HTTPServer(("0.0.0.0", 8099), Receiver).serve_forever()
