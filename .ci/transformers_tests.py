"""Run transformers' own model tests, `ModelTesterMixin`, on a tiny memory and base model.

The tests come from the sdist of the installed version, which pip fetches. The sdist leaves out two
modules that the mixin imports, for generation and for exporters; these stand empty here, and
generation has its own tests in tests/test_generation.py.

Usage: python .ci/transformers_tests.py [options of pytest]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EMPTY = {
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def main() -> None:
    """Exit with pytest's status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fetch(folder)
        ours = folder / "tests/models/mlpmem/test_modeling_mlpmem.py"
        ours.parent.mkdir(parents=True)
        ours.write_text((ROOT / ".ci/model_tester.py").read_text(encoding="utf-8"))
        for inside in ("", "exporters", "generation", "models", "models/mlpmem"):
            (folder / "tests" / inside).mkdir(exist_ok=True)
            (folder / "tests" / inside / "__init__.py").touch()
        for path, text in EMPTY.items():
            (folder / path).write_text(text)
        paths = os.pathsep.join([name, str(folder / "site"), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull]
        command = [*pytest, "--rootdir", name, "-q", "-rfE", str(ours), *sys.argv[1:]]
        sys.exit(subprocess.run(command, cwd=folder, env=environment, check=False).returncode)


def fetch(folder: Path) -> None:
    """The tests of the installed version, and the one package that only they need."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    wanted = f"transformers=={version('transformers')}"
    source = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*pip, *source, "--dest", str(folder), wanted], check=True)
    site = ["install", "--no-deps", "--target", str(folder / "site"), "parameterized"]
    subprocess.run([*pip, *site], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        members = [m for m in archive.getmembers() if "/tests/" in m.name and m.isfile()]
        if not members:
            sys.exit(f"the sdist of {wanted} holds no tests")
        for member in members:
            member.name = member.name.split("/", 1)[1]
        archive.extractall(folder, members=members, filter="data")


if __name__ == "__main__":
    main()
