"""Asks PyPI whether there are advisories about versions: audit.py FILE…, pins as pip writes them.

Ends with 1 if there are. What could not be asked is said on stderr and is no failure: it says
nothing about the packages, and a release must not wait for a service.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PIN = re.compile(r"^([\w.-]+)==([^\s;+]+)", re.MULTILINE)  # a build such as +cpu has no entry
SECONDS = 300


def main(files: list[str]) -> int:
    """Audit all pins of some files."""
    pins = {f"{n}=={v}" for file in files for n, v in PIN.findall(Path(file).read_text())}
    report, trouble = ask(sorted(pins))
    asked = [package for package in report if "vulns" in package]
    findings = [
        f"{package['name']} {package['version']}: {found['id']}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version'}"
        for package in asked
        for found in package["vulns"]
    ]
    unknown = [package["name"] for package in report if "vulns" not in package]
    if trouble or not asked:
        trouble = trouble or "the registry answers for none of the packages"
        print(f"warning: no advisories could be asked for: {trouble}", file=sys.stderr)
    elif unknown:
        print(f"warning: not in the registry: {', '.join(unknown)}", file=sys.stderr)
    print(f"advisories: {len(findings)}, about {len(asked)} of {len(pins)} packages")
    print("\n".join(findings), end="\n" if findings else "")
    return int(bool(findings))


def ask(pins: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What pip-audit says of each package, or why it says nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        print("\n".join(pins), file=file, flush=True)
        options = ["--format=json", "--progress-spinner=off", "--disable-pip", "--no-deps"]
        command = [sys.executable, "-m", "pip_audit", *options, "--requirement", file.name]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return [], f"no answer in {SECONDS} s"
    try:
        return json.loads(done.stdout)["dependencies"], ""
    except ValueError:
        return [], (done.stderr.strip().splitlines() or ["no answer"])[-1]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
