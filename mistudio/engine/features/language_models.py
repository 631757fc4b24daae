"""Language models that describe features: one of the library's own, or a server that speaks the
interface of OpenAI's chat completions (llama.cpp, Ollama, LM Studio, vLLM) on this machine.

Another machine's address is refused unless the caller says that the user confirmed it. Nothing is
fetched through proxies, no redirect is followed.
"""

from __future__ import annotations

import http.client
import json
import math
import re
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from mistudio.engine.features.server_address import Address
from mistudio.engine.hub.access import Secret
from mistudio.engine.models.hooks import HookedDecoder
from mistudio.engine.models.logits import last_logits
from mistudio.engine.progress import SILENT, Progress
from mistudio.engine.steering.generation import Sampling, encode_prompt, generate
from mistudio.errors import UserError

T = TypeVar("T")

WRITTEN = 64  # tokens of an answer at most
BATCH = 8  # prompts of a forward pass
TIMEOUT = 120.0  # seconds without a byte
MOST_BYTES = 4_000_000  # of an answer
TOP = 10  # alternatives to the first token that a server is asked for
WARMTH = 0.7  # temperature of a second attempt


class LanguageModel(Protocol):
    """`name` is what labels name as their origin."""

    name: str

    def reads(self, prompt: str, start: str) -> bool:
        """Whether a prompt fits into the model together with an answer."""
        ...

    def write(
        self,
        prompt: str,
        start: str,
        schema: Mapping[str, Any],
        attempt: int = 0,
        progress: Progress = SILENT,
    ) -> str:
        """An answer in JSON of a schema; one that is cut off or breaks it is possible. `start` is
        how it must begin. The first attempt takes the likeliest words, others draw."""
        ...

    def yes(self, prompts: Sequence[str], progress: Progress = SILENT) -> np.ndarray:
        """float64 [n]: how probable the answer 1 is beside 0; NaN where neither is answered,
        and where the prompt is too long for the model."""
        ...


class OwnModel:
    """A model of the library. Models with a chat template are asked in its words."""

    def __init__(
        self, model: HookedDecoder, tokenizer: Any, name: str, special_ids: Collection[int]
    ) -> None:
        self.name = name
        self._model, self._tokenizer = model, tokenizer
        self._special = sorted(special_ids)
        self._chat = bool(getattr(tokenizer, "chat_template", None))
        self._most = model.context or math.inf  # tokens

    def reads(self, prompt: str, start: str) -> bool:
        return len(self._begun(prompt, start)) + WRITTEN <= self._most

    def write(
        self,
        prompt: str,
        start: str,
        schema: Mapping[str, Any],
        attempt: int = 0,
        progress: Progress = SILENT,
    ) -> str:
        ids = self._begun(prompt, start)
        sampling = Sampling(0.0 if attempt == 0 else WARMTH, 1.0, WRITTEN, attempt)
        until = _UntilClosed(progress)
        try:
            made = self._continued(ids, sampling, until)
        except _Closed:
            return start + until.text
        return start + made

    def _continued(self, ids: list[int], sampling: Sampling, progress: Progress) -> str:
        made = generate(
            self._model,
            self._tokenizer,
            ids,
            (),
            sampling,
            special_ids=self._special,
            stop_ids=self._special,
            progress=progress,
        )
        return made.rows[0].text

    @torch.inference_mode()
    def yes(self, prompts: Sequence[str], progress: Progress = SILENT) -> np.ndarray:
        no, yes = (self._tokens(digit) for digit in ("0", "1"))
        found = np.full(len(prompts), np.nan)
        by_length: dict[int, list[int]] = {}
        encoded = [self._ids(prompt) for prompt in prompts]
        for i, ids in enumerate(encoded):
            if len(ids) <= self._most:
                by_length.setdefault(len(ids), []).append(i)
        done = 0
        for rows in by_length.values():  # one length at a time: nothing has to be padded
            for begin in range(0, len(rows), BATCH):
                progress.check()
                chosen = rows[begin : begin + BATCH]
                batch = torch.tensor([encoded[i] for i in chosen], device=self._model.device)
                logits = last_logits(self._model, batch, 1)[:, -1].double()
                odds = logits[:, yes].logsumexp(1) - logits[:, no].logsumexp(1)
                found[chosen] = odds.sigmoid().cpu().numpy()
                done += len(chosen)
                progress.report(done, len(prompts))
        return found

    def _begun(self, prompt: str, start: str) -> list[int]:
        """A prompt and how its answer begins: small models would rather talk than write JSON."""
        return [*self._ids(prompt), *self._plain(start)]

    def _ids(self, prompt: str) -> list[int]:
        text = prompt if self._chat else f"{prompt}\nAnswer: "
        return encode_prompt(self._tokenizer, text, self._chat)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _tokens(self, digit: str) -> list[int]:
        """The tokens that begin the digit's spelling, with and without a blank before it. Of a
        spelling in several tokens the last: the blank alone says nothing."""
        return sorted({self._plain(digit)[-1], self._plain(f" {digit}")[-1]})


