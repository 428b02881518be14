"""The outermost function of the conversions: a stage's config.json, or a person's command line; the
same exit codes as any stage."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from training import error_report
from training.config.schema import load
from training.errors import ConfigError, Damaged


def main(kind, stage: Callable, parser: ArgumentParser, from_arguments: Callable[[Namespace], object]) -> int:
    """``stage(config)`` with the configuration of class ``kind`` from one .json argument, else from
    ``parser``'s arguments.

    Needs no process group. Returns 0, 75 (a stage that a signal stopped: it goes on where it was),
    or what training.error_report says of an error; a bug's traceback is printed.
    """
    arguments = sys.argv[1:]
    try:
        is_config = len(arguments) == 1 and arguments[0].endswith(".json")
        if is_config:
            obey_signals()
            error_report.versions()
        stage(load(kind, arguments[0]) if is_config else from_arguments(parser.parse_args(arguments)))
    except Stopped as stopped:
        print(f"{stopped}: what is written is kept, the same again goes on", flush=True)
        return os.EX_TEMPFAIL
    except (ConfigError, Damaged) as error:
        return error_report.printed(error)
    except OSError as error:
        print(f"error: {error}; what is written is kept: run the same again to go on", file=sys.stderr, flush=True)
        return error_report.of(error)
    except SystemExit as stopped:  # argparse: it has said what is wrong, or shown its help
        return os.EX_USAGE if stopped.code else 0
    except KeyboardInterrupt:
        print("error: interrupted; run the same again to go on", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        traceback.print_exc()
        return error_report.of(error)
    return 0


class Stopped(BaseException):
    """A signal asks the stage to end; no ``except Exception`` on the way holds it up."""


def obey_signals() -> None:
    """USR1 (time limit ahead) and TERM end the stage with 75: it wants to go on."""

    def stop(number: int, _frame) -> None:
        for each in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # the request is repeated
        raise Stopped(f"stopped by {signal.Signals(number).name}")

    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, stop)
