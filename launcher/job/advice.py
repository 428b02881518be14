"""What to do after an ending, by its class and by the kind of the stage. Pure.

Each key that is named is one that the stage has.
"""

from __future__ import annotations

from launcher.config.stages import ALL

EVERY, TRAINER, ROLLOUT, CONVERSION, EVALUATION = "every", "trainer", "rollout", "conversion", "evaluation"
TRAINERS = (TRAINER, ROLLOUT)
WITH_ROLLOUTS = ("rlhf", "grpo")
ROOM = "free space or quota where the run folder is"
RATES = (
    "look at metrics.jsonl before it; go on from an earlier checkpoint with --load-iteration, with a lower "
    "{stage}.lr or {stage}.clip_grad"
)
SHARE_OUT = (
    "or share the model out further: {stage}.tensor_parallel, {stage}.pipeline_parallel (new run: --name); "
    "resume alone would end the same way"
)
GATE = (
    "look at metrics.jsonl and the log's warnings; resume goes on from the last checkpoint, resume --from {stage} "
    "--load-iteration N from an earlier one, with another {stage}.lr"
)
SAVED = "resume goes on from what is saved"

ADVICE: dict[str, dict[str, str]] = {
    "cuda oom": {
        TRAINER: f"lower {{stage}}.micro_batch_size, {SHARE_OUT}",
        ROLLOUT: "lower {stage}.micro_batch_size ({stage}.micro_batch_tokens where it is set), "
        f"{{stage}}.generation_batch_size or {{stage}}.cache_share, {SHARE_OUT}",
        CONVERSION: "a conversion needs no GPU: resources.{stage}.gpus_per_node = 0; then resume",
        EVALUATION: "lower {stage}.batch_size or {stage}.context_length; then resume",
    },
    "host oom": {
        EVERY: "give each rank more of the node's memory: more resources.{stage}.cpus_per_gpu or whole nodes (profile: "
        "exclusive = true), or fewer ranks a node; then resume"
    },
    "nan": {
        EVERY: "look at the log: the model that is read has numbers that are not finite",
        **dict.fromkeys(TRAINERS, RATES),
    },
    "communication timeout": {
        EVERY: "see which rank is missing in the log; if it is always the same node, exclude it; else the site's "
        "network settings (profile: network)"
    },
    "disk full": {
        EVERY: f"{ROOM}; then resume",
        **dict.fromkeys(TRAINERS, f"{ROOM}, or lower {{stage}}.keep_checkpoints; then resume"),
    },
    "file error": {
        EVERY: "look at the path that is named: it must exist, and you must be allowed to read and write it; then "
        "resume"
    },
    "node failure": {EVERY: "tell the site about the node; resume goes on elsewhere"},
    "bad config": {EVERY: "correct the value that is named and submit again"},
    "bad data": {
        EVERY: "correct the row that is named, or set data.skip_bad_rows = true, and submit again",
        CONVERSION: "correct the file that is named; then resume",
        EVALUATION: "correct the file or folder that is named; then resume: what is done is kept",
    },
    "judge": {
        EVERY: "see that the judge answers: {stage}.judge, {stage}.judge_url, {stage}.judge_model and its key; resume "
        "asks only for what is missing"
    },
    "harness": {
        EVERY: "read the harness's last words; {stage}.harness_tasks and {stage}.harness_folder say what it runs; then "
        "resume"
    },
    "too few ratings": {
        EVERY: "the report says why ratings are not valid; another {stage}.judge_model or more "
        "{stage}.judge_max_tokens; then resume"
    },
    "killed": {EVERY: "find out who killed it (dmesg of the node: out of memory?); then resume"},
    "bug": {EVERY: f"read the traceback in the log; after the fix, {SAVED}"},
    "cancelled": {EVERY: SAVED},
    "stopped": {EVERY: "resume removes the file STOP and goes on from what is saved"},
    "no progress": {
        EVERY: "raise resources.{stage}.minutes, so that one attempt gets something done; then resume",
        **dict.fromkeys(
            TRAINERS,
            "raise resources.{stage}.minutes or lower {stage}.save_every, so that one attempt "
            "reaches a checkpoint; then resume",
        ),
    },
    "time limit": {
        EVERY: "raise resources.{stage}.minutes; then resume",
        **dict.fromkeys(TRAINERS, "raise resources.{stage}.minutes, or lower {stage}.save_every; then resume"),
    },
    "preempted": {EVERY: "resume, or ask for a partition or QOS that is not preempted"},
    "saved": {EVERY: SAVED},
    "preflight": {EVERY: "tell the site about the node; resume goes on elsewhere"},
    "check failed": {
        EVERY: "read the lines [preflight] of the log: Slurm or the profile's setup keeps the check from running, no "
        "node is at fault; preflight = false in the profile goes without it; then resume"
    },
    "health gate": {EVERY: f"{GATE}, or the limit moved", ROLLOUT: f"{GATE} or {{stage}}.kl_coef, or the limit moved"},
    "slurm": {EVERY: "see what Slurm says (python -m launcher doctor); resume goes on from what is saved"},
    "refused": {EVERY: "make the stage that is named run again: python -m launcher resume RUN --from STAGE"},
}
"""Class of an ending -> kind of stage -> what to do; "every" where its own kind has no words."""


def of(kind: str, stage: str) -> str:
    """What a person can do; "" where the class needs nothing."""
    texts = ADVICE.get(kind, {})
    return texts.get(group(stage), texts.get(EVERY, "")).format(stage=stage)


def group(stage: str) -> str:
    """The kind of a stage, by the package of its module."""
    if stage in WITH_ROLLOUTS:
        return ROLLOUT
    return {"conversion": CONVERSION, "eval": EVALUATION}.get(ALL[stage].module.partition(".")[0], TRAINER)
