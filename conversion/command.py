"""The outermost function of the conversions: a stage's config.json, or a person's command line; the same exit codes as any stage."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from training.checksums import Damaged
from training.settings import ConfigError, load


def main(kind, stage: Callable, parser: ArgumentParser, from_arguments: Callable[[Namespace], object]) -> int:
    """``stage(config)`` with the configuration of class ``kind`` from one .json argument, else from ``parser``'s arguments.

    Needs no process group. Returns 0, 64 (bad configuration), 65 (damaged checkpoint) or 74 (full disk).
    """
    arguments = sys.argv[1:]
    try:
        is_config = len(arguments) == 1 and arguments[0].endswith(".json")
        stage(load(kind, arguments[0]) if is_config else from_arguments(parser.parse_args(arguments)))
    except ConfigError as error:
        return failed(error, os.EX_USAGE)
    except Damaged as error:
        return failed(error, os.EX_DATAERR)
    except OSError as error:
        return failed(f"{error}; what is written is kept: run the same again to go on", os.EX_IOERR)
    except SystemExit as stopped:  # argparse: it has said what is wrong, or shown its help
        return os.EX_USAGE if stopped.code else 0
    except KeyboardInterrupt:
        return failed("interrupted; run the same again to go on", 130)
    return 0


def failed(reason, code: int) -> int:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    return code
