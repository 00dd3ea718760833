"""The hub's side, from a server of our own that answers as the hub does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CODE = """
import sys
from ftune.models.source import source_directory
from ftune.recipe.schema import Model
try:
    source_directory(Model(model_name_or_path="owner/name", gguf_file=sys.argv[1]))
except Exception as error:
    print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """Knows one model with two GGUF files, and no file's content."""

    def do_GET(self) -> None:
        names = ["README.md", "m.Q4_0.gguf", "m.Q8_0.gguf"]
        answer = {"id": "owner/name", "siblings": [{"rfilename": name, "size": 9} for name in names]}
        content = json.dumps(answer).encode() if self.path.startswith("/api/models/owner/name") else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_a_misspelt_gguf_of_a_hub_model_names_the_near_one(address: str, tmp_path: Path) -> None:
    more = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        [sys.executable, "-c", CODE, "m.Q8_O.gguf"], env={**os.environ, **more, "NO_PROXY": "*"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.stdout.startswith("RecipeError"), made.stdout + made.stderr
    assert "has no file `m.Q8_O.gguf`" in made.stdout
    assert "it has m.Q4_0.gguf, m.Q8_0.gguf" in made.stdout
    assert "set model.gguf_file to `m.Q8_0.gguf`" in made.stdout
