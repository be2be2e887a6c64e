"""Python commands in processes that find the libraries imported, which takes longer than most of the commands.

They are forked from a server that has imported the libraries and nothing of this project, and see it as a new
interpreter would: by PYTHONPATH and the script's own folder.
"""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = ["torch", "transformers.trainer", "transformers.models.gpt_neox.modeling_gpt_neox", "datasets"]


def server() -> multiprocessing.context.BaseContext:
    """Where processes are forked; the server starts once, whoever asks first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    multiprocessing.forkserver.ensure_running()
    return context


def _run(words: list[str], folder: str, python_path: str, outputs: tuple[str, str]) -> None:
    for stream, output in enumerate(outputs, start=1):
        os.dup2(os.open(output, os.O_WRONLY), stream)
    os.environ["PYTHONPATH"] = python_path  # also of the processes that the command starts
    path = paths_of(python_path)
    os.chdir(folder)
    sys.path_importer_cache.clear()  # of relative paths
    option, rest = words[0], words[1:]
    sys.argv[:] = [option, *rest[1:]] if option in ("-c", "-m") else words
    sys.path[:] = ["" if option in ("-c", "-m") else str(Path(option).parent.absolute()), *path]
    if option == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(option, run_name="__main__")


@functools.cache
def paths_of(python_path: str) -> list[str]:
    """Where a new interpreter looks for modules."""
    code, environment = "import sys; print('\\n'.join(sys.path[1:]))", {**os.environ, "PYTHONPATH": python_path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def run_python(words: list[str], folder: Path, python_path: str) -> tuple[int, str, str]:
    """`python words` in a folder: a script, `-c` text or `-m` module, and arguments.

    Returns:
        Exit code, stdout and stderr.
    """
    with tempfile.TemporaryDirectory() as place:
        outputs = Path(place, "stdout"), Path(place, "stderr")
        for output in outputs:
            output.touch()
        arguments = (words, str(folder), python_path, tuple(map(str, outputs)))
        process = server().Process(target=_run, args=arguments)
        process.start()
        process.join()
        return process.exitcode, *(output.read_text(encoding="utf-8") for output in outputs)
