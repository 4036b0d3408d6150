# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
"""
Runs a script, or `-m` and a module, as Python would, and ends the process without taking the interpreter down.

Gloo's worker threads may still be dropping their last tensors then, and a thread that asks for the lock of an
interpreter that is being taken down aborts the process after all its work is done ("terminate called without an active
exception", https://github.com/pytorch/pytorch/issues/190489): once in about 75 runs on a busy machine.
"""

import os
import runpy
import sys


def main() -> None:
    del sys.argv[0]
    code = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
