"""Language models as describers and judges: a real server on loopback, the tiny model really
generating, and a judge whose answers are known."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from planted_store import NOISE, PAIR, RARE, TOKEN, TOPIC

from mistudio.engine.features.describers import (
    EXAMPLES,
    SCHEMA,
    START,
    active_tokens,
    describe,
    marked,
    parsed,
    prompt,
    shown_to_describers,
)
from mistudio.engine.features.excerpts import excerpts, pieces, with_activations
from mistudio.engine.features.language_models import OwnModel, Server
from mistudio.engine.features.model_score import auroc, model_scores
from mistudio.engine.features.score import STRONGEST
from mistudio.engine.features.server_address import Address
from mistudio.engine.hub.access import Secret
from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput, UserError


@pytest.fixture(scope="module")
def contexts(planted_run, tokens):
    store, x, _, _ = planted_run
    found = {}
    for f in (TOKEN, PAIR, TOPIC, NOISE):
        of = excerpts(store, tokens.train, f)
        found[f] = with_activations(of, of, lambda windows, f=f: x[windows, :, f])
    return found


# --- what is asked, and what of the answers is taken ----------------------------------------------


def test_describers_see_only_the_half_that_descriptions_are_made_from(contexts):
    for found in contexts.values():
        shown = shown_to_describers(found)
        assert len(shown) == EXAMPLES
        assert all(e.is_active and not e.tried for e in shown)
        assert any(e.kind == STRONGEST for e in shown) and any(e.kind != STRONGEST for e in shown)


def test_a_feature_without_examples_cannot_be_described(planted_run, tokens):
    found = excerpts(planted_run[0], tokens.train, RARE)
    with pytest.raises(InvalidInput, match="nothing to describe"):
        shown_to_describers([e for e in found if e.tried])


def test_active_words_are_marked():
    assert marked([" a", " New", " York", " b"], np.array([0, 1, 1, 0], bool)) == "a <<New York>> b"
    assert marked(["x", "", "é"], np.array([0, 0, 1], bool)) == "x<<é>>"
    assert marked([" a", "\n"], np.array([0, 1], bool)) == "a"
    assert marked([], np.zeros(0, bool)) == ""


def test_tokens_from_a_share_of_the_maximum_on_are_marked(contexts):
    one = next(e for e in contexts[PAIR] if e.is_active)
    values = np.zeros(len(one.ids), np.float32)
    values[:3] = (1.0, 0.31, 0.29)
    marks = active_tokens(replace(one, activations=values))
    assert np.flatnonzero(marks).tolist() == [0, 1]
    alone = active_tokens(replace(one, activations=np.empty(0, np.float32)))
    assert np.flatnonzero(alone).tolist() == [one.peak]
    assert not active_tokens(replace(one, activations=values * 0)).any()


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('{"description": "names of cities"}', "names of cities"),
        ('Sure! {"description" :  "a \\"quoted\\"\\n  thing"} bye', 'a "quoted" thing'),
        ('{"description": "the <<while>> word"}', "the while word"),
        ('{"description": "cut off', None),
        ('{"description": ""}', None),
        ('{"description": "..."}', None),
        ("names of cities", None),
        ('{"description": "' + "long " * 60 + '"}', None),
    ],
)
def test_only_a_description_is_taken_for_one(answer, text):
    assert parsed(answer) == text


class Scripted:
    """A model that says what it is told to."""

    name = "scripted"

    def __init__(self, answers=(), yes=lambda prompt: np.nan):
        self.answers, self.asked, self._yes = list(answers), [], yes

    def reads(self, prompt, start):
        return True

    def write(self, prompt, start, schema, attempt=0, progress=None):
        self.asked.append((prompt, start, attempt))
        return self.answers.pop(0)

    def yes(self, prompts, progress=None):
        self.asked += prompts
        return np.array([self._yes(p) for p in prompts], float)


def test_an_answer_that_cannot_be_parsed_is_asked_for_once_more(contexts, tiny_tokenizer):
    good = '{"description": "one thing"}'
    twice = Scripted(["gibberish", good])
    assert describe(twice, contexts[PAIR], tiny_tokenizer) == "one thing"
    assert [attempt for _, _, attempt in twice.asked] == [0, 1]
    never = Scripted(["gibberish", "{}", good])
    assert describe(never, contexts[PAIR], tiny_tokenizer) is None
    assert len(never.asked) == 2


# --- judging --------------------------------------------------------------------------------------


def judge_of(word, strength=0.9):
    """Says yes where the text it is asked about has the word."""

    def yes(asked):
        text = asked.split("Text: ")[1].split("\n\n")[0]
        marks = "between <<" in asked
        there = f"<<{word}" in text if marks else word in text
        return strength if there else 1 - strength

    return Scripted(yes=yes)


@pytest.fixture(scope="module")
def word(planted_run):
    _, _, vocabulary, (token, _, _) = planted_run
    return vocabulary.texts[token].strip()


def test_a_model_that_knows_the_cause_scores_high(contexts, tiny_tokenizer, word):
    judge = judge_of(word)
    found = model_scores(judge, {TOKEN: "it"}, contexts, tiny_tokenizer)[TOKEN]
    one = found.detection
    assert one.accuracy > 0.85 and one.low > 0.65
    assert (one.active, one.inactive) == (20, 20)
    assert one.auroc > 0.85
    assert one.nulls == 2 and one.null < 0.75
    assert found.fuzzing.accuracy > 0.85
    assert found.fuzzing.active + found.fuzzing.inactive <= 20
    assert found.unanswered == 0 and found.prompts == len(judge.asked)
    # One text a prompt; and only texts of the tried half beside those of the threshold.
    tried_texts = {
        " ".join("".join(pieces(tiny_tokenizer, e.ids)).split())
        for f in contexts for e in contexts[f] if e.tried
    }  # fmt: skip
    detections = [p for p in judge.asked if "<<" not in p]
    assert sum(p.split("Text: ")[1].split("\n\n")[0] in tried_texts for p in detections) >= 80 - 1


def test_what_holds_for_every_feature_is_taken_off(contexts, tiny_tokenizer):
    """A judge that knows about activity as such, not about this feature, scores nothing."""
    known = {}
    for found in contexts.values():
        for e in found:
            text = " ".join("".join(pieces(tiny_tokenizer, e.ids)).split())
            known[text] = e.is_active
    judge = Scripted(yes=lambda p: float(known.get(p.split("Text: ")[1].split("\n\n")[0], False)))
    found = model_scores(judge, {NOISE: "x", PAIR: "y"}, contexts, tiny_tokenizer)
    for one in found.values():
        assert one.detection.null > 0.9
        assert abs(one.detection.accuracy - 0.5) < 0.12


def test_a_model_that_guesses_scores_nothing(contexts, tiny_tokenizer):
    generator = np.random.default_rng(0)
    judge = Scripted(yes=lambda _: generator.random())
    accuracies = []
    for seed in range(3):
        of = dict.fromkeys(contexts, "x")
        found = model_scores(judge, of, contexts, tiny_tokenizer, seed=seed)
        accuracies += [one.detection.accuracy for one in found.values()]
    spread = np.std(accuracies) / len(accuracies) ** 0.5
    assert abs(np.mean(accuracies) - 0.5) < 3 * spread + 0.01


def test_a_bias_to_yes_is_met_by_the_threshold(contexts, tiny_tokenizer, word):
    """Set where descriptions are made, not where they are tried."""
    biased = Scripted(yes=lambda p: 0.9 + 0.05 * judge_of(word)._yes(p))
    found = model_scores(biased, {TOKEN: "it"}, contexts, tiny_tokenizer)[TOKEN]
    assert found.threshold > 0.9
    assert found.detection.accuracy > 0.85


def test_a_model_that_does_not_answer_gets_no_score(contexts, tiny_tokenizer):
    found = model_scores(Scripted(), {TOKEN: "it"}, contexts, tiny_tokenizer)[TOKEN]
    assert found.detection is None and found.fuzzing is None
    assert found.unanswered == found.prompts > 0


def test_auroc_counts_pairs():
    active = np.array([1, 1, 0, 0], bool)
    assert auroc(np.array([0.9, 0.6, 0.6, 0.1]), active) == pytest.approx(0.875)
    assert auroc(np.array([1.0, 0.0, 1.0, 0.0]), active) is None  # plain yes and no


# --- the tiny model -------------------------------------------------------------------------------


def test_a_model_of_the_library_writes_and_judges(tiny, tiny_tokenizer, contexts):
    model = OwnModel(tiny, tiny_tokenizer, "tiny", special_ids=[0])
    asked = prompt(contexts[PAIR], tiny_tokenizer, lambda text: model.reads(text, START))
    text = model.write(asked, START, SCHEMA)
    assert text.startswith(START) and len(text) > len(START)
    assert text == model.write(asked, START, SCHEMA)
    assert text != model.write(asked, START, SCHEMA, attempt=1)
    assert '"' not in text[len(START) : -1]  # it ends where the quotation is closed
    alone = [model.yes([p])[0] for p in ("A text.", "Another text, a longer one.")]
    together = model.yes(["A text.", "Another text, a longer one."])
    assert together == pytest.approx(alone, abs=1e-5)
    assert ((together > 0) & (together < 1)).all()
    outcome = describe(model, contexts[PAIR], tiny_tokenizer)
    assert outcome is None or isinstance(outcome, str)


def test_a_model_is_shown_as_many_examples_as_it_reads(tiny, tiny_tokenizer, contexts):
    model = OwnModel(tiny, tiny_tokenizer, "tiny", special_ids=[0])
    whole = prompt(contexts[PAIR], tiny_tokenizer)
    assert not model.reads(whole, START)  # more than the 512 tokens of this model
    fitting = prompt(contexts[PAIR], tiny_tokenizer, lambda text: model.reads(text, START))
    examples = [[line for line in p.splitlines() if line[:1].isdigit()] for p in (whole, fitting)]
    assert 0 < len(examples[1]) < len(examples[0])
    assert examples[0][: len(examples[1])] == examples[1]  # the weakest are left out
    one_more = whole.replace("\n".join(examples[0]), "\n".join(examples[0][: len(examples[1]) + 1]))
    assert not model.reads(one_more, START)
    with pytest.raises(UserError, match="Not even one example"):
        prompt(contexts[PAIR], tiny_tokenizer, lambda text: False)
    answers = model.yes(["A text.", whole])
    assert np.isnan(answers).tolist() == [False, True]


def test_a_generation_can_be_stopped(tiny, tiny_tokenizer):
    class Stop:
        def check(self):
            raise Cancelled

        def report(self, *args, **more):
            pass

    model = OwnModel(tiny, tiny_tokenizer, "tiny", special_ids=[0])
    for ask in (
        lambda: model.write("a", START, SCHEMA, 0, Stop()),
        lambda: model.yes(["a"], Stop()),
    ):
        with pytest.raises(Cancelled):
            ask()


# --- a server -------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [{"id": "small"}, {"id": "large"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        status, answer = self.server.reply(body)
        self.answer(answer, status)

    def answer(self, content, status=200):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://192.0.2.1/")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def served():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies, server.keys = [], []
    server.reply = lambda body: (200, says('{"description": "a thing"}'))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def says(text, logprobs=None):
    return {"choices": [{"message": {"content": text}, "logprobs": logprobs}]}


def chances(*tokens):
    entries = [{"token": t, "logprob": float(np.log(p))} for t, p in tokens]
    return {"content": [{**entries[0], "top_logprobs": entries}]}


def address(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_a_server_describes_with_a_schema(served, contexts, tiny_tokenizer):
    model = Server(address(served), "small", Secret("sk-very-secret"))
    assert model.models() == ["small", "large"]
    assert describe(model, contexts[PAIR], tiny_tokenizer) == "a thing"
    (body,) = served.bodies
    assert body["model"] == "small" and body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    assert body["messages"][0]["content"] == prompt(contexts[PAIR], tiny_tokenizer)
    assert served.keys == ["Bearer sk-very-secret"]


def test_a_server_that_knows_no_schema_is_asked_without(served):
    served.reply = lambda body: (
        (400, {"error": "response_format"}) if "response_format" in body else (200, says("ok"))
    )
    model = Server(address(served), "small")
    assert [model.write("p", START, SCHEMA) for _ in range(2)] == ["ok", "ok"]
    assert ["response_format" in body for body in served.bodies] == [True, False, False]
    assert served.keys == [None] * 3


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (says("1", chances(("1", 0.6), (" 0", 0.2))), 0.75),
        (says("No", chances(("No", 0.9), ("1", 0.05))), 1.0),
        (says("0"), 0.0),
        (says(" 1."), 1.0),
        (says("10"), np.nan),
        (says("I think"), np.nan),
        (says("Well", chances(("Well", 0.9), ("So", 0.1))), np.nan),
        (says(""), np.nan),
    ],
)
def test_a_server_s_answer_becomes_a_probability(served, answer, wanted):
    served.reply = lambda body: (200, answer)
    found = Server(address(served), "small").yes(["p"])
    assert found == pytest.approx([wanted], nan_ok=True)
    assert served.bodies[0]["logprobs"] is True


def test_a_server_without_probabilities_is_asked_for_words(served):
    served.reply = lambda body: (422, {}) if "logprobs" in body else (200, says("1"))
    assert Server(address(served), "small").yes(["p", "q"]).tolist() == [1.0, 1.0]
    assert ["logprobs" in body for body in served.bodies] == [True, False, False]


def test_errors_of_a_server_are_told_without_the_key(served):
    model = Server(address(served), "small", Secret("sk-very-secret"))
    for reply, title in (
        ((401, {"error": {"message": "bad key sk-very-secret"}}), "refuses"),
        ((500, b"<html>oh</html>"), "refuses"),
        ((302, b""), "refuses"),  # not followed
        ((200, b"nonsense"), "cannot be read"),
        ((200, {"choices": []}), "cannot be read"),
        ((200, b"x" * 5_000_000), "does not answer"),
    ):
        served.reply = lambda body, reply=reply: reply
        with pytest.raises(UserError, match=title) as caught:
            model.write("p", START, SCHEMA)
        assert "very-secret" not in f"{caught.value} {caught.value.what}"
    served.shutdown()
    served.server_close()
    with pytest.raises(UserError, match="does not answer"):
        Server(address(served), "small").models()


def test_waiting_for_a_server_can_be_stopped(served):
    release = threading.Event()

    def slowly(body):
        release.wait(10)
        return 200, says("late")

    served.reply = slowly

    class Stop:
        calls = 0

        def check(self):
            Stop.calls += 1
            if Stop.calls > 1:
                raise Cancelled

        def report(self, *args, **more):
            pass

    with pytest.raises(Cancelled):
        Server(address(served), "small").write("p", START, SCHEMA, 0, Stop())
    release.set()


@pytest.mark.parametrize(
    ("text", "wanted", "local"),
    [
        ("localhost:11434", "http://localhost:11434/v1", True),
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1", True),
        ("http://[::1]:8080/api", "http://[::1]:8080/api", True),
        ("https://llm.example.org", "https://llm.example.org:443/v1", False),
        ("http://192.168.0.7:8080", "http://192.168.0.7:8080/v1", False),
        ("http://127.0.0.1.example.org", "http://127.0.0.1.example.org:80/v1", False),
        ("http://localhost.example.org", "http://localhost.example.org:80/v1", False),
    ],
)
def test_only_this_machine_counts_as_local(text, wanted, local):
    found = Address.parse(text)
    assert (str(found), found.is_loopback) == (wanted, local)
    if not local:
        with pytest.raises(UserError, match="not on this machine"):
            Server(text, "m")
        Server(text, "m", confirmed=True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ftp://127.0.0.1",
        "http://",
        "http://a:b",
        "http://u:p@localhost",
        "localhost?q",
        "what is this",
    ],
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(InvalidInput, match="no server's address"):
        Address.parse(text)
