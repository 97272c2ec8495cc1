"""Build the C core with any C++ compiler: `python -m sjd2_kernels.build`.

Needs the standard library only, so that setup.py can load this file before anything is installed. The library, a
JSON that says what was built, and what programs of others need to compile and link against it (`include`, `cmake`,
`src`) stand beside this file; a library of other sources or for another machine is not used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LIBRARY = "libsjd2.so"
FACTS = "libsjd2.json"
UNITS = ("cpu.cpp", "kernels.cpp", "window.cpp")
HEADERS = ("sjd2.h", "checks.h", "core.h", "dims.h", "kernels.h", "lanes.h", "rows.h", "threads.h")
# For programs that embed the core: where in the package each file goes.
SHARED = {
    "include": ("sjd2.h", "sjd2.hpp"),
    "cmake": ("cmake/sjd2Config.cmake", "cmake/sjd2ConfigVersion.cmake"),
    "src": ("torch_ops.cpp",),
}
# Without contraction into fused multiply-adds every instruction set gives the same bits; the other two -fno flags
# only let loops be vectorised, they change no value.
STRICT = ("-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-pthread")
# Programs find the library by this name, in the folders that their linker was told.
NAMED = f"-Wl,-install_name,@rpath/{LIBRARY}" if sys.platform == "darwin" else f"-Wl,-soname,{LIBRARY}"
FLAGS = (*STRICT, "-O3", "-fPIC", "-shared", "-fvisibility=hidden", NAMED)
COMMAND = "python -m sjd2_kernels.build"


class BuildError(RuntimeError):
    """The C core could not be built; the message says why."""


def source_directory() -> Path | None:
    """Where the C sources are: in the package, or in the repository that it belongs to."""
    for folder in (PACKAGE / "csrc", PACKAGE.parents[1] / "csrc"):
        if (folder / "sjd2.h").is_file():
            return folder
    return None


def source_files() -> tuple[str, ...]:
    """Everything in csrc that is compiled or handed on, as paths below it."""
    return tuple(dict.fromkeys((*UNITS, *HEADERS, *(name for names in SHARED.values() for name in names))))


def source_hash(sources: Path) -> str:
    """One hash over everything that the library is made of."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in source_files():
        digest.update(name.encode() + (sources / name).read_bytes())
    return digest.hexdigest()


def find_compiler() -> list[str] | None:
    """The C++ compiler as the start of a command: $CXX, else c++, g++ or clang++; None without any."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    return None


def compile_command(output: Path, units: Sequence[Path], flags: Sequence[str], sources: Path) -> list[str]:
    """The command line that compiles and links `units`; raises BuildError without a compiler."""
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or name one in $CXX")
    return [*compiler, *flags, "-I", str(sources), *map(str, units), "-o", str(output)]


def run_compiler(command: Sequence[str]) -> None:
    """Run a compile command; raises BuildError with what the compiler said."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise BuildError(f"`{shlex.join(command)}` failed:\n{said[-4000:]}") from error


def build(target: Path = PACKAGE, sources: Path | None = None) -> Path:
    """Compile the library into the folder `target` and write what was built beside it; raises BuildError.

    A running process that has loaded an older library keeps it.
    """
    sources = sources or source_directory()
    if sources is None:
        raise BuildError(f"the C sources are neither in {PACKAGE / 'csrc'} nor in a repository around the package")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / LIBRARY
        command = compile_command(library, [sources / unit for unit in UNITS], FLAGS, sources)
        run_compiler(command)
        asked = subprocess.run([*(find_compiler() or ()), "--version"], capture_output=True, text=True, check=False)
        facts = {
            "compiler": asked.stdout.partition("\n")[0],
            "flags": list(FLAGS),
            "system": sys.platform,
            "machine": platform.machine(),
            "sources": source_hash(sources),
        }
        target.mkdir(parents=True, exist_ok=True)
        for folder, names in SHARED.items():
            (target / folder).mkdir(exist_ok=True)
            for name in names:
                _place((sources / name).read_bytes(), target / folder / Path(name).name, 0o644)
        _place(library.read_bytes(), target / LIBRARY)
        _place((json.dumps(facts, indent=1) + "\n").encode(), target / FACTS, 0o644)
    return target / LIBRARY


def why_unusable(target: Path = PACKAGE) -> str | None:
    """Why the library in `target` cannot be used, with what to do; None when it can."""
    if not (target / LIBRARY).is_file():
        return f"the C core is not built: `{COMMAND}` builds it, with any C++ compiler"
    try:
        facts = json.loads((target / FACTS).read_text())
        built_for, here = (facts["system"], facts["machine"]), (sys.platform, platform.machine())
        hashed = facts["sources"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{target / FACTS} is missing or unreadable: `{COMMAND}` builds the C core anew"
    if built_for != here:
        return f"the C core was built for {built_for}, this is {here}: `{COMMAND}` builds it anew"
    sources = source_directory()
    if sources is not None and source_hash(sources) != hashed:
        return f"the C core was built from other sources than {sources}: `{COMMAND}` builds it anew"
    return None


def _place(content: bytes, path: Path, mode: int = 0o755) -> None:
    """Write whole or not at all: other processes may be loading the old file."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def main() -> None:
    """Build into the package and say where."""
    try:
        print(f"built {build()}")
    except (BuildError, OSError) as error:
        sys.exit(f"sjd2_kernels.build: {error}")


if __name__ == "__main__":
    main()
