"""The README's example is a program that runs, and `import swarmpy` costs next to nothing."""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

from swarmpy.testing.engine import EchoModel

ROOT = Path(__file__).parent.parent

IMPORT_S_MAX = 0.15


def test_the_example_in_the_readme_runs_as_it_stands(tmp_path: Path) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "ask.py").write_text(code[1])
    (tmp_path / "node").mkdir()
    (tmp_path / "node" / "config.toml").write_text(
        '[engine]\nname = "swarmpy.testing.engine:EchoEngine"\n'
        '[network]\nmdns = false\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n'
    )
    model = EchoModel(vocabulary_size=50_000).write(tmp_path / "echo")

    answer = subprocess.run(
        [sys.executable, "ask.py", str(model), str(tmp_path / "node")],
        cwd=tmp_path,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    lines = answer.stdout.splitlines()
    assert lines[0].startswith("a friend joins with: swarmpy join swarm://")
    assert len(lines) == 22
    assert "tokens/s" in lines[-1]
    assert answer.stderr == ""


def test_import_swarmpy_takes_little_time() -> None:
    """Median of five, warm; what is named is loaded when it is used."""
    code = "import time; t = time.perf_counter(); import swarmpy; print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(6)
    ]

    assert statistics.median(seconds[1:]) <= IMPORT_S_MAX


def test_every_public_name_can_be_loaded() -> None:
    import swarmpy

    for name in swarmpy.__all__:
        assert getattr(swarmpy, name).__doc__
