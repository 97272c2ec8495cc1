"""`sjd2 config`: where programs in C, C++ and others find the C core."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..errors import BackendError, ConfigError


def library_facts(prefix: Path | None = None) -> dict[str, str]:
    """What each option of `sjd2 config` prints; raises BackendError where there is no library to link.

    prefix: another place than the installed package's.
    """
    from sjd2_kernels import build

    prefix = prefix or build.PACKAGE
    reason = build.why_unusable(prefix)
    if reason is not None:
        raise BackendError(reason)
    folder = shlex.quote(str(prefix))
    return {
        "prefix": str(prefix),
        "cmake_dir": str(prefix / "cmake"),
        "include": f"-I{shlex.quote(str(prefix / 'include'))}",
        "libs": f"-L{folder} -lsjd2 -Wl,-rpath,{folder}",
    }


def config(
    prefix: Annotated[bool, typer.Option("--prefix", help="The folder with the library, include/ and cmake/.")] = False,
    cmake_dir: Annotated[bool, typer.Option("--cmake-dir", help="The folder of sjd2Config.cmake.")] = False,
    include: Annotated[bool, typer.Option("--include", help="Compiler flag for sjd2.h and sjd2.hpp.")] = False,
    libs: Annotated[bool, typer.Option("--libs", help="Linker flags for the library.")] = False,
) -> None:
    """Where the C core is: folders for CMake, flags for compilers. One option at least; one line per option."""
    wanted = {"prefix": prefix, "cmake_dir": cmake_dir, "include": include, "libs": libs}
    if not any(wanted.values()):
        raise ConfigError("nothing was asked for; expected --prefix, --cmake-dir, --include or --libs")
    facts = library_facts()
    for name, given in wanted.items():
        if given:
            typer.echo(facts[name])
