"""The tools `crop` and `python`: a turn's calls, one after the other, and what the model reads of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from rethinker.config import EnvironmentConfig
from rethinker.environments import Observation
from rethinker.environments.calls import Call, CallError, calls_of, harmless, takes
from rethinker.environments.crop import Cropper, Seen, describe
from rethinker.environments.python import DESCRIPTION, LONGEST_CODE
from rethinker.environments.texts import CHARACTERS_PER_TOKEN, whole
from rethinker.samples import IMAGE_MARK, Query

RunCode = Callable[[str, int], tuple[str, str]]
"""(code, most characters of the answer) to (text, reason), as `sandbox.run`."""


def schemas(config: EnvironmentConfig) -> list[dict]:
    """What the model is told of its tools, as JSON schemas in OpenAI's form; nothing without environment.describe."""
    known = {"crop": describe(config.boxes), "python": DESCRIPTION}
    return [{"type": "function", "function": known[name]} for name in config.use if config.describe and name in known]


class Tools:
    """The environment. A turn without a call is the last; the answer to one with calls is a `<tool_response>` for each.

    Args:
        names: which tools there are.
        run_code: where `python` runs.
    """

    def __init__(self, names: Sequence[str], config: EnvironmentConfig, cropper: Cropper, run_code: RunCode) -> None:
        self._names, self._config, self._cropper, self._run_code = names, config, cropper, run_code

    def reset(self, query: Query) -> Seen:
        return Seen(query)

    def calls(self, text: str) -> list[Call]:
        """The calls in a turn's text."""
        return calls_of(text, self._config.max_calls)

    def needs_process(self, calls: Sequence[Call]) -> bool:
        """Whether an answer to the calls may take long."""
        return "python" in self._names and any(call.name == "python" for call in calls)

    def answer(self, seen: Seen, calls: Sequence[Call]) -> tuple[Seen, Observation]:
        """The state after the calls of a turn, and what is answered."""
        if not calls:
            return seen, Observation(done=True)
        answers, images, failures, before = [], [], [], seen  # a call knows of images that came before its turn
        most = CHARACTERS_PER_TOKEN * self._config.max_text_tokens // len(calls)
        refused = sum(call.error is not None and call.error.reason == "calls" for call in calls)
        for call in calls[: len(calls) - refused]:
            try:
                if call.error:
                    raise call.error
                if call.name not in self._names:
                    there = (
                        f"there are {', '.join(self._names)}" if len(self._names) > 1 else f"there is {self._names[0]}"
                    )
                    raise CallError("unknown", f"there is no tool {call.name[:40]!r}; {there}")
                if call.name == "crop":
                    if len(seen.crops) >= self._config.max_images:
                        raise CallError("images", f"no more than {self._config.max_images} images can be shown")
                    png, view = self._cropper.cut(call, before)
                    seen = replace(seen, crops=(*seen.crops, view))
                    images.append(png)
                    answers.append(f"image {seen.images}: {IMAGE_MARK}")
                else:
                    text, reason = self._python(call, most)
                    failures += [reason] if reason else []
                    answers.append(harmless(text))
            except CallError as error:
                failures.append(error.reason)
                answers.append(harmless(f"error: {error}"))
        if refused:
            failures += ["calls"] * refused
            answers.append(f"error: {refused} more {calls[-1].error}")
        text = "\n".join(f"<tool_response>\n{answer}\n</tool_response>" for answer in answers)
        return seen, Observation(whole(text), tuple(images), calls=len(calls), failures=tuple(failures))

    def _python(self, call: Call, most: int) -> tuple[str, str]:
        code = takes(call, ("code",))["code"]
        if not isinstance(code, str):
            raise CallError("arguments", "code must be a text")
        if len(code) > LONGEST_CODE:
            raise CallError("size", f"the code has {len(code):,} characters; there may be {LONGEST_CODE:,}")
        return self._run_code(code, most)
