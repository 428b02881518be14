"""The evaluation's work, part by part: each part finds what an earlier start has made and makes the rest."""

from __future__ import annotations

import time
from pathlib import Path

from eval import answers, generation, heldout, judge, questions
from eval.config import MTBenchConfig
from eval.endpoint import JudgeError
from eval.jsonl import DataError, append, recover


class Progress:
    """Counts what is done (answers, replies, KL estimates, ratings) into metrics.jsonl and prints a line each time."""

    def __init__(self, output: str, total: int):
        self.path, self.total, self.iteration = Path(output) / "metrics.jsonl", total, 0
        recover(self.path)

    def counter(self, label: str, total: int):
        """``done(n)`` for a part of the work with ``total`` items."""
        finished = 0

        def done(n: int) -> None:
            nonlocal finished
            if n:
                finished += n
                self.iteration += n
                append(self.path, [{"iteration": self.iteration, "total": self.total, "time": time.time()}])
                print(f"{label}: {finished}/{total}", flush=True)
        return done


class Stage:
    """What the parts share: configuration, questions, held-out prompts, models' fingerprints, progress."""

    def __init__(self, settings: MTBenchConfig):
        self.config, self.output, self.folders = settings, Path(settings.paths.output), settings.paths.models
        if not self.folders:
            raise DataError("paths.models: no model; expected one or more Hugging Face folders by name")
        self.set = questions.load(settings.questions)
        self.prompts = heldout.load(settings.paths.heldout)
        if settings.judge != "none":
            judge.require(self.set)
        for name, folder in self.folders.items():
            generation.require_model(folder, name)
        self.fingerprints = {name: generation.fingerprint(folder) for name, folder in self.folders.items()}
        self.baseline = next(iter(self.folders))
        self.places = [(prompt, sample) for prompt in self.prompts for sample in range(settings.heldout_samples)]
        ratings = 2 * len(self.set.questions) if settings.judge != "none" else 0
        kls = (len(self.folders) - 1) * len(self.places)
        self.progress = Progress(settings.paths.output,
                                 len(self.folders) * (len(self.set.questions) + len(self.places) + ratings) + kls)

    def answers(self, name: str) -> tuple[list[dict], list[dict]]:
        """(model_answer rows, held-out rows) of one model, complete and in order; its weights are loaded only if a row is missing."""
        mark, items = self.fingerprints[name], self.set.questions
        answer_path, reply_path = self.output / "model_answer" / f"{name}.jsonl", self.output / "heldout" / f"{name}.jsonl"
        answer_keys = {question.question_id: answers.key(mark, self.config, question) for question in items}
        reply_keys = {(prompt.index, sample): heldout.key(mark, self.config, prompt, sample) for prompt, sample in self.places}
        answered, replied = answers.stored(answer_path, answer_keys), heldout.stored(reply_path, reply_keys)
        answer_done = self.progress.counter(f"{name}: questions answered", len(items))
        reply_done = self.progress.counter(f"{name}: held-out replies", len(self.places))
        answer_done(len(answered))
        reply_done(len(replied))
        questions_left = [question for question in items if question.question_id not in answered]
        places_left = [(prompt, sample) for prompt, sample in self.places if (prompt.index, sample) not in replied]
        if questions_left or places_left:
            model, tokenizer = generation.load(self.folders[name])
            answers.answer(model, tokenizer, name, questions_left, answer_keys, self.config, answer_path, answer_done)
            heldout.reply(model, tokenizer, places_left, reply_keys, self.config, reply_path, reply_done)
            answered, replied = answers.stored(answer_path, answer_keys), heldout.stored(reply_path, reply_keys)
        return [answered[question.question_id] for question in items], [replied[prompt.index, sample] for prompt, sample in self.places]

    def kl(self, name: str, replies: list[dict]) -> list[dict]:
        """KL rows of one model's replies against the baseline."""
        path, base = self.output / "heldout" / f"{name}_kl.jsonl", self.fingerprints[self.baseline]
        stored = {row["key"]: row for row in recover(path)}
        left = [row for row in replies if heldout.kl_key(row, base) not in stored]
        done = self.progress.counter(f"{name}: KL to {self.baseline}", len(replies))
        done(len(replies) - len(left))
        if left:
            made = heldout.kl_rows(self.folders[name], self.folders[self.baseline], left, base, self.config)
            append(path, made)
            stored |= {row["key"]: row for row in made}
            done(len(left))
        return [stored[heldout.kl_key(row, base)] for row in replies]

    def judgments(self, made: dict[str, list[dict]]) -> tuple[list[dict], str]:
        """(judgment rows, what went wrong); both empty without a judge."""
        if self.config.judge == "none":
            return [], ""
        wanted = judge.requests(self.set, made)
        try:
            return judge.rate(self.config, wanted, self.set.prompts, self.progress.counter("ratings", len(wanted))), ""
        except JudgeError as error:
            return [], str(error)
