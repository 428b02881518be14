"""The kinds of judge, one row each: what ``mtbench.judge`` may name. Standard library only: the
launcher reads the rows through ``eval.config``."""

from __future__ import annotations

from dataclasses import dataclass

NO_JUDGE = "none"
"""The value of ``mtbench.judge`` without a judge."""


@dataclass(frozen=True)
class JudgeKind:
    module: str
    """Module with ``open_judge(config, budget)``, a context manager that yields an
    ``eval.judge.protocol.Judge``. It is imported when judging begins."""
    advice: str
    """How a user chooses this kind; the report prints it where no judge has rated the answers."""
    hosted: bool = False
    """Is it asked at ``judge_url``, with the key of ``judge_key_variable`` or ``judge_key_file``?
    Both are checked before anything is queued."""
    model_is_folder: bool = False
    """Is ``judge_model`` a Hugging Face folder? It is looked for before anything is queued, and
    ratings by another content of it are not reused."""


JUDGES: dict[str, JudgeKind] = {
    "openai": JudgeKind(
        module="eval.judge.endpoint",
        hosted=True,
        advice='A hosted judge: set mtbench.judge = "openai", mtbench.judge_url to the address of any '
        "OpenAI-compatible endpoint, mtbench.judge_model to its model, put the key in the environment variable that "
        "mtbench.judge_key_variable names, and run the stage mtbench again.",
    ),
    "local": JudgeKind(
        module="eval.judge.local_server",
        model_is_folder=True,
        advice='A judge of your own: set mtbench.judge = "local" and mtbench.judge_model to the Hugging Face folder '
        "of a strong model; the stage serves it inside its own allocation (vllm serve where it is installed) while "
        "it needs it. A small model is no judge.",
    ),
}
