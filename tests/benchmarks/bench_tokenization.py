"""How fast a dataset is tokenised beside the tokenizer's own batches, and in how much memory.

    python3 run.py bench tokenization [--megabytes 24] [--tokenizer FOLDER]
    python3 run.py bench tokenization --memory 4 [--tokenizer FOLDER]

The first alternates both in one process, so that other work on the machine meets both alike: the
tokenizer alone gets all texts at once, in memory, with the library's own threads, and gives lists
of ids; miStudio reads the stored documents from disk, encodes them, and writes the token store
with its index and statistics. The figure is the median of the ratios of neighbouring blocks.

The second writes a JSON lines file of that size, links it (it is not copied) and tokenises it in a
process of its own, of which it notes the resident memory against the bytes read.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
TOKENIZER = ROOT / "tests" / "data" / "tiny-llama-0.9m"


def texts(size: int, seed: int = 0) -> Iterator[str]:
    """Real paragraphs in new order, joined to documents of 500 to 20,000 characters, so many
    bytes in all; no two are the same."""
    rng = random.Random(seed)
    with SAMPLE.open(encoding="utf-8") as lines:
        paragraphs = [json.loads(line)["text"] for line in lines]
    written = number = 0
    while written < size:
        number += 1
        parts = rng.choices(paragraphs, k=int(2 ** rng.uniform(0, 5.3)))
        text = f"{number}. " + "\n\n".join(parts)
        written += len(text.encode())
        yield text


def store(documents: Any, tokenizer: Any, folder: Path, progress: Any = None) -> Any:
    from mistudio.engine.datasets.token_writer import write_token_store
    from mistudio.engine.models import loading
    from mistudio.engine.progress import SILENT

    return write_token_store(
        documents,
        tokenizer,
        folder,
        bos_id=loading.adds_bos(tokenizer),
        separator_id=loading.separator_id(tokenizer),
        special_ids=sorted(loading.special_ids(tokenizer)),
        tokenizer_hash="benchmark",
        progress=progress or SILENT,
    )


def speed(folder: Path, megabytes: float, blocks: int) -> None:
    from mistudio.engine.datasets.documents import Document, Documents, write_documents
    from mistudio.engine.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    backend = tokenizer.backend_tokenizer
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        plain = list(texts(int(megabytes * 1e6)))
        size = sum(len(text.encode()) for text in plain)
        write_documents((Document(text) for text in plain), work / "documents")
        ways = {
            "encode_batch_fast of all texts": lambda n: [
                encoding.ids for encoding in backend.encode_batch_fast(plain, False)
            ],
            "tokenizer(texts)": lambda n: tokenizer(plain, add_special_tokens=False, verbose=False)[
                "input_ids"
            ],
            "miStudio": lambda n: store(
                Documents(work / "documents"), tokenizer, work / f"store-{n}"
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        cores: dict[str, list[float]] = {name: [] for name in ways}
        for block in range(blocks + 1):
            for name, way in ways.items():
                # The tokenizer alone on all cores; miStudio as it starts itself (`bootstrap`).
                os.environ["TOKENIZERS_PARALLELISM"] = "false" if name == "miStudio" else "true"
                began, busy = time.perf_counter(), time.process_time()
                way(block)
                if block:  # the first warms the caches of both
                    seconds[name].append(time.perf_counter() - began)
                    cores[name].append(time.process_time() - busy)
    print(f"{size / 1e6:.1f} MB, {len(plain):,} documents, {folder.name}, {blocks} blocks")
    print("| way | MB/s (median) | miStudio's speed in comparison | its processor time |")
    print("|---|---|---|---|")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["miStudio"], strict=True)]
        work_ratios = [b / a for a, b in zip(cores[name], cores["miStudio"], strict=True)]
        print(
            f"| {name} | {size / 1e6 / statistics.median(own):.2f} | "
            f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{statistics.median(work_ratios):.3f} |"
        )


def memory(folder: Path, gigabytes: float) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "large.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for text in texts(int(gigabytes * 1e9)):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        print(f"{source.stat().st_size / 1e9:.2f} GB of JSON lines, {folder.name}", flush=True)
        command = [sys.executable, __file__, "--child", str(source), "--tokenizer", str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def child(source: Path, folder: Path) -> None:
    """Tokenise a linked file; print resident memory against bytes read."""
    from mistudio import bootstrap

    bootstrap.prepare()
    import psutil

    from mistudio.engine.datasets.links import link_to, open_link
    from mistudio.engine.datasets.sources import ReadOptions
    from mistudio.engine.models.loading import load_tokenizer

    process = psutil.Process()
    tokenizer = load_tokenizer(folder)
    rows: list[tuple[float, float]] = []

    class Watch:
        """The progress of the writer, in bytes of text."""

        def check(self) -> None: ...

        def report(self, done: float, *_: object, **__: object) -> None:
            if not rows or done - rows[-1][0] > 2e6:
                rows.append((done, process.memory_info().rss / 2**20))

    before = process.memory_info().rss / 2**20
    began = time.perf_counter()
    target = source.parent / "tokens"
    meta = store(open_link(link_to(source, ReadOptions())), tokenizer, target, Watch())
    seconds = time.perf_counter() - began
    late = [row for row in rows if row[0] > rows[-1][0] / 4]  # after the caches are warm
    slope = statistics.linear_regression([d / 1e9 for d, _ in late], [m for _, m in late]).slope
    documents = sum(meta.documents.values())
    print(
        f"| GB of text | documents | tokens | s | MB before | MB at most | MB per GB of text |\n"
        f"|---|---|---|---|---|---|---|\n"
        f"| {rows[-1][0] / 1e9:.2f} | {documents:,} | {sum(meta.tokens.values()):,} | "
        f"{seconds:.0f} | {before:.0f} | {max(m for _, m in rows):.0f} | {slope:+.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, metavar="FOLDER")
    parser.add_argument("--megabytes", type=float, default=24.0)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--memory", type=float, metavar="GIGABYTES")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.tokenizer)
    elif options.memory:
        memory(options.tokenizer, options.memory)
    else:
        speed(options.tokenizer, options.megabytes, options.blocks)


if __name__ == "__main__":
    main()
