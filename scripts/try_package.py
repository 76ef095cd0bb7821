"""Builds the sdist and, from it, the wheel; installs that into new environments and runs it there.

    python scripts/try_package.py

The environment of the interpreter that runs this borrows its packages (torch alone would be
gigabytes) and runs commands from an empty folder: the YAMLs, configurations and texts must have
come along. Every other Python of 3.10 to 3.13 that is at hand compiles the package.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
COMMANDS = (
    ["--version"],
    ["edit", "--help"],
    ["plan", "--config-name", "LocFT-BF+/smollm2-135m", "n=10", "device=cpu"],
    ["evaluate", "./no-such-folder", "data=no-such-file"],  # a user's mistake: status 2
)


def main() -> int:
    """Builds, installs and runs; returns 1 if a step fails."""
    with tempfile.TemporaryDirectory(prefix="locft-package-") as folder:
        try:
            _try_in(Path(folder))
        except subprocess.CalledProcessError as error:
            command = " ".join(map(str, error.cmd))
            sys.stderr.write(f"{command} ended with {error.returncode}\n{error.stdout}\n")
            return 1
    return 0


def _try_in(folder: Path) -> None:
    builder = _environment(folder / "builder")
    _run([builder, "-m", "pip", "install", "--quiet", "build"])
    _run([builder, "-m", "build", "--outdir", folder / "dist", ROOT])  # the wheel from the sdist
    [sdist], [wheel] = folder.glob("dist/*.tar.gz"), folder.glob("dist/*.whl")
    sys.stdout.write(f"built: {sdist.name}, {wheel.name}\n")

    python = _environment(folder / "own")
    own = sysconfig.get_path("purelib", vars={"base": str(folder / "own")})
    Path(own, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel])
    empty = folder / "empty"
    empty.mkdir()
    for command in COMMANDS:
        status = 2 if command[0] == "evaluate" else 0
        _run([python, "-m", "locft_easyedit", *command], cwd=empty, status=status)
    version = ".".join(map(str, sys.version_info[:2]))
    sys.stdout.write(f"{version}: installed, {len(COMMANDS)} commands run\n")

    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    [source] = (folder / "source").glob("*/locft_easyedit")
    for other in VERSIONS:
        interpreter = None if other == version else _interpreter(other)
        if interpreter is not None:
            _run([interpreter, "-m", "compileall", "-q", "-f", source])
            sys.stdout.write(f"{other}: compiled\n")


def _interpreter(version: str) -> str | None:
    """Returns a Python of a version that is at hand, pyenv's included, and runs."""
    pyenv = Path.home().glob(f".pyenv/versions/{version}.*/bin/python")
    for found in (shutil.which(f"python{version}"), *map(str, sorted(pyenv))):
        if found and subprocess.run([found, "-V"], capture_output=True).returncode == 0:
            return found
    return None


def _environment(folder: Path) -> Path:
    """Makes an environment; returns its interpreter."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def _run(command: Sequence[str | Path], *, cwd: Path | None = None, status: int = 0) -> None:
    """Runs a command.

    Raises:
        CalledProcessError: It ends with another status.
    """
    done = subprocess.run(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != status:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout)


if __name__ == "__main__":
    sys.exit(main())
