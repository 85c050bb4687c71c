"""Start of another Python process that imports what this process would, and nothing else.

By default `python -c` puts the working directory first on the module search path, so a file `json.py` in a folder with
images would be executed.
"""

from __future__ import annotations

import os
import sys

# Only `sys` is imported before the search path is set; it is built in, so no file can replace it.
_SET_PATH = "import sys; end = 2 + int(sys.argv[1]); sys.path[:] = sys.argv[2:end]; del sys.argv[1:end]\n"


def python_command(code: str, *arguments: str) -> list[str]:
    """Return the command that runs `code` in another Python process, with `arguments` in `sys.argv[1:]`.

    The process has the absolute entries of this process's module search path. So editable installs and `PYTHONPATH`
    have the same effect, and the working directory is searched only if this process has its absolute path. It ignores
    the environment variables of Python and the user's site folder (option `-I`).
    """
    path = [entry for entry in sys.path if isinstance(entry, str) and os.path.isabs(entry)]  # noqa: PTH117
    return [sys.executable, "-I", "-c", _SET_PATH + code, str(len(path)), *path, *arguments]
