"""The job that has a language model describe features and judges it by its descriptions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio import credentials, logs
from mistudio.engine.features.server_address import Address
from mistudio.engine.hub.access import Secret
from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput, UserError
from mistudio.jobs.coactivation import medians_of
from mistudio.jobs.control import Phase
from mistudio.jobs.features import open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model
from mistudio.jobs.scoring import check_features, named, partners, write_score
from mistudio.jobs.stages import Stage, Within
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun
from mistudio.settings import Settings

if TYPE_CHECKING:
    from mistudio.engine.features.excerpts import Excerpt
    from mistudio.engine.features.language_models import LanguageModel
    from mistudio.engine.features.model_score import Judged

CONTEXTS, MOST_CONTEXTS = 40, 100
_typed: dict[str, Secret] = {}  # where the system has no keyring: until the process ends


@dataclass(frozen=True)
class DescribeFeatures:
    """A language model describes `features`: one of the library (`model_id`), or `server_model`
    of the server at `address`. Descriptions become labels of source "model"; what cannot be
    parsed, twice, is counted and makes none.

    With `contexts` above 0 it then tells from each description in which of so many contexts the
    feature is active, and on which words; the result is the label's score. Without `write` it
    judges the label that is shown, or the description by rule, and writes no label.

    An address beyond this machine is used only while it is the one that the user confirmed
    (setting `describer_confirmed`).
    """

    feature_run_id: int
    features: list[int]
    model_id: int | None = None
    address: str = ""
    server_model: str = ""
    contexts: int = CONTEXTS
    write: bool = True
    seed: int = 0

    kind: ClassVar[str] = "describe_features"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("load model", 5),
        Phase("read contexts", 20),
        Phase("describe", 100),
        Phase("judge", 200),
    )

    def title(self, library: Library) -> str:
        return f"{'Describe' if self.write else 'Judge the labels of'} {named(self.features)}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return _Describing(context, self).run()


class _Describing:
    def __init__(self, context: JobContext, job: DescribeFeatures) -> None:
        self._context, self._job, self._library = context, job, context.library
        self._run: FeatureRun = self._library.feature_runs.get(job.feature_run_id)
        check_features(job.features, self._run)
        if not 0 <= job.contexts <= MOST_CONTEXTS or not (job.contexts or job.write):
            raise InvalidInput(
                "A setting is out of range",
                f"Between {0 if job.write else 10} and {MOST_CONTEXTS} contexts can be tried a "
                f"feature, not {job.contexts}.",
                field="contexts",
            )
        # Before anything is loaded: an address that is not confirmed ends the job here.
        self._server = None if job.model_id is not None else server(job.address, job.server_model)

    def run(self) -> dict[str, Any]:
        library, job, run = self._library, self._job, self._run
        found = self._contexts()
        model = self._model()
        texts, unparsed = self._described(model, found) if job.write else (self._shown(), [])
        judged = self._judged(model, texts, found) if job.contexts and texts else {}
        for feature, text in texts.items():
            self._keep(model.name, feature, text, judged.get(feature))
        library.note_change("feature_labels", run.sae_id)
        return {
            "feature_run_id": run.id,
            "described": len(texts) if job.write else 0,
            "unparsed": unparsed,
            "scored": sum(one.detection is not None for one in judged.values()),
            "features": len(job.features),
        }

    def _model(self) -> LanguageModel:
        from mistudio.engine.features.language_models import OwnModel
        from mistudio.engine.models.loading import load_tokenizer, special_ids

        if self._server is not None:
            return self._server
        assert self._job.model_id is not None
        record = self._library.models.get(self._job.model_id)
        model = loaded_model(self._library, record.id)
        tokenizer = load_tokenizer(self._library.path(record.folder))
        return OwnModel(model, tokenizer, record.name, special_ids(tokenizer))

    # --- what the features are active on --------------------------------------------------------

    def _contexts(self) -> dict[int, list[Excerpt]]:
        """Of the features, and of some others for the null, with the activations that are looked
        at."""
        from mistudio.engine.features.describers import shown_to_describers
        from mistudio.engine.features.excerpts import excerpts, with_activations
        from mistudio.engine.features.model_score import needed

        library, job = self._library, self._job
        store, tokens = open_features(library, self._run)
        self._store = store
        sae = library.saes.get(self._run.sae_id)
        read = self._reader(store, tokens, sae.model_id)
        stage = Stage(self._context, "read contexts", None)
        found: dict[int, list[Excerpt]] = {}
        for number, feature in enumerate(job.features):
            mine = excerpts(store, tokens, feature)
            wanted = needed(mine, job.contexts, feature, job.seed)
            if job.write:
                with contextlib.suppress(InvalidInput):  # told as one that cannot be described
                    wanted += shown_to_describers(mine)
            within = Within(stage, number, len(job.features))
            found[feature] = with_activations(mine, wanted, lambda w, f=feature: read(w, f))  # type: ignore[misc]
            within.report(1, 1)
        if job.contexts:
            for other in partners(store, job.features, job.seed):
                found[other] = excerpts(store, tokens, other)
        return found

    def _reader(self, store: Any, tokens: Any, model_id: int) -> Any:
        from mistudio.engine.features.live import window_activations
        from mistudio.engine.sae.files import load_sae

        library = self._library
        model = loaded_model(library, model_id, Stage(self._context, "load model"))
        saved = load_sae(library.path(library.saes.get(self._run.sae_id).folder))
        dictionary = saved.dictionary.to(model.device)
        point = saved.site.input
        median = medians_of(model, tokens, [saved.site], store.meta)[point]

        def read(windows: Any, feature: int) -> Any:
            return window_activations(
                model,
                dictionary,
                point,
                median,
                tokens,
                windows,
                [feature],
                store.meta.context,
                _Only(self._context),
            )[0][..., 0]

        return read

    def _tokenizer(self) -> Any:
        from mistudio.engine.models.loading import load_tokenizer

        model_id = self._library.saes.get(self._run.sae_id).model_id
        return load_tokenizer(self._library.path(self._library.models.get(model_id).folder))

    # --- descriptions ---------------------------------------------------------------------------

    def _described(
        self, model: LanguageModel, found: Mapping[int, list[Excerpt]]
    ) -> tuple[dict[int, str], list[int]]:
        from mistudio.engine.features.describers import describe, shown_to_describers

        tokenizer, stage = self._tokenizer(), Stage(self._context, "describe", None)
        texts: dict[int, str] = {}
        unparsed = []
        features = self._job.features
        for number, feature in enumerate(features):
            stage.report(number, len(features))
            try:
                shown_to_describers(found[feature])
            except InvalidInput:  # it is active nowhere that could be shown
                text = None
            else:
                text = describe(model, found[feature], tokenizer, stage)
            if text is None:
                unparsed.append(feature)
            else:
                texts[feature] = text
                self._keep(model.name, feature, text, None)  # so that a stop keeps what is done
        return texts, unparsed

    def _shown(self) -> dict[int, str]:
        """The labels that the features have now; where there is none, the rule's description."""
        from mistudio.engine.features.rules import Vocabulary
        from mistudio.engine.features.score import Scores

        notes = self._library.feature_notes.of_sae(self._run.sae_id)
        texts = {f: notes[f].label for f in self._job.features if f in notes and notes[f].label}
        missing = [f for f in self._job.features if f not in texts]
        scores = Scores.read(self._store) if missing else None
        if scores is not None:
            tokenizer = self._tokenizer()
            vocabulary = Vocabulary.of(tokenizer, len(tokenizer))
            texts |= {f: scores.description(f, vocabulary) for f in missing if scores.contexts[f]}
        return texts

    def _judged(
        self,
        model: LanguageModel,
        texts: Mapping[int, str],
        found: Mapping[int, list[Excerpt]],
    ) -> dict[int, Judged]:
        from mistudio.engine.features.model_score import model_scores

        stage = Stage(self._context, "judge", None)
        return model_scores(
            model, texts, found, self._tokenizer(), self._job.contexts, self._job.seed, stage
        )

    def _keep(self, origin: str, feature: int, text: str, judged: Judged | None) -> None:
        """A label (where one was written) and its score (where there is one)."""
        library, sae_id = self._library, self._run.sae_id
        detection = judged.detection if judged else None
        details: dict[str, Any] = {"description": text, "model": origin}
        if judged is not None:
            fuzzing = asdict(judged.fuzzing) if judged.fuzzing else None
            details |= {
                "fuzzing": fuzzing,
                "threshold": judged.threshold,
                "prompts": judged.prompts,
                "unanswered": judged.unanswered,
            }
        with library.transaction():
            if detection is not None:
                write_score(library, sae_id, feature, "model", detection, details)
            if self._job.write:
                measured = {
                    "score": detection.accuracy if detection else None,
                    "low": detection.low if detection else None,
                    "high": detection.high if detection else None,
                }
                library.feature_labels.add(
                    sae_id=sae_id,
                    feature=feature,
                    text=text,
                    source="model",
                    origin=origin,
                    details={**details, "measure": "balanced accuracy of detection"},
                    **measured,
                )


