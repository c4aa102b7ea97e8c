"""Datasets whose batches Python code makes: read once into arrays, or refused with the remedy."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import ObjectiveError
from pipeline.objective import load_objective
from pipeline.training import batches
from pipeline.training.batches import read_batches
from tests.test_objective import MODEL, load

RNG = np.random.default_rng(3)
X = RNG.standard_normal((70, 2)).astype("float32")
Y = np.arange(70) % 3


class Batches(keras.utils.PyDataset):
    """Samples in batches of 16, of which the last is smaller; shuffled after every epoch."""

    def __init__(self, make=lambda rows: (X[rows], Y[rows]), count: int | None = 5) -> None:
        super().__init__()
        self.make, self.count, self.order = make, count, np.arange(70)

    def __getitem__(self, number: int):
        return self.make(self.order[16 * number : 16 * number + 16])

    @property
    def num_batches(self) -> int | None:
        return self.count

    def on_epoch_end(self) -> None:
        np.random.shuffle(self.order)


def test_every_batch_is_read_once_in_its_order():
    """Also a last one that is smaller; parts that are no dataset stay as they are."""
    train, test = read_batches("here", (Batches(), (X, Y)), "float32")
    np.testing.assert_array_equal(train[0], X)
    np.testing.assert_array_equal(train[1], Y)
    assert test[0] is X and test[1] is Y
    alone = read_batches("here", Batches(), "float32")
    np.testing.assert_array_equal(alone[0], X)
    for bare in (lambda rows: X[rows], lambda rows: (X[rows],)):
        (x,) = read_batches("here", Batches(bare), "float32")
        np.testing.assert_array_equal(x, X)
    arrays = (X, Y)
    assert read_batches("here", arrays, "float32") == arrays


def test_inputs_by_name_and_weights_keep_their_form():
    """Dicts, lists, double precision, sample weights."""

    def make(rows: np.ndarray):
        return {"a": X[rows].astype("float64"), "b": [str(i) for i in rows]}, [Y[rows], X[rows]], np.ones(len(rows))

    x, (first, second), weight = read_batches("here", [Batches(make), Batches(make)], "float32")[0]
    assert x["a"].dtype == np.float32 and list(x["b"]) == [str(i) for i in range(70)]
    np.testing.assert_array_equal(first, Y)
    np.testing.assert_array_equal(second, X)
    assert weight.shape == (70,)


def augmented(rows: np.ndarray):
    """Return other values whenever it is called."""
    return X[rows] + np.random.standard_normal((len(rows), 2)), Y[rows]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Batches(count=None), "must have a number of batches, got none. Define __len__"),
        (Batches(count=0), "must have at least one batch"),
        (
            Batches(lambda rows: (X[rows],) * 4),
            r"must be x, \(x, y\) or \(x, y, sample_weight\), got 4 parts in batch 0",
        ),
        (Batches(augmented), "must give the same batch whenever it is read, .* keras.layers.RandomFlip"),
        (Batches(lambda rows: ([X[rows][:, 0].tolist(), []], Y[rows])), "batch 0: x must hold samples of one length"),
        (Batches(lambda rows: (X[rows][:, : 1 + (rows[0] < 32)], Y[rows])), "must have the form of the first"),
    ],
)
def test_what_cannot_be_read_once_is_refused(dataset, message):
    """In one line that says where, and what to do."""
    with pytest.raises(ObjectiveError, match=message) as error:
        read_batches("here", (dataset, (X, Y)), "float32")
    assert str(error.value).startswith("here: train: ") and "\n" not in str(error.value)


def test_more_than_memory_holds_is_not_read(monkeypatch):
    """The first batch tells how much all of them take."""
    read = []
    monkeypatch.setattr(batches, "memory_limit", lambda: 1000.0)
    with pytest.raises(ObjectiveError, match=r"must take at most .* GiB.*Return tf.data datasets"):
        read_batches("here", Batches(lambda rows: read.append(rows) or (X[rows], Y[rows])), "float32")
    assert len(read) == 2


def test_photos_from_a_folder_by_an_image_generator(tmp_path, monkeypatch):
    """As a course writes it, by a folder beside the program: the same arrays whenever it is loaded."""
    for part, count in (("train", 6), ("test", 3)):
        for label in ("hat", "shoe"):
            (tmp_path / "photos" / part / label).mkdir(parents=True)
            for i in range(count):
                pixels = RNG.integers(0, 255, (8, 8, 3), dtype="uint8")
                Image.fromarray(pixels).save(tmp_path / "photos" / part / label / f"{i}.png")
    (tmp_path / "course.py").write_text(
        "import keras\n"
        "from tensorflow.keras.preprocessing.image import ImageDataGenerator\n"
        "def load_data():\n"
        "    made = ImageDataGenerator(rescale=1 / 255)\n"
        "    return tuple(made.flow_from_directory(f'photos/{part}', target_size=(8, 8), batch_size=5)\n"
        "                 for part in ('train', 'test'))\n"
        "def build_model():\n"
        "    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten(), keras.layers.Dense(2)])\n"
        "    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), metrics=['accuracy'])\n"
        "    return model\n"
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    one, again = (load_objective("course.py", tmp_path) for _ in range(2))
    assert one.train.x.shape == (12, 8, 8, 3) and one.train.x.max() <= 1 and one.test.samples == 6
    assert one.train.y.sum(axis=0).tolist() == [6, 6]
    assert one.train.fingerprint() == again.train.fingerprint()


def test_what_its_batches_raise_says_where(tmp_path):
    """A fault in the user's own class is told like one in `load_data`."""
    text = MODEL + "def load_data():\n    class Own(keras.utils.PyDataset):\n"
    with pytest.raises(ObjectiveError, match=r"load_data\(\) raised NotImplementedError.*num_batches"):
        load(tmp_path, text + "        pass\n    return Own(), Own()")
    text += (
        "        def __len__(self): return 3\n        def __getitem__(self, i): return 1 / 0\n    return Own(), Own()"
    )
    with pytest.raises(ObjectiveError, match=r"load_data\(\) raised ZeroDivisionError.*line"):
        load(tmp_path, text)
