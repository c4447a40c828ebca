# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line tools in processes that are killed, or stopped by their disk, at chosen points.

A server process imports the package once and forks a process for each run, so that a run costs seconds less. The
package knows nothing of it: the forked process replaces functions of Python's standard library before it starts the
tool. Run as a program, this file is that server.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]


class Run:
    """A process that runs a tool.

    Attributes:
        folder: Current folder of the process.
        pid: Id of the process.
    """

    def __init__(self, server: Server, folder: Path, pid: int, output: Path) -> None:
        self.server = server
        self.folder = folder
        self.pid = pid
        self._output = output

    @property
    def points(self) -> list[str]:
        """Points passed so far, in order: kind and path below the folder."""
        path = _points_file(self._output)
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, pattern: str, seconds: float = 240) -> bool:
        """Wait until a point matches a regular expression. Returns whether one did before the process ended."""
        deadline = time.monotonic() + seconds
        while not any(re.search(pattern, point) for point in self.points):
            if self.wait(0) is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    @property
    def output(self) -> str:
        """Standard output and error so far."""
        return self._output.read_text(errors='replace')

    def kill(self) -> None:
        """Kill the process if it has not ended."""
        if self.wait(0) is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> int | None:
        """Return the exit code, negative for a signal; None if the process has not ended in time."""
        return self.server.ask(wait=self.pid, seconds=seconds)


class Server:
    """Starts runs."""

    def __init__(self) -> None:
        environment = {**os.environ, 'PYTHONPATH': str(REPO), 'OMP_NUM_THREADS': '1'}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self._runs = 0

    def ask(self, **request: Any) -> Any:
        """Send a request and return the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + '\n')
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, folder: Path, *argv: str, **injected: Any) -> Run:
        """Start a tool.

        Args:
            folder: Current folder of the process.
            argv: Tool and arguments.
            injected: ``die_at``, the number of the point at which the process is killed, or ``die_on``, a regular
                expression that its kind and path match; ``max_bytes``, the largest size of a file; ``environment``,
                variables.
        """
        self._runs += 1
        output = folder / f'output_{self._runs}.txt'
        return Run(self, folder, self.ask(argv=argv, folder=str(folder), output=str(output), **injected), output)

    def run(self, folder: Path, *argv: str, **injected: Any) -> Run:
        """Run a tool to its end."""
        run = self.start(folder, *argv, **injected)
        if run.wait(240) is None:
            run.kill()
        return run

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def _points_file(output: Path) -> Path:
    return output.with_name(output.name.replace('output', 'points'))


# The forked process.


def _inject(folder: Path, points: Path, die_at: int | None, die_on: str | None, max_bytes: int | None) -> None:
    """Count and list every change of a file below a folder, and die at one of them."""
    count = 0
    listed = os.open(points, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def reached(kind: str, path: Any) -> bool:
        """Return whether the process is to die here."""
        nonlocal count
        path = Path(os.path.abspath(os.fspath(path)))
        if not path.is_relative_to(folder):
            return False
        count += 1
        point = f'{kind} {path.relative_to(folder)}'
        if max_bytes is None:
            os.write(listed, f'{point}\n'.encode())
        return count == die_at or (die_on is not None and re.search(die_on, point) is not None)

    class Torn(io.FileIO):
        """A file of which only half of the first write arrives."""

        def write(self, content: Any) -> int:
            super().write(bytes(content)[: max(1, len(bytes(content)) // 2)])
            die()
            return 0

    real_open = builtins.open

    def open_or_die(file: Any, mode: str = 'r', *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set('wax+'):
            return real_open(file, mode, *args, **kwargs)
        if reached('open', file):
            die()
        if reached('write', file):
            # The buffer of the wrapper is flushed when it is full or closed.
            buffer = io.BufferedWriter(Torn(file, mode.replace('b', '').replace('t', '')))
            return buffer if 'b' in mode else io.TextIOWrapper(buffer, encoding='utf-8')
        return real_open(file, mode, *args, **kwargs)

    def deadly(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(path, int) and reached(kind, path):
                die()
            return call(path, *args, **kwargs)

        return wrapped

    real_fsync = os.fsync

    def sync_or_die(descriptor: int) -> None:
        if reached('fsync', os.readlink(f'/proc/self/fd/{descriptor}')):
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                # What is not forced to the disk may be lost with the power.
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        real_fsync(descriptor)

    builtins.open = io.open = open_or_die
    os.fsync = sync_or_die
    for name in ('replace', 'rename', 'remove', 'unlink', 'mkdir', 'rmdir', 'symlink', 'link'):
        setattr(os, name, deadly(name, getattr(os, name)))
    if max_bytes is not None:
        # Python ignores SIGXFSZ, so that a write fails with EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, max_bytes))


def _run(argv: list[str], folder: str, output: str, environment: dict[str, str], **injected: Any) -> None:
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        os.chdir(folder)
        os.environ.update(environment)
        from mmengine.config import Config

        from mmzsq import cli, generate, quantize, train

        # Without layout: yapf takes a second for each file.
        Config.pretty_text = property(  # type: ignore[assignment]
            lambda cfg: ''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items())
        )
        sys.argv = argv
        values = [injected.get(key) for key in ('die_at', 'die_on', 'max_bytes')]
        _inject(Path(folder), _points_file(Path(output)), *values)
        cli.run(dict(train=train.main, generate=generate.main, quantize=quantize.main)[argv[0]])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import mmzsq.generate
    import mmzsq.quantize
    import mmzsq.train  # noqa: F401

    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    ended: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if 'wait' in request:
            answer = _wait(request['wait'], request['seconds'], ended)
        else:
            answer = os.fork()
            if answer == 0:
                _run(**{'environment': {}, **request})
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


def _wait(pid: int, seconds: float, ended: dict[int, int]) -> int | None:
    deadline = time.monotonic() + seconds
    while pid not in ended:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            ended[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            return None
        else:
            time.sleep(0.02)
    return ended[pid]


if __name__ == '__main__':
    _serve()