class Quiet:
    """Stops what is stopped, and shows nothing of what is done: single tokens and prompts."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def check(self) -> None:
        self._progress.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        pass


class _Closed(Exception):
    """The answer is whole."""


class _UntilClosed(Quiet):
    """Ends a generation where the text closes the quotation that it began in."""

    text = ""

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        texts = metrics.get("texts")
        if isinstance(texts, list) and (end := _CLOSING.search(texts[0])):
            self.text = texts[0][: end.end()]
            raise _Closed


_CLOSING = re.compile(r'(?<!\\)"')


# --- a server -------------------------------------------------------------------------------------


class Server:
    """A model behind a server's chat completions. `confirmed` says that the user agreed to send
    text to an address that is not this machine's: UserError without."""

    def __init__(
        self, address: str, model: str, key: Secret | None = None, confirmed: bool = False
    ) -> None:
        self.address = Address.parse(address)
        if not self.address.is_loopback and not confirmed:
            raise UserError(
                "This address is not on this machine",
                f"Text of your dataset would be sent to {self.address.host}.",
                "Confirm the address where features are described, or use one on this machine.",
            )
        self.name = model
        self._key = key
        self._plain = False  # it knows no schema
        self._wordy = False  # it gives no probabilities

    def models(self, progress: Progress = SILENT) -> list[str]:
        """Names of the models that it offers."""
        answer = self._ask("GET", "/models", None, progress)
        found = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(found, list):
            raise self._nonsense()
        return [str(entry["id"]) for entry in found if isinstance(entry, dict) and "id" in entry]

    def reads(self, prompt: str, start: str) -> bool:
        return True  # how much it reads is the server's to say

    def write(
        self,
        prompt: str,
        start: str,
        schema: Mapping[str, Any],
        attempt: int = 0,
        progress: Progress = SILENT,
    ) -> str:
        body = {
            **self._message(prompt),
            "max_tokens": 2 * WRITTEN,
            "temperature": 0.0 if attempt == 0 else WARMTH,
            "seed": attempt,
        }
        shape = {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": schema},
        }
        if not self._plain:
            try:
                return self._text(self._complete({**body, "response_format": shape}, progress))
            except _NotUnderstood:
                self._plain = True
        return self._text(self._complete(body, progress))

    def yes(self, prompts: Sequence[str], progress: Progress = SILENT) -> np.ndarray:
        found = np.full(len(prompts), np.nan)
        for i, prompt in enumerate(prompts):
            progress.check()
            found[i] = self._yes(prompt, progress)
            progress.report(i + 1, len(prompts))
        return found

    def _yes(self, prompt: str, progress: Progress) -> float:
        body = {**self._message(prompt), "max_tokens": 4, "temperature": 0.0}
        if not self._wordy:
            try:
                choice = self._complete({**body, "logprobs": True, "top_logprobs": TOP}, progress)
            except _NotUnderstood:
                self._wordy = True
            else:
                found = _from_probabilities(choice)
                return found if found is not None else _from_text(self._text(choice))
        return _from_text(self._text(self._complete(body, progress)))

    def _message(self, prompt: str) -> dict[str, Any]:
        return {"model": self.name, "messages": [{"role": "user", "content": prompt}]}

    def _text(self, choice: Mapping[str, Any]) -> str:
        message = choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        return content if isinstance(content, str) else ""

    def _complete(self, body: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
        answer = self._ask("POST", "/chat/completions", {**body, "stream": False}, progress)
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise self._nonsense()
        return choices[0]

    # --- the line -------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: Any, progress: Progress) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.reveal()}"
        data = None if body is None else json.dumps(body).encode()
        line = self._line()
        try:
            line.request(method, self.address.path + path, data, headers)
            status, content = _watched(lambda: _read(line), line, progress)
        except (OSError, http.client.HTTPException) as exc:
            raise UserError(
                "The server does not answer",
                f"{self.address}: {exc or type(exc).__name__}.",
                "Start it, or correct its address.",
            ) from exc
        finally:
            line.close()
        if status in (400, 404, 422) and body is not None and set(body) & _EXTRAS:
            raise _NotUnderstood
        if status != 200:
            raise UserError(
                "The server refuses",
                f"{self.address}{path} answers {status}: {self._hidden(_reason(content))}",
                "Check the model's name and, where the server wants one, the key.",
            )
        try:
            return json.loads(content)
        except ValueError as exc:
            raise self._nonsense() from exc

    def _line(self) -> http.client.HTTPConnection:
        at = self.address
        if at.is_loopback:
            host = _loopback_of(at)
        else:
            host = at.host
        if at.scheme == "https":
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(host, at.port, timeout=TIMEOUT, context=context)
        return http.client.HTTPConnection(host, at.port, timeout=TIMEOUT)

    def _hidden(self, text: str) -> str:
        return self._key.hide_in(text) if self._key is not None else text

    def _nonsense(self) -> UserError:
        return UserError(
            "The server's answer cannot be read",
            f"{self.address} does not speak the interface of chat completions.",
            "Check the address; its path often is /v1.",
        )


_EXTRAS = {"response_format", "logprobs"}


class _NotUnderstood(Exception):
    """The server refused a request that asked for more than every server knows."""


def _loopback_of(address: Address) -> str:
    """An address of this machine at which somebody listens. `localhost` is looked up, and what it
    leads to elsewhere is refused."""
    if address.host != "localhost":
        return address.host
    hosts = ["127.0.0.1", "::1"]
    for host in hosts:
        try:
            with socket.create_connection((host, address.port), timeout=2.0):
                return host
        except OSError:
            continue
    return hosts[0]


def _read(line: http.client.HTTPConnection) -> tuple[int, bytes]:
    with line.getresponse() as response:
        content = response.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise http.client.HTTPException("the answer is longer than any could be")
        return response.status, content


def _watched(function: Callable[[], T], line: http.client.HTTPConnection, progress: Progress) -> T:
    """`function`'s result; a progress that stops hangs up on the server."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=work, name="language model", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
            progress.check()
    except BaseException:
        if line.sock is not None:
            line.sock.shutdown(socket.SHUT_RDWR)
        thread.join(2.0)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _reason(content: bytes) -> str:
    """What a refusal says of itself, in one line."""
    text = content[:2000].decode("utf-8", "replace")
    try:
        found = json.loads(text)
        error = found.get("error", found) if isinstance(found, dict) else text
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except ValueError:
        pass
    return " ".join(text.split())[:300] or "nothing more"


def _from_probabilities(choice: Mapping[str, Any]) -> float | None:
    """P(1) beside P(0) at the first token that may be either; None where it cannot be told."""
    found = choice.get("logprobs")
    content = found.get("content") if isinstance(found, dict) else None
    for token in content if isinstance(content, list) else ():
        chances = {"0": 0.0, "1": 0.0}
        for entry in [*(token.get("top_logprobs") or []), token]:
            text = str(entry.get("token", "")).strip()
            if text in chances and isinstance(entry.get("logprob"), int | float):
                chances[text] = max(chances[text], math.exp(min(entry["logprob"], 0.0)))
        total = sum(chances.values())
        if total > 0:
            return chances["1"] / total
        if str(token.get("token", "")).strip():
            return None
    return None


def _from_text(text: str) -> float:
    text = text.strip()
    return {"0": 0.0, "1": 1.0}.get(text[:1], math.nan) if not text[1:2].isdigit() else math.nan
