"""Responses of several turns: the policy says one, an environment answers it, and the policy goes on.

What is said and heard is spliced as token ids (`Trajectory`). Which requests run beside each other is the engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from rethinker.config import Config
from rethinker.data.datasets import BadRowError
from rethinker.data.images import UnreadableImageError
from rethinker.data.prompts import PromptEncoder
from rethinker.environments import Observation
from rethinker.environments.runner import Runner
from rethinker.samples import Completion, Observed, Prompt, Query
from rethinker.trajectory import Trajectory


class Dialogue:
    """The environment of a run, and how its answers reach the model."""

    def __init__(self, config: Config, encoder: PromptEncoder) -> None:
        """
        Raises:
            ConfigError: `environment.use` names something that cannot be used, or the chat template has no turns.
        """
        self.config, self.encoder = config.environment, encoder
        encoder.check_answers()  # a chat template's faults are to come before a rollout
        self.runner = Runner(self.config, encoder.open_image, encoder.shown_size, config.rethink.triggers)
        self.runner.start()  # so that the first turns need not wait for it

    def close(self) -> None:
        """End the environment's processes."""
        self.runner.close()


class Conversation:
    """A response while it is made: an engine opens it, and samples from `prompt`, at most `room` tokens, as long as it
    `goes_on`.

    Attributes:
        waits: what the next `goes_on` waits for, if it is not there yet; None before `open`.
        turns: how many turns the policy has said.
    """

    def __init__(self, dialogue: Dialogue, query: Query, prompt: Prompt, max_new_tokens: int) -> None:
        self._dialogue, self._query = dialogue, query
        self._response = Trajectory(prompt, max_new_tokens)
        self._text, self._finish_reason = "", "stop"
        self._observed: list[Observed] = []
        self._turn: Completion | None = None  # said, and not answered yet
        self._state: Any = None
        self.turns = 0
        self.waits: Future | None = None

    @property
    def prompt(self) -> Prompt:
        """What the next turn goes on from."""
        return self._response.prompt

    @property
    def room(self) -> int:
        """The longest that the next turn may be, in tokens."""
        return self._response.room

    def open(self) -> None:
        """Ask the environment for the state in which the response begins; an open conversation holds it."""
        self.waits = self._dialogue.runner.reset(self._query)

    def say(self, turn: Completion) -> None:
        """Take the policy's next turn, and ask the environment about it if it ended by itself."""
        self.turns += 1
        self._turn, self._finish_reason = turn, turn.finish_reason
        if turn.finish_reason == "stop":
            words = self._dialogue.encoder.decode(turn.token_ids[:-1], special=True)
            self.waits = self._dialogue.runner.step(self._state, words)

    def goes_on(self) -> bool:
        """Whether the policy is to say another turn, once the environment has answered.

        Raises:
            RuntimeError: the environment was closed meanwhile.
        """
        if self.waits.cancelled():
            raise RuntimeError("the environment was closed while a response waited for it")
        if self._turn is None:
            self._state = self.waits.result()
            return True
        turn, self._turn = self._turn, None
        if turn.finish_reason != "stop":
            return self._end(turn)
        self._state, answer = self.waits.result()
        if answer.done:
            return self._end(turn, answer)
        if self.turns == self._dialogue.config.max_turns:
            return self._end(turn, answer, "turns")
        answer = replace(
            answer, text=self._dialogue.encoder.shortened(answer.text, self._dialogue.config.max_text_tokens)
        )
        heard, kept = self._heard(turn, answer)
        if isinstance(heard, str):
            return self._end(turn, answer, heard)
        if kept + len(heard.token_ids) >= self.room:
            self._finish_reason = "length"
            return self._end(turn, answer, "room")
        self._response.say(turn, kept)
        self._response.hear(heard.token_ids, heard.compact_ids, heard.images)
        self._note(turn, answer, answer.text, len(heard.token_ids))
        return True

    def completion(self) -> Completion:
        """The response, once it does not go on."""
        return self._response.completion(self._text, finish_reason=self._finish_reason, observed=tuple(self._observed))

    def _heard(self, turn: Completion, answer: Observation) -> tuple[Prompt | str, int]:
        """The tokens of an answer and how many of the turn's they follow; or why the policy cannot hear it."""
        encoder, config = self._dialogue.encoder, self._dialogue.config
        shown = sum(len(part.images) for part in self._observed)
        if shown + len(answer.images) > config.max_images:
            return "images", 0
        if answer.role == "assistant":
            ids = encoder.continuation(answer.text)
            return Prompt(self._query.id, ids, ids, []), turn.tokens - 1
        try:
            heard = encoder.observation(answer.text, _references(answer), self._query.id)
        except (UnreadableImageError, BadRowError):  # no image, or of a shape that the model does not take
            return "image", 0
        if heard.token_ids[0] != turn.token_ids[-1]:  # it ended with another token than a turn does
            return "end", 0
        ids, compact = heard.token_ids[1:], heard.compact_ids[1:]
        return Prompt(self._query.id, ids, compact, heard.images), turn.tokens

    def _end(self, turn: Completion, answer: Observation | None = None, *reasons: str) -> bool:
        self._response.say(turn)
        self._response.forget_images()
        if answer and (answer.reward or answer.calls or answer.failures or reasons):
            self._note(turn, answer, "", 0, reasons)
        else:
            self._text += turn.text
        return False

    def _note(self, turn: Completion, answer: Observation, text: str, length: int, reasons: Sequence[str] = ()) -> None:
        """Note what was said, and what was answered to it: the last `length` tokens so far."""
        self._text += turn.text
        end = self._response.tokens
        images = _references(answer) if length else ()
        outcome = {"reward": answer.reward, "calls": answer.calls, "failures": (*answer.failures, *reasons)}
        self._observed.append(Observed(end - length, end, len(self._text), text, images, **outcome))


def _references(answer: Observation) -> tuple[dict[str, bytes], ...]:
    return tuple({"bytes": image} for image in answer.images)
