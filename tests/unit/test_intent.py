"""The intent model: scikit-learn is the oracle, and damaged files are refused."""

import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.linear_model import SGDClassifier

from app import intent
from app.conversation import content_hash, split_of
from app.errors import ModelError
from app.ingestion import sample
from app.intent import COLUMNS, IntentModel, hashed, labelled
from tests.conftest import ROOT

TEXTS = [
    "where is my order?",
    "my parcel has not come",
    "I want my money back",
    "please refund me",
    "hello there",
    "good morning",
]
LABELS = ["status", "status", "refund", "refund", "greeting", "greeting"]


@pytest.fixture(scope="module")
def model() -> IntentModel:
    return IntentModel.fit(TEXTS, LABELS, seed=17)


@pytest.fixture(scope="module")
def saved(model: IntentModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intent")
    model.save(folder)
    return folder


def by_scikit_learn(texts: list[str], labels: list[str], asked: list[str]) -> np.ndarray:
    def matrix(rows: list[str]) -> csr_matrix:
        dense = np.zeros((len(rows), COLUMNS), dtype=np.float32)
        for row, text in enumerate(rows):
            dense[row, hashed(text, COLUMNS)] = 1.0
            dense[row] /= max(1e-9, np.linalg.norm(dense[row]))
        return csr_matrix(dense)

    classifier = SGDClassifier(
        loss="log_loss", alpha=intent.REGULARISATION, max_iter=intent.EPOCHS, tol=None, random_state=17
    ).fit(matrix(texts), labels)
    shares: np.ndarray = classifier.predict_proba(matrix(asked))
    return shares


@pytest.mark.parametrize("labels", [LABELS, ["one" if label == "status" else "two" for label in LABELS]])
def test_probabilities_are_those_of_scikit_learn(labels: list[str]) -> None:
    asked = ["wheer is my ordr", "refund my money please", "hello", "", "🙂", "12345"]
    ours = IntentModel.fit(TEXTS, labels, seed=17)
    assert ours.labels == tuple(sorted(set(labels)))
    np.testing.assert_allclose(ours.probabilities(asked), by_scikit_learn(TEXTS, labels, asked), atol=1e-5)


def test_questions_of_the_sample_shop_are_told_apart() -> None:
    records = [json.loads(line)["messages"] for line in sample.lines(7, 0, 2_000, 0.0)]
    held = [messages for messages in records if split_of(content_hash(messages), 0.1) == "validation"]
    texts, labels = labelled(messages for messages in records if messages not in held)
    tested, wanted = labelled(held)
    fitted = IntentModel.fit(texts, labels, seed=17)
    right = [label == want for (label, _), want in zip(fitted.predict(tested), wanted, strict=True)]
    assert len(fitted.labels) >= 25
    assert sum(right) / len(right) >= 0.95


def test_the_same_seed_gives_the_same_model(model: IntentModel) -> None:
    again = IntentModel.fit(TEXTS, LABELS, seed=17)
    np.testing.assert_array_equal(again.weights, model.weights)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=4))
def test_a_saved_model_predicts_exactly_the_same(model: IntentModel, saved: Path, texts: list[str]) -> None:
    assert IntentModel.load(saved).predict(texts) == model.predict(texts)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gets_a_label_and_a_confidence(model: IntentModel, text: str) -> None:
    [(label, confidence)] = model.predict([text])
    assert label in model.labels
    assert 1 / len(model.labels) - 1e-6 <= confidence <= 1.0


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", categories=["L", "N", "Zs", "P"]), max_size=60))
def test_spelling_of_characters_case_and_space_do_not_matter(text: str) -> None:
    wanted = hashed(text, COLUMNS)
    for variant in (unicodedata.normalize("NFD", text), text.casefold(), f"  {text}\n"):
        np.testing.assert_array_equal(hashed(variant, COLUMNS), wanted)


def test_numbers_of_the_same_length_are_the_same() -> None:
    np.testing.assert_array_equal(hashed("order 4512", COLUMNS), hashed("order 9981", COLUMNS))


def test_one_label_is_refused() -> None:
    with pytest.raises(ModelError, match="needs two labels or more, got \\['refund'\\]"):
        IntentModel.fit(["a", "b"], ["refund", "refund"], seed=1)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("intent.json", None, "No such file"),
        ("intent.json", b"{", "JSONDecodeError"),
        ("intent.json", b"[]", "not of format 1"),
        ("intent.json", b'{"format": 2}', "not of format 1"),
        ("intent.json", b'{"format": 1, "labels": ["a", "a"], "columns": 16384}', "no list of distinct labels"),
        ("intent.json", b'{"format": 1, "labels": ["a", "b"], "characters": [9]}', "its n-grams are \\[9\\]"),
        (
            "intent.json",
            b'{"format": 1, "labels": ["a", "b"], "columns": 16384, "characters": [2, 3, 4]}',
            "does not hold weights \\(16384, 2\\)",
        ),
        ("intent.safetensors", None, "No such file"),
        ("intent.safetensors", b"nonsense", "SafetensorError"),
        ("intent.safetensors", "cut", "SafetensorError"),
        ("intent.safetensors", "nan", "not finite"),
    ],
)
def test_damaged_files_are_refused(
    model: IntentModel, tmp_path: Path, file: str, content: bytes | str | None, reason: str
) -> None:
    model.save(tmp_path)
    path = tmp_path / file
    if content is None:
        path.unlink()
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "nan":
        IntentModel(model.labels, np.full_like(model.weights, np.nan), model.bias).save(tmp_path)
    else:
        path.write_bytes(bytes(content))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=reason):
        IntentModel.load(tmp_path)


def test_a_serving_replica_needs_neither_scikit_learn_nor_torch(saved: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from app.intent import IntentModel\n"
        f"IntentModel.load(Path({str(saved)!r})).predict(['where is my order?'])\n"
        "print(sorted({'sklearn', 'scipy', 'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
