"""The command line: the group of all commands, and what an error of theirs becomes."""

from __future__ import annotations

import click

from launcher.commands import resume, site, status, submit
from training.errors import ConfigError


class Commands(click.Group):
    """Turns the project's errors into click's.

    A user's mistake exits 2 and names its fix. Any other failure exits 1.
    """

    def list_commands(self, context: click.Context) -> list[str]:
        """In the order in which they were added: the one in which a person needs them."""
        return list(self.commands)

    def invoke(self, context: click.Context):
        from launcher.run.folder import Busy, Failed
        from launcher.run.manifest import Refused
        from launcher.slurm.commands import SlurmError
        from launcher.status.terminal import plain

        try:
            return super().invoke(context)
        except ConfigError as error:
            raise click.UsageError(plain(error)) from None
        except BrokenPipeError:  # | head: its reader has seen enough; click ends quietly
            raise
        except (Failed, SlurmError, Busy, Refused, OSError) as error:
            raise click.ClickException(plain(error)) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def main():
    """Convoy: RLHF on Slurm. From a Hugging Face checkpoint (BLOOM, Llama, Mistral, Qwen)
    through SFT, reward model and PPO, GRPO or DPO to a report.

    \b
    What is here:                doctor
    Try it on this machine:      submit full-pipeline --wait
    DPO instead of PPO:          submit full-pipeline --pipeline dpo --name dpo
    See what would run:          plan full-pipeline --recipe bloom-7b1 --profile a100
    On a cluster:                submit full-pipeline --recipe bloom-7b1 --profile a100
    Then:                        status RUN, watch RUN, logs RUN -f, report RUN
    After a failure:             resume RUN

    \b
    RUN is a run's folder (runs/demo) or its name below runs/ (demo).
    Exit codes of a command:
      0    done: started, queued, shown; with --wait all stages are DONE
      1    it failed, or Slurm refused or did not answer; nothing is left half queued
      2    a mistake on the command line, in a configuration or in the data; nothing was started
      130  interrupted by Ctrl-C
    Exit codes of a stage's job:
      0    DONE
      75   saved and queued again
      64   bad configuration
      65   bad data or a damaged checkpoint
      73   a file can't be read or written
      74   full disk
      76   paused or stopped by a health gate
      4    too few valid ratings for an average
      143  stopped
      others: it failed, status says why
    """


for command in (
    site.doctor,
    submit.plan,
    submit.submit,
    submit.render,
    status.status,
    status.watch,
    status.logs,
    resume.resume,
    resume.cancel,
    status.report,
    site.completion_command,
):
    main.add_command(command)
