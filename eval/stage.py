"""The evaluation's work, part by part: each part finds what an earlier start has made and makes the
rest."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from eval import harness, questions
from eval.answers import chat, dialogue, generation, heldout
from eval.config import MTBenchConfig
from eval.errors import DataError, JudgeError
from eval.files import fingerprint, rows
from eval.files.jsonl import append, dump, recover
from eval.judge import ask_all, local_server, pairwise, single
from eval.scores import reward_model
from eval.work_split import Ranks

_SCORER, _JUDGE = "/reward model", "/judge"
"""Beside the models' names, which hold no slash."""


class Progress:
    """Counts what is done (answers, replies, KL estimates, ratings) into metrics.jsonl and prints a
    line each time; rank 0 does so."""

    def __init__(self, output: str, total: int, speaks: bool):
        self.path, self.total, self.speaks, self.iteration = Path(output) / "metrics.jsonl", total, speaks, 0
        if speaks:
            recover(self.path)

    def counter(self, label: str, total: int):
        """``done(n)`` for a part of the work with ``total`` items."""
        finished = 0

        def done(n: int) -> None:
            nonlocal finished
            if n and self.speaks:
                finished += n
                self.iteration += n
                append(self.path, [{"iteration": self.iteration, "total": self.total, "time": time.time()}])
                print(f"{label}: {finished}/{total}", flush=True)

        return done


