"""The Dockerfiles, as far as they can be tested without a build: what they copy, who runs, how health is asked for."""

import http.server
import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dit_hub.cli import app

ROOT = Path(__file__).parents[1]
each_file = pytest.mark.parametrize(
    "file", sorted((ROOT / "docker").glob("Dockerfile.*")), ids=lambda file: file.suffix
)


def instructions(file: Path) -> list[tuple[str, str]]:
    """(instruction, arguments), with continued lines joined and comments left out."""
    lines = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined if line.strip())]


@each_file
def test_every_copied_path_is_there_and_not_ignored(file: Path) -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {path for name, rest in instructions(file) if name == "COPY" and "--from" not in rest
              for path in rest.split()[:-1]}  # fmt: skip
    assert copied == kept
    assert [path for path in copied if not (ROOT / path).exists()] == []


@each_file
def test_the_last_stage_runs_as_an_unprivileged_user_and_holds_no_secret(file: Path) -> None:
    every = instructions(file)
    last = every[max(index for index, (name, _) in enumerate(every) if name == "FROM") :]
    (user,) = (rest for name, rest in last if name == "USER")
    assert int(user) > 0
    names = [name for name, _ in last]
    assert names.index("USER") < names.index("CMD")
    declared = " ".join(rest for name, rest in every if name in ("ARG", "ENV", "RUN"))
    assert not re.search(r"(?i)secret|token|passw|api_key|--mount", declared)


@each_file
def test_it_installs_the_versions_that_are_tested(file: Path) -> None:
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    installs = [rest for name, rest in instructions(file) if name == "RUN" and "pip install" in rest]
    assert torch in installs[0].split()
    assert "--constraint constraints.txt" in installs[1]
    extras = re.search(r'"\.\[(.*)\]"', installs[1])
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))


@pytest.fixture
def health() -> Iterator[http.server.HTTPServer]:
    """A server whose /health has the status that its attribute says."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status if self.path == "/health" else 404)  # pyright: ignore
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@each_file
def test_health_is_asked_where_the_command_serves(file: Path, health: http.server.HTTPServer) -> None:
    every = dict(instructions(file))
    command = json.loads(every["CMD"])
    assert command[:3] == ["dit-hub", "serve", "/models/model"]
    assert dict(itertools.pairwise(command))["--port"] == every["EXPOSE"] == "8000"
    options = {option for each in typer.main.get_command(app).commands["serve"].params for option in each.opts}  # pyright: ignore
    assert {part for part in command if part.startswith("--")} <= options
    program, *arguments = json.loads(every["HEALTHCHECK"].partition("CMD ")[2])
    assert program == "python"
    arguments = [argument.replace(":8000", f":{health.server_port}") for argument in arguments]
    for status, expected in ((200, 0), (503, 1)):
        health.status = status  # pyright: ignore[reportAttributeAccessIssue]
        assert subprocess.run([sys.executable, *arguments], capture_output=True).returncode == expected
