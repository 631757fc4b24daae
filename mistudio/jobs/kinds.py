"""Every kind of job by its name, and a job back from its row."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mistudio.errors import Incompatible
from mistudio.jobs.ablation import Ablate
from mistudio.jobs.calibrating import Calibrate, ScoreOutputs
from mistudio.jobs.coactivation import CoActivate
from mistudio.jobs.datasets import AddDataset, AddSampleDataset
from mistudio.jobs.demo import Demo
from mistudio.jobs.describing import DescribeFeatures
from mistudio.jobs.experiments import LayerStudy, PromptBatch, Sweep
from mistudio.jobs.extraction import Extract
from mistudio.jobs.feature_exports import ExportFeatures, ExportWholeContexts
from mistudio.jobs.feature_map import MapFeatures, SampleFeatures
from mistudio.jobs.features import Discover, DiscoverRun
from mistudio.jobs.hub_datasets import DownloadDataset
from mistudio.jobs.job import Job
from mistudio.jobs.models import AddModel, CheckQuality
from mistudio.jobs.sae_measuring import MeasureSae
from mistudio.jobs.saes import DownloadSae, Export, ImportSae
from mistudio.jobs.scoring import ScoreFeatures
from mistudio.jobs.searching import IndexDataset
from mistudio.jobs.speed import Measure
from mistudio.jobs.statistics import AnalyseDataset
from mistudio.jobs.steering import Steer
from mistudio.jobs.steering_exports import ExportVector
from mistudio.jobs.tokenizing import AddTokenizer, Tokenize
from mistudio.jobs.training import Train

__all__ = [
    "KINDS",
    "Ablate",
    "AddDataset",
    "AddModel",
    "AddSampleDataset",
    "AddTokenizer",
    "AnalyseDataset",
    "Calibrate",
    "CheckQuality",
    "CoActivate",
    "Demo",
    "DescribeFeatures",
    "Discover",
    "DiscoverRun",
    "DownloadDataset",
    "DownloadSae",
    "Export",
    "ExportFeatures",
    "ExportVector",
    "ExportWholeContexts",
    "Extract",
    "ImportSae",
    "IndexDataset",
    "LayerStudy",
    "MapFeatures",
    "Measure",
    "MeasureSae",
    "PromptBatch",
    "SampleFeatures",
    "ScoreFeatures",
    "ScoreOutputs",
    "Steer",
    "Sweep",
    "Tokenize",
    "Train",
    "job_from_row",
]

KINDS: dict[str, Any] = {
    kind.kind: kind
    for kind in (
        AddDataset,
        AddSampleDataset,
        DownloadDataset,
        Tokenize,
        AddTokenizer,
        AnalyseDataset,
        AddModel,
        CheckQuality,
        Extract,
        Measure,
        Train,
        Discover,
        DiscoverRun,
        CoActivate,
        Ablate,
        MapFeatures,
        SampleFeatures,
        ScoreFeatures,
        DescribeFeatures,
        Steer,
        Calibrate,
        ScoreOutputs,
        Sweep,
        PromptBatch,
        LayerStudy,
        ExportVector,
        Export,
        ExportFeatures,
        ExportWholeContexts,
        ImportSae,
        DownloadSae,
        MeasureSae,
        IndexDataset,
        Demo,
    )
}


def job_from_row(kind: str, params: dict[str, Any]) -> Job:
    """The job that a row describes, so that an interrupted one can be run again."""
    if kind not in KINDS:
        raise Incompatible(
            "This job is of a kind that this version does not know",
            f"Its kind is {kind!r}.",
            "Update miStudio, or start the work anew from its tab.",
        )
    values = {
        # JSON knows no tuples
        entry.name: tuple(value) if isinstance(entry.default, tuple) else value
        for entry in fields(KINDS[kind])
        if (value := params.get(entry.name, entry)) is not entry
    }
    job: Job = KINDS[kind](**values)
    return job
