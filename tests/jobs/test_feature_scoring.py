"""Scores of chosen features by other means than the rule, and descriptions by a language model:
with the tiny model, and with a server of the test's own."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journeys import road

from mistudio import credentials
from mistudio.engine.features.embedding_score import embed, embedding_scores
from mistudio.engine.features.excerpts import excerpts
from mistudio.engine.models.hooks import HookPoint
from mistudio.jobs import describing
from mistudio.jobs.control import Control
from mistudio.jobs.describing import DescribeFeatures, key_for, models_of, remember_key
from mistudio.jobs.features import open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import AddModel, job_from_row
from mistudio.jobs.models import loaded_model
from mistudio.jobs.scoring import ScoreFeatures, blind_trials, keep_blind, partners
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.settings import Settings


@pytest.fixture(scope="module")
def shared(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = Library(road.copy_of(built, tmp_path_factory.mktemp("scoring")))
    yield library
    library.close()


@pytest.fixture(scope="module")
def frequent(shared: Library) -> list[int]:
    """Features with many examples and inactive contexts."""
    columns = open_features(shared, shared.feature_runs.get(1))[0].columns
    share = np.asarray(columns["context_density"])
    order = np.argsort(np.abs(share - 0.4), kind="stable")
    return [int(f) for f in order[:2]]


def run(library: Library, job: Any, **options: Any) -> JobRecord:
    return run_job(library, job, submit(library, job), **options)


def done(library: Library, job: Any) -> dict[str, Any]:
    row = run(library, job)
    assert row.status == "finished", row.error
    return row.result


def refused(library: Library, job: Any, words: str) -> None:
    row = run(library, job)
    assert row.status == "failed"
    assert words in f"{row.error['title']} {row.error['what']}", row.error


# --- by the model's activations -------------------------------------------------------------------


def test_the_embedding_score_is_kept_as_the_engine_found_it(
    shared: Library, frequent: list[int]
) -> None:
    result = done(shared, ScoreFeatures(1, frequent, seed=2))
    assert result["scored"] == len(frequent)
    feature_run = shared.feature_runs.get(1)
    store, tokens = open_features(shared, feature_run)
    chosen = [*frequent, *partners(store, frequent, 2)]
    assert len(set(chosen)) == 6
    found = {f: excerpts(store, tokens, f) for f in chosen}
    point = HookPoint.parse(store.meta.hook_point)
    model = loaded_model(shared, 1)
    wanted = embedding_scores(found, {f: embed(model, point, found[f]) for f in chosen}, 2)
    for feature in frequent:
        (kept,) = shared.feature_scores.of_feature(1, feature)
        assert kept.scorer == "embedding"
        assert (kept.accuracy, kept.low, kept.high) == pytest.approx(
            (wanted[feature].accuracy, wanted[feature].low, wanted[feature].high), abs=1e-6
        )
        assert (kept.active, kept.inactive) == (wanted[feature].active, wanted[feature].inactive)
        assert kept.details["nulls"] > 0 and kept.details["chance"] == 0.5
    assert not [s for s in shared.feature_scores.of_sae(1) if s.feature not in frequent]


def test_what_cannot_be_scored_is_refused(shared: Library) -> None:
    refused(shared, ScoreFeatures(1, []), "No feature chosen")
    refused(shared, ScoreFeatures(1, [10**6]), "no such feature")
    refused(shared, ScoreFeatures(1, [0] * 1001), "Too many features")


# --- a person -------------------------------------------------------------------------------------


def test_a_blind_test_is_judged_and_kept(shared: Library, frequent: list[int]) -> None:
    feature_run, feature = shared.feature_runs.get(1), frequent[0]
    trials = blind_trials(shared, feature_run, feature, seed=5)
    assert 5 <= len(trials) <= 10
    assert all(len(t.texts) == 5 and all(text.strip() for text in t.texts) for t in trials)
    assert trials == blind_trials(shared, feature_run, feature, seed=5)
    answers = [t.intruder for t in trials]
    answers[0] = (answers[0] + 1) % 5
    result = keep_blind(shared, 1, feature, trials, answers, 5)
    assert (result.right, result.trials) == (len(trials) - 1, len(trials))
    assert result.low < result.accuracy < result.high
    assert result.score == pytest.approx((result.accuracy - 0.2) / 0.8)
    kept = next(s for s in shared.feature_scores.of_feature(1, feature) if s.scorer == "human")
    assert (kept.accuracy, kept.inactive) == (result.accuracy, len(trials))
    assert [a["answer"] for a in kept.details["answers"]] == answers
    keep_blind(shared, 1, feature, trials, [t.intruder for t in trials], 5)
    again = [s for s in shared.feature_scores.of_feature(1, feature) if s.scorer == "human"]
    assert [s.accuracy for s in again] == [1.0]


# --- language models ------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.answer({"data": [{"id": "good"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        server.prompts.append(body["messages"][0]["content"])
        server.keys.append(self.headers.get("Authorization"))
        text = "1" if "Answer only 1" in server.prompts[-1] else server.describes(len(server.keys))
        self.answer({"choices": [{"message": {"content": text}}]})

    def answer(self, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served() -> Any:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.prompts, server.keys = [], []
    server.describes = lambda n: json.dumps({"description": f"thing {n}"})
    server.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def labels(library: Library, feature: int, origin: str) -> list[Any]:
    found = library.feature_labels.of_feature(1, feature)
    return [label for label in found if label.origin == origin]


def test_a_server_s_descriptions_become_labels_with_their_score(
    shared: Library, frequent: list[int], served: Any
) -> None:
    assert models_of(served.address) == ["good"]
    job = DescribeFeatures(1, frequent, address=served.address, server_model="good", contexts=20)
    assert job_from_row(job.kind, json.loads(json.dumps(vars(job)))) == job
    result = done(shared, job)
    assert (result["described"], result["unparsed"], result["scored"]) == (2, [], 2)
    for feature, text in zip(frequent, ("thing 1", "thing 2"), strict=True):
        (label,) = labels(shared, feature, "good")
        assert (label.text, label.source) == (text, "model")
        # "yes" to everything: half of the contexts right.
        assert label.score == pytest.approx(0.5) and label.low < 0.5 < label.high
        kept = next(s for s in shared.feature_scores.of_feature(1, feature) if s.scorer == "model")
        assert (kept.active, kept.inactive) == (10, 10)
        assert kept.details["description"] == text and kept.details["nulls"] > 0
        note = shared.feature_notes.of_sae(1).get(feature)
        assert note is None or note.label != text  # nobody chose it yet
    assert sum("<<" in p for p in served.prompts) > 2


def test_what_cannot_be_parsed_is_told_and_makes_no_label(
    shared: Library, frequent: list[int], served: Any
) -> None:
    served.describes = lambda n: "thing" if n < 3 else json.dumps({"description": "at last"})
    job = DescribeFeatures(1, frequent, address=served.address, server_model="mumbler", contexts=0)
    result = done(shared, job)
    assert result["unparsed"] == [frequent[0]]
    assert labels(shared, frequent[0], "mumbler") == []
    (label,) = labels(shared, frequent[1], "mumbler")
    assert (label.text, label.score, label.low) == ("at last", None, None)


def test_the_label_that_is_shown_can_be_judged(
    shared: Library, frequent: list[int], served: Any
) -> None:
    shared.feature_labels.write_human(1, frequent[0], "my own words")
    before = shared.feature_labels.of_sae(1)
    job = DescribeFeatures(
        1, frequent, address=served.address, server_model="judge", contexts=10, write=False
    )
    assert done(shared, job)["scored"] == 2
    assert shared.feature_labels.of_sae(1) == before
    scores = {s.feature: s for s in shared.feature_scores.of_sae(1) if s.scorer == "model"}
    assert scores[frequent[0]].details["description"] == "my own words"
    assert scores[frequent[1]].details["description"]
    assert any("active on: my own words" in p for p in served.prompts)


def test_a_model_of_the_library_describes(shared: Library, frequent: list[int]) -> None:
    result = done(shared, DescribeFeatures(1, frequent[:1], model_id=1, contexts=10))
    assert result["described"] + len(result["unparsed"]) == 1
    if result["described"]:
        (label,) = labels(shared, frequent[0], shared.models.get(1).name)
        assert label.source == "model" and label.text


def test_a_model_that_reads_too_little_to_describe_says_so(
    shared: Library, frequent: list[int], tmp_path: Path
) -> None:
    folder = shutil.copytree(road.MODEL, tmp_path / "short-sighted")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 64
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model_id = done(shared, AddModel(str(folder), "fp32"))["model_id"]
    job = DescribeFeatures(1, frequent[:1], model_id=model_id, contexts=0)
    refused(shared, job, "reads too little text")
    assert labels(shared, frequent[0], shared.models.get(model_id).name) == []


def test_a_stop_keeps_what_is_described_already(
    shared: Library, frequent: list[int], served: Any
) -> None:
    control = Control()

    def describes(n: int) -> str:
        if n == 2:
            control.cancel()
        return json.dumps({"description": f"before the stop {n}"})

    served.describes = describes
    features = [*frequent, next(f for f in range(1000) if f not in frequent)]
    job = DescribeFeatures(1, features, address=served.address, server_model="slow", contexts=0)
    assert run(shared, job, control=control).status == "cancelled"
    assert [label.text for label in labels(shared, frequent[0], "slow")] == ["before the stop 1"]


# --- whom text may be sent to ---------------------------------------------------------------------


def test_an_address_beyond_this_machine_takes_the_user_s_consent(
    shared: Library, frequent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    far = "http://192.0.2.7:8080"
    job = DescribeFeatures(1, frequent, address=far, server_model="m")
    refused(shared, job, "not on this machine")
    Settings().set("describer_confirmed", "http://192.0.2.8:8080/v1")
    refused(shared, job, "not on this machine")
    assert not describing.is_confirmed(far)
    Settings().set("describer_confirmed", f"{far}/v1")
    assert describing.is_confirmed(far)
    assert describing.is_confirmed("localhost:1")
    refused(shared, DescribeFeatures(1, frequent, address="localhost:1"), "No model chosen")


class Keyring:
    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, user: str) -> str | None:
        return self.kept.get((service, user))

    def set_password(self, service: str, user: str, text: str) -> None:
        self.kept[service, user] = text

    def delete_password(self, service: str, user: str) -> None:
        del self.kept[service, user]


def test_a_key_goes_to_its_own_server_only_and_into_the_keyring_only(
    shared: Library, frequent: list[int], served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = Keyring()
    monkeypatch.setattr(credentials, "keyring_for_secrets", lambda: ring)
    assert remember_key(served.address, " sk-12345678 ")
    assert list(ring.kept.values()) == ["sk-12345678"]
    assert key_for("http://127.0.0.1:1/v1") is None
    job = DescribeFeatures(
        1, frequent[:1], address=served.address, server_model="keyed", contexts=0
    )
    done(shared, job)
    assert served.keys == ["Bearer sk-12345678"]
    assert not any(b"sk-12345678" in p.read_bytes() for p in shared.root.rglob("*") if p.is_file())
    assert remember_key(served.address, "")
    assert ring.kept == {}
    assert key_for(f"{served.address}/v1") is None


def test_without_a_keyring_a_key_is_held_in_memory_alone(
    served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(credentials, "keyring_for_secrets", lambda: None)
    assert not remember_key(served.address, "sk-12345678")
    assert key_for(f"{served.address}/v1").reveal() == "sk-12345678"  # type: ignore[union-attr]
    assert not remember_key(served.address, "")
    assert key_for(f"{served.address}/v1") is None
