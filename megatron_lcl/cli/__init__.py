"""The `megatron-lcl` command: arguments to library calls, errors to one line.

One file per group of commands: training, corpus, evaluation. Each has `add_commands`, which adds its parsers, and a
thin function per command, which calls the library and returns the exit code (None: 0). They may import everything, but
what is slow to import only inside the function of the command that needs it: `--help` stays quick. Nothing imports
this package except `python -m megatron_lcl` and the scripts of `tools/`. Begin with main.py.
"""

from megatron_lcl.cli.main import main

__all__ = ["main"]
