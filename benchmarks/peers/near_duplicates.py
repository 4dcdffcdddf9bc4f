"""Near-duplicates of a corpus by one library: `python -m benchmarks.peers.near_duplicates ours corpus.txt out.json`.

The corpus has a text a line. Written: the pairs found, wall and CPU seconds from opening the file to the last pair;
imports and the set-up of a library are left out.
"""

import json
import resource
import shutil
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THRESHOLD = 0.8
PERMUTATIONS = 128
Pairs = set[tuple[int, int]]


def ours(corpus: Path) -> Any:
    """The kernels of `app.ingestion.near_duplicates` in one process."""
    import numpy as np
    import pyarrow as pa

    from app.ingestion.near_duplicates import BANDS, band_keys, pairs
    from app.ingestion.signatures import signatures

    signatures(pa.array(["warm"]))

    def run() -> Pairs:
        signed = signatures(pa.array(corpus.read_text().splitlines()))
        found = [pairs(band_keys(signed, THRESHOLD, band), signed, THRESHOLD) for band in range(BANDS)]
        return {(left, right) for left, right in np.unique(np.concatenate(found), axis=0).tolist()}

    return run


def datasketch(corpus: Path) -> Any:
    """MinHash and MinHashLSH; candidates are kept whose signatures say so."""
    from datasketch import MinHash, MinHashLSH

    def run() -> Pairs:
        # At 0.8 it would trade a quarter of the recall for precision, which the verification gives anyway.
        lsh = MinHashLSH(threshold=THRESHOLD - 0.1, num_perm=PERMUTATIONS)
        grams = (_grams(text) for text in corpus.read_text().splitlines())
        found: Pairs = set()
        made: list[Any] = []
        for number, minhash in enumerate(MinHash.generator(grams, num_perm=PERMUTATIONS)):
            found |= {(other, number) for other in lsh.query(minhash) if made[other].jaccard(minhash) >= THRESHOLD}
            lsh.insert(number, minhash, check_duplication=False)
            made.append(minhash)
        return found

    return run


def _grams(text: str) -> list[bytes]:
    words = text.lower().split()
    return [" ".join(words[at : at + 3]).encode() for at in range(max(1, len(words) - 2))]


def datatrove(corpus: Path) -> Any:
    """Its signature and bucket steps, one task each, with its own 14 buckets of 8 hashes; pairs that share a bucket."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Spaces(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    config = MinhashConfig(n_grams=3)
    folder = Path(tempfile.mkdtemp())

    def run() -> Pairs:
        texts = enumerate(corpus.read_text().splitlines())
        documents = (Document(text=text, id=str(number)) for number, text in texts)
        sign = MinhashDedupSignature(str(folder / "signatures"), config, Spaces())
        sign.run(documents)
        compare = MinhashDedupBuckets(str(folder / "signatures"), str(folder / "pairs"), config=config)
        for bucket in range(config.num_buckets):
            compare.run(None, bucket, config.num_buckets)
        found: Pairs = set()
        for file in (folder / "pairs").glob("*.dups"):
            for _, left, _, right in struct.iter_unpack("<4I", file.read_bytes()):
                found.add((min(left, right), max(left, right)))
        shutil.rmtree(folder)
        return found

    return run


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    name, corpus, out = sys.argv[1:]
    run = {"ours": ours, "datasketch": datasketch, "datatrove": datatrove}[name](Path(corpus))
    cpu_s, started_s = _cpu_s(), time.perf_counter()
    found = run()
    figures = {"seconds": time.perf_counter() - started_s, "cpu_s": _cpu_s() - cpu_s, "pairs": sorted(found)}
    Path(out).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