class _Only:
    """Hears that the work should stop; what single batches report is not shown."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def check(self) -> None:
        self._progress.check()

    def report(
        self, done: float, total: float | None = None, phase: str | None = None, **metrics: object
    ) -> None:
        pass


# --- the server -----------------------------------------------------------------------------------


def server(address: str, model: str) -> Any:
    """The server at an address. UserError where it lies beyond this machine and is not the one
    that the user confirmed."""
    from mistudio.engine.features.language_models import Server

    if not model.strip():
        raise InvalidInput(
            "No model chosen",
            "The server has to be told which of its models to use.",
            "Connect to the server and choose one.",
            field="server_model",
        )
    at = str(Address.parse(address))
    return Server(at, model.strip(), key_for(at), is_confirmed(at))


def is_confirmed(address: str) -> bool:
    """Whether text may be sent to an address: always on this machine, else where the user
    confirmed this very address."""
    at = Address.parse(address)
    return at.is_loopback or Settings().get("describer_confirmed") == str(at)


def models_of(address: str) -> list[str]:
    """Names of the models that a server offers: asks it, so not for the window's thread."""
    from mistudio.engine.features.language_models import Server

    at = str(Address.parse(address))
    return Server(at, "", key_for(at), is_confirmed(at)).models()


def remember_key(address: str, text: str) -> bool:
    """Keep a server's key in the system's keyring, "" forgets it; False where there is none, then
    it is held until the program ends. May take a moment."""
    at = str(Address.parse(address))
    text = text.strip()
    if text and (not text.isascii() or not text.isprintable() or " " in text):
        raise InvalidInput(
            "This is no key", "A key is one word of letters and digits.", field="key"
        )
    backend = credentials.keyring_for_secrets()
    _typed.pop(at, None)
    if text:
        logs.hide(text)
        _typed[at] = Secret(text)
    if backend is None:
        return False
    try:
        if text:
            backend.set_password(credentials.SERVICE, _user(at), text)
            _typed.pop(at)
        elif backend.get_password(credentials.SERVICE, _user(at)) is not None:
            backend.delete_password(credentials.SERVICE, _user(at))
    except Exception as exc:  # each backend raises its own kinds
        if text:
            return False
        raise UserError(
            "The key could not be removed",
            f"The system's keyring keeps it ({type(exc).__name__}).",
            f"Remove the entry {_user(at)!r} of {credentials.SERVICE} in the keyring's program.",
        ) from exc
    return True


def key_for(address: str) -> Secret | None:
    """The key that was given for this very address; None where there is none."""
    if address in _typed:
        return _typed[address]
    backend = credentials.keyring_for_secrets()
    text = None
    if backend is not None:
        with contextlib.suppress(Exception):  # a locked keyring is as good as none
            text = backend.get_password(credentials.SERVICE, _user(address))
    if not text:
        return None
    logs.hide(text)
    return Secret(text)


def _user(address: str) -> str:
    return f"describer {address}"
