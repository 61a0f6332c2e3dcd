"""The command line as a person uses it, without the seconds in which a new Python imports torch."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

from lossmith import cli


class _Out(io.TextIOWrapper):
    """A pipe: UTF-8, no terminal, no file number."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def text(self):
        return self.buffer.getvalue().decode()


def lossmith(*arguments, code=0, cwd=None, columns=200):
    """`lossmith ARGUMENTS` in this process: what it wrote, and its exit code, which must be `code`."""
    given = ["lossmith", *map(str, arguments)]
    out, err = _Out(), _Out()
    here = Path.cwd()
    with (
        mock.patch.object(sys, "argv", given),
        mock.patch.object(cli, "_leave", sys.exit),  # os._exit would end the tests
        mock.patch.dict(os.environ, {"COLUMNS": str(columns), "NO_COLOR": "1"}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            os.chdir(cwd or here)
            cli.main()
            left = 0
        except SystemExit as ended:
            left = ended.code or 0
        except Exception:
            traceback.print_exc()
            left = 1
        finally:
            os.chdir(here)
    result = subprocess.CompletedProcess(given, left, out.text(), err.text())
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result
