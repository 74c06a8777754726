"""Check a built wheel: it holds each package file and nothing else, and it works on its own.

Usage: python .ci/check_wheel.py dist/NAME.whl
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Exit with a message at the first thing that is wrong."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    wheel = Path(sys.argv[1]).resolve()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    num_files = check_files(wheel, [ROOT / package for package in packages])
    with tempfile.TemporaryDirectory() as folder:
        check_import(wheel, Path(folder).resolve())
    print(f"{wheel.name}: {num_files} files, all there and nothing else; it imports and runs")


def check_files(wheel: Path, packages: list[Path]) -> int:
    """Compare the wheel with the source folders; the number of files both hold."""
    expected = {
        file.relative_to(package.parent).as_posix()
        for package in packages
        for file in package.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    for package in packages:
        # llama_index is a namespace that several distributions share: it has none.
        regular = (package / "__init__.py").is_file()
        if regular and f"{package.name}/__init__.py" not in found:
            sys.exit(f"{wheel.name} has no {package.name}/__init__.py")
    if missing := sorted(expected - found):
        sys.exit(f"{wheel.name} lacks {', '.join(missing)}: see .gitignore and pyproject.toml")
    if surplus := sorted(found - expected):
        sys.exit(f"{wheel.name} should not hold {', '.join(surplus)}")
    return len(found)


def check_import(wheel: Path, folder: Path) -> None:
    """Install the wheel into an empty folder and use it from there, away from the sources."""
    site = folder / "site"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--target", str(site), str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import mlpmem_rag, mlpmem_cli.app as app; print(mlpmem_rag.__file__, app.__file__)"
    imported = run([sys.executable, "-P", "-c", code], folder, environment)
    if imported.count(str(site)) != 2:
        sys.exit(f"imported from outside the wheel: {imported}")
    run([str(site / "bin/mlpmem-rag"), "--help"], folder, environment)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a command prints; exit with it if the command fails."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