class Stage:
    """What the parts share: configuration, questions, held-out prompts, models' fingerprints,
    progress, ranks."""

    def __init__(self, settings: MTBenchConfig, ranks: Ranks):
        self.config, self.output, self.folders, self.ranks = (
            settings,
            Path(settings.paths.output),
            settings.paths.models,
            ranks,
        )
        if not self.folders:
            raise DataError("paths.models: no model; expected one or more Hugging Face folders by name")
        self.set = questions.load(settings.questions, settings.references)
        self.prompts = heldout.load(settings.paths.heldout)
        if settings.judge_kind:
            single.require(self.set)
            if settings.judge_pairwise:
                pairwise.require(self.set, list(self.folders))
        for name, folder in self.folders.items():
            generation.require_model(folder, f"paths.models.{name}")
            if settings.template == "chat":
                chat.check(folder)
        harness.require(settings)
        if settings.reward_model:
            generation.require_model(settings.reward_model, "mtbench.reward_model")
        folder_of_judge = settings.judge_model if settings.judge_kind and settings.judge_kind.model_is_folder else ""
        if folder_of_judge:
            generation.require_model(folder_of_judge, "mtbench.judge_model")
            ranks.once(lambda: local_server.takes_system(folder_of_judge))
        folders = self.folders | {
            _SCORER: settings.reward_model,
            _JUDGE: folder_of_judge,
        }
        marks = ranks.once(lambda: {name: fingerprint.of_model(folder) for name, folder in folders.items() if folder})
        self.scorer, self.judge = marks.pop(_SCORER, ""), marks.pop(_JUDGE, "")
        self.fingerprints = marks
        self.baseline = next(iter(self.folders))
        self.places = [(prompt, sample) for prompt in self.prompts for sample in range(settings.heldout_samples)]
        self.progress = Progress(settings.paths.output, self._total(), ranks.rank == 0)

    def _total(self) -> int:
        items, models, others = len(self.set.questions), len(self.folders), len(self.folders) - 1
        ratings = 2 * items * (models * self.config.judge_repeats + others * self.config.judge_pairwise)
        return models * (items + len(self.places)) + others * len(self.places) + ratings * bool(self.config.judge_kind)

    def answers(self, name: str) -> tuple[list[dict], list[dict]]:
        """(model_answer rows, held-out rows) of one model, complete and in order; its weights are
        loaded only if a row is missing."""
        mark, items, ranks = self.fingerprints[name], self.set.questions, self.ranks
        answer_path, reply_path = (
            self.output / "model_answer" / f"{name}.jsonl",
            self.output / "heldout" / f"{name}.jsonl",
        )
        answer_keys = {question.question_id: dialogue.key(mark, self.config, question) for question in items}
        reply_keys = {
            (prompt.index, sample): heldout.key(mark, self.config, prompt, sample) for prompt, sample in self.places
        }
        answer_done = self.progress.counter(f"{name}: questions answered", len(items))
        reply_done = self.progress.counter(f"{name}: held-out replies", len(self.places))

        def stored() -> tuple[dict, dict]:
            answered = ranks.gather(answer_path, lambda row: (row["question_id"],), rows.ANSWER)
            replied = ranks.gather(reply_path, _by_place, rows.REPLY)
            return dialogue.stored(answered, answer_keys), heldout.stored(replied, reply_keys)

        answered, replied = stored()
        answer_done(len(answered))
        reply_done(len(replied))
        questions_left = ranks.mine([question for question in items if question.question_id not in answered])
        places_left = ranks.mine(
            [(prompt, sample) for prompt, sample in self.places if (prompt.index, sample) not in replied]
        )
        if questions_left or places_left:
            model, tokenizer = generation.load(self.folders[name])
            dialogue.answer(
                model, tokenizer, name, questions_left, answer_keys, self.config, ranks.own(answer_path), answer_done
            )
            heldout.reply(model, tokenizer, places_left, reply_keys, self.config, ranks.own(reply_path), reply_done)
            del model
            release()
        total = len(answered) + len(questions_left), len(replied) + len(places_left)
        answered, replied = stored()
        answer_done(len(answered) - total[0])  # the other ranks'
        reply_done(len(replied) - total[1])
        return [answered[question.question_id] for question in items], [
            replied[prompt.index, sample] for prompt, sample in self.places
        ]

    def kl(self, name: str, replies: list[dict]) -> list[dict]:
        """KL rows of one model's replies against the baseline."""
        path, base = self.output / "heldout" / "kl" / f"{name}.jsonl", self.fingerprints[self.baseline]

        def stored() -> dict[str, dict]:
            return {row["key"]: row for row in self.ranks.gather(path, _by_place, rows.KL)}

        known = stored()
        left = [row for row in replies if heldout.kl_key(row, base) not in known]
        done = self.progress.counter(f"{name}: KL to {self.baseline}", len(replies))
        done(len(replies) - len(left))
        if local := self.ranks.mine(left):
            append(
                self.ranks.own(path),
                heldout.kl_rows(self.folders[name], self.folders[self.baseline], local, base, self.config),
            )
            release()
        known = stored()
        done(len(left))
        return [known[heldout.kl_key(row, base)] for row in replies]

    def scores(self, name: str, replies: list[dict]) -> list[dict]:
        """Rows {"index", "sample", "key", "score"} of one model's replies by the reward model; none
        without one."""
        folder, path = self.config.reward_model, self.output / "heldout" / "score" / f"{name}.jsonl"
        if not folder:
            return []

        def key(row: dict) -> str:
            return f"{row['key']}-{heldout.content_hash(row['response'])}-{self.scorer}"

        def stored() -> dict[str, dict]:
            return {row["key"]: row for row in self.ranks.gather(path, _by_place, rows.SCORE)}

        known = stored()
        if local := self.ranks.mine([row for row in replies if key(row) not in known]):
            limit = self.config.context_length - self.config.heldout_max_new_tokens
            by_index = {prompt.index: prompt for prompt in self.prompts}
            pairs = [(by_index[row["index"]], row["response"]) for row in local]
            values = reward_model.score(folder, pairs, limit)
            append(
                self.ranks.own(path),
                [
                    {"index": row["index"], "sample": row["sample"], "key": key(row), "score": value}
                    for row, value in zip(local, values, strict=True)
                ],
            )
            release()
        known = stored()
        return [known[key(row)] for row in replies]

    def judge_settings(self) -> dict:
        """What ratings depend on beyond the judge's name: to be equal where two evaluations share a
        table."""
        settings = self.config
        if not settings.judge_kind:
            return {}
        return {"max_tokens": settings.judge_max_tokens, "request": settings.request_fields(), "model": self.judge}

    def judgments(self, answers_by_model: dict[str, list[dict]]) -> tuple[list[dict], list[dict], str]:
        """(judgment rows, pairwise rows, what went wrong: then some rows are missing); all empty
        without a judge."""
        if not self.config.judge_kind:
            return [], [], ""
        works = ask_all.ratings(self.config, self.set, answers_by_model, self.judge)
        try:
            judged = ask_all.rate(
                self.config,
                works,
                self.set.prompts,
                self.progress.counter("ratings", sum(len(w.wanted) for w in works)),
            )
            problem = ""
        except JudgeError as error:
            judged, problem = ask_all.paid(self.config, works), str(error)
        return judged[0], judged[1] if self.config.judge_pairwise else [], problem

    def write_questions(self) -> None:
        """question.jsonl and reference_answer/ beside the answers, as FastChat's tools expect them;
        the report reads them, too."""
        dump(
            self.output / "question.jsonl",
            [
                {"question_id": item.question_id, "category": item.category, "turns": list(item.turns)}
                | ({"reference": list(item.reference)} if item.reference else {})
                for item in self.set.questions
            ],
        )


def _by_place(row: dict) -> tuple:
    return row["index"], row["sample"]


def release() -> None:
    """Give a model's memory back to the device: the next one, or a judge's server, needs it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
