"""Starting and stopping a process that behaves, and ones that do not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from loraplex_bench.load.launcher import LaunchedServer, LaunchError, process_group

READY = "print('warming up'); print('loraplex ready grpc=127.0.0.1:5 metrics=127.0.0.1:6', flush=True);"
WAIT = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7));"


def launch(script: str, *flags: str, timeout_s: float = 30.0) -> LaunchedServer:
    return LaunchedServer(flags, command=(sys.executable, "-c", script), timeout_s=timeout_s)


def test_start_watch_stop():
    with launch(WAIT + READY + "time.sleep(60)") as server:
        assert (server.grpc, server.metrics) == ("127.0.0.1:5", "127.0.0.1:6")
        assert server.running
        assert server.pid in server.pids()
        memory = server.memory_bytes()
        assert memory["rss"] >= memory["anonymous"] > 1 << 20
        assert server.stop() == 7
        assert not server.running
        assert server.stop() == 7
    assert process_group(server.pid) == []


def test_flags_are_passed_on():
    with launch(
        WAIT + "print(f'loraplex ready grpc={sys.argv[1]} metrics=-', flush=True); time.sleep(60)", "h:1"
    ) as s:
        assert s.grpc == "h:1"
        assert s.metrics is None


def test_output_after_the_ready_line_never_blocks_the_server(tmp_path: Path):
    done = tmp_path / "done"
    script = (
        f"{WAIT}{READY} print('x' * 300000, flush=True); open({str(done)!r}, 'w').close(); time.sleep(60)"
    )
    with launch(script) as server:
        while not done.exists():
            assert server.running


def test_an_early_end_tells_why():
    with pytest.raises(LaunchError, match=r"(?s)exit code 3.*no such model"):
        launch("import sys; print('no such model', file=sys.stderr); sys.exit(3)")


def test_one_that_is_never_ready_is_killed():
    with pytest.raises(LaunchError, match="not ready in time"):
        launch("import time; time.sleep(60)", timeout_s=0.5)


def test_one_that_ignores_sigterm_is_killed():
    server = launch(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + READY + "time.sleep(60)"
    )
    with pytest.raises(LaunchError, match="did not stop"):
        server.stop(timeout_s=0.5)
    assert process_group(server.pid) == []


def test_processes_left_behind_are_found_and_killed():
    child = "import subprocess; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']);"
    server = launch(WAIT + child + READY + "time.sleep(60)")
    assert len(server.pids()) == 2
    with pytest.raises(LaunchError, match="left processes behind"):
        server.stop(timeout_s=1.0)
    assert process_group(server.pid) == []


def test_an_error_in_the_body_stops_the_server_too():
    with pytest.raises(ZeroDivisionError), launch(WAIT + READY + "time.sleep(60)") as server:
        _ = 1 / 0
    assert process_group(server.pid) == []
