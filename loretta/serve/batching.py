"""Generates for many requests at once: what waits when a batch ends is the next batch, whatever adapters it names."""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from loretta.serve.adapters import StoreModel

Piece = tuple[str, "str | Exception | None"]  # more text and, with the last, why it is the last


class Overloaded(Exception):
    """As many requests wait as may."""


@dataclass(eq=False)
class Job:
    """One request, and what was generated for it.

    Attributes:
        prompt: token ids, at least one.
        adapter: its name, or None for the base model.
        max_tokens: after as many the job ends.
        temperature, top_p: 0 takes the likeliest token, else one is drawn from the likeliest that together have top_p.
        seed: of what is drawn; one seed draws the same tokens in any batch where the probabilities are the same.
        stop: texts that end the job; they are not part of the answer.
        emit: called in the batcher's thread with a piece: more of the text and, at the last call, "stop", "length" or
            the error that ended the job.
        tokens: how many were generated.
        ended: whether nothing more is to be generated.
    """

    prompt: list[int]
    adapter: str | None
    max_tokens: int
    emit: Callable[[Piece], object]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    tokens: int = 0
    ended: bool = False
    _window: list[int] = field(default_factory=list)  # the last tokens: enough to tell the text of the next one
    _shown: int = 0  # of the window, tokens whose text is in _held or was emitted
    _held: str = ""  # text that may be the start of a stop
    _generator: torch.Generator | None = None

    def push(self, token: int, is_end: bool, decode: Callable[[list[int]], str]) -> None:
        """Take the next token: emit what it makes certain of the text, and end where it is the last."""
        self.tokens += 1
        if not is_end:
            self._window.append(token)
        is_last = is_end or self.tokens == self.max_tokens
        self._held += self._new_text(decode, is_last)
        found = [at for text in self.stop if (at := self._held.find(text)) >= 0]
        if found:
            self.end(self._held[: min(found)], "stop")
        elif is_last:
            self.end(self._held, "stop" if is_end else "length")
        else:
            keep = max(
                (n for text in self.stop for n in range(1, len(text)) if self._held.endswith(text[:n])), default=0
            )
            text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
            if text:
                self.emit((text, None))

    def end(self, text: str, reason: str | Exception) -> None:
        """Emit the last text, and why it is the last."""
        self.ended = True
        self.emit((text, reason))

    def draw(self, scores: Tensor) -> int:
        """The next token by its scores [vocabulary], with temperature above 0."""
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            self._generator.seed() if self.seed is None else self._generator.manual_seed(self.seed)
        probabilities, tokens = torch.softmax(scores.float() / self.temperature, -1).sort(descending=True, stable=True)
        kept = probabilities.cumsum(-1) - probabilities < self.top_p
        return int(tokens[torch.multinomial(probabilities * kept, 1, generator=self._generator)])

    def _new_text(self, decode: Callable[[list[int]], str], is_last: bool) -> str:
        """The text of tokens that are not shown yet; nothing while they end amid a character."""
        text = decode(self._window)
        if text.endswith("\ufffd") and not is_last:
            return ""
        new = text[len(decode(self._window[: self._shown])) :]
        if new:  # a window of special tokens alone would begin a text, whose first blank some tokenizers leave out
            del self._window[: self._shown]
            self._shown = len(self._window)
        return new


class Batcher:
    """A thread that generates, with `transformers`' own `generate`, for the jobs that it is given.

    Jobs are taken in the order in which they came, as many as wait and at most `max_batch`, and padded on the left. A
    batch goes on until its last job has ended; a job that ends earlier has its answer then, but its row is computed on.

    Args:
        model: the base model with the store.
        tokenizer: the base model's, with a padding token.
        max_batch: the most jobs that are generated together.
        max_waiting: the most jobs that wait.
    """

    def __init__(self, model: StoreModel, tokenizer: Any, max_batch: int = 16, max_waiting: int = 256) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_batch, self.max_waiting = max_batch, max_waiting
        config = model.model.config
        self.context: int = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**20
        ends = model.model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    @property
    def load(self) -> tuple[int, int]:
        """How many jobs wait, and how many are generated."""
        with self._changed:
            return len(self._waiting), sum(not job.ended for job in self._running)

    def submit(self, job: Job) -> None:
        """Have a job generated.

        Raises:
            Overloaded: too many wait.
        """
        with self._changed:
            if len(self._waiting) >= self.max_waiting or self._closed:
                raise Overloaded
            self._waiting.append(job)
            self._changed.notify()

    def leave(self, job: Job) -> None:
        """Generate no more for a job: its client has gone, or it has ended."""
        with self._changed:
            job.ended = True
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """End all jobs and the thread."""
        with self._changed:
            self._closed = True
            for job in (*self._waiting, *self._running):
                job.ended = True
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                self._running = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.max_batch))]
            self._run_batch()
            with self._changed:
                self._running = []

    def _run_batch(self) -> None:
        try:
            refused = self.model.fetch([job.adapter for job in self._running])
            for job in self._running:
                if job.adapter in refused:
                    job.end("", refused[job.adapter])
            self._generate([job for job in self._running if not job.ended])
        except Exception as error:  # whatever it is, the next batch may be well
            traceback.print_exc()
            for job in self._running:
                if not job.ended:
                    job.end("", error)

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        width = max(len(job.prompt) for job in jobs)
        pad, device = self.tokenizer.pad_token_id, self.model.model.device
        ids = torch.tensor([[pad] * (width - len(job.prompt)) + job.prompt for job in jobs], device=device)
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs], device=device)
        self.model.generate(
            [job.adapter for job in jobs],
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=pad,
            max_new_tokens=max(job.max_tokens for job in jobs),
            do_sample=False,  # a drawn token is drawn by the job
            logits_processor=LogitsProcessorList([_Draw(jobs)]),
            stopping_criteria=StoppingCriteriaList([_Push(jobs, self._ends, self._decode)]),
        )

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Draw(LogitsProcessor):
    """Leaves to each job that draws its tokens the drawn one alone."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, job in enumerate(self.jobs):
            if job.temperature and not job.ended:
                token = job.draw(scores[row])
                scores[row] = -torch.inf
                scores[row, token] = 0
        return scores


class _Push(StoppingCriteria):
    """Hands each job its next token, and tells `generate` which jobs have ended."""

    def __init__(self, jobs: list[Job], ends: set[int], decode: Callable[[list[int]], str]) -> None:
        self.jobs, self.ends, self.decode = jobs, ends, decode

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for job, token in zip(self.jobs, input_ids[:, -1].tolist(), strict=True):
            if not job.ended:
                job.push(token, token in self.ends, self.decode)
        return torch.tensor([job.ended for job in self.jobs], device=input_ids.device)
