"""What .ci/audit.py makes of pip-audit's answers, with a stand-in for pip-audit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci/audit.py"
KNOWN = {"name": "alpha", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "beta", "skip_reason": "not found"}
BAD = {"name": "beta", "version": "2.0", "vulns": [{"id": "GHSA-1", "fix_versions": ["2.1"]}]}


def audit(folder: Path, stand_in: str) -> subprocess.CompletedProcess[str]:
    """Run the script on two pins, with a module of ours in the place of pip-audit."""
    pins = ("alpha==1.0", "beta==2.0+cpu ; python_version < '4'")
    lock = "".join(f"{pin} \\\n    --hash=sha256:00\n" for pin in pins)
    (folder / "some.lock").write_text(f"# alpha==0.1\n-c other.txt\n{lock}", encoding="utf-8")
    (folder / "pip_audit.py").write_text(f"import pathlib, sys\n{stand_in}\n", encoding="utf-8")
    return subprocess.run(
        [sys.executable, SCRIPT, folder / "some.lock"],
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def answering(*packages: object) -> str:
    return f"print({json.dumps({'dependencies': packages})!r})"


@pytest.mark.parametrize(
    ("stand_in", "code", "out", "err"),
    [
        (answering(KNOWN, KNOWN), 0, "advisories: 0, about 2 of 2 packages\n", ""),
        (
            answering(KNOWN, BAD) + "; sys.exit(1)",
            1,
            "advisories: 1, about 2 of 2 packages\nbeta 2.0: GHSA-1, mended in 2.1\n",
            "",
        ),
        (
            answering(KNOWN, UNKNOWN),
            0,
            "advisories: 0, about 1 of 2 packages\n",
            "warning: not in the registry: beta\n",
        ),
        (
            answering(UNKNOWN),
            0,
            "advisories: 0, about 0 of 2 packages\n",
            "warning: no advisories could be asked for: the registry answers for none of the "
            "packages\n",
        ),
        (
            "sys.exit('Traceback\\nConnectionError: no such host')",
            0,
            "advisories: 0, about 0 of 2 packages\n",
            "warning: no advisories could be asked for: ConnectionError: no such host\n",
        ),
    ],
)
def test_findings_fail_and_silence_is_said(
    tmp_path: Path, stand_in: str, code: int, out: str, err: str
) -> None:
    done = audit(tmp_path, stand_in)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def test_every_pin_is_asked_for_without_its_build(tmp_path: Path) -> None:
    given = "given = pathlib.Path(sys.argv[sys.argv.index('--requirement') + 1]).read_text()"
    done = audit(tmp_path, f"{given}; sys.exit(' '.join(given.split()))")
    assert done.stderr.endswith("asked for: alpha==1.0 beta==2.0\n")
