"""The Hugging Face Hub: search, what a dataset holds, downloads that go on where they ended, and
documents read from there without storing them.

`access` says who asks; `session` makes the requests; `repository`, `layout` and `catalogue` say
what there is; `download` fetches files, `remote_files` and `stream` read them where they lie;
`models` knows what a model needs.
"""

from mistudio.engine.hub.access import Access, Secret, current_access, set_provider
from mistudio.engine.hub.catalogue import (
    Found,
    HubDataset,
    dataset_info,
    inspect,
    search_datasets,
)
from mistudio.engine.hub.download import FetchedFile, download_files
from mistudio.engine.hub.layout import Config, Split
from mistudio.engine.hub.models import (
    HubModel,
    download_model,
    model_code,
    model_info,
    search_models,
)
from mistudio.engine.hub.refusals import Subject
from mistudio.engine.hub.repository import RemoteFile, check_repository, is_repository_id
from mistudio.engine.hub.session import Session
from mistudio.engine.hub.stream import read_fetched, read_splits, stream_documents

__all__ = [
    "Access",
    "Config",
    "FetchedFile",
    "Found",
    "HubDataset",
    "HubModel",
    "RemoteFile",
    "Secret",
    "Session",
    "Split",
    "Subject",
    "check_repository",
    "current_access",
    "dataset_info",
    "download_files",
    "download_model",
    "inspect",
    "is_repository_id",
    "model_code",
    "model_info",
    "read_fetched",
    "read_splits",
    "search_datasets",
    "search_models",
    "set_provider",
    "stream_documents",
]
