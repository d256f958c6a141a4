import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pcam_jax.config.schema import DataConfig
from pcam_jax.data.split import assign_splits, split_warning
from pcam_jax.runtime.errors import UserError

law = settings(max_examples=30)


def make_index(labels, groups=None, splits=None) -> pd.DataFrame:
    count = len(labels)
    return pd.DataFrame(
        {
            "id": [f"patch{number:05d}" for number in range(count)],
            "label": np.asarray(labels, np.int32),
            "group": [""] * count if groups is None else [str(group) for group in groups],
            "split": [""] * count if splits is None else list(splits),
        }
    )


def random_index(seed: int, count: int, groups: int = 0, classes: int = 2) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    return make_index(labels, [f"slide{g}" for g in rng.integers(0, groups, count)] if groups else None)


@law
@given(st.integers(0, 99), st.integers(20, 300), st.floats(0.1, 0.9), st.integers(1, 4))
def test_ungrouped_fractions_are_exact_in_every_class(seed, count, fraction, classes):
    index = random_index(seed, count, classes=classes)
    assume(np.bincount(index["label"], minlength=classes).min() >= 10)
    splits = assign_splits(index, DataConfig(validation_fraction=fraction, split_seed=seed))
    for label in range(classes):
        members = splits[index["label"] == label]
        assert abs((members == "validation").sum() - fraction * len(members)) < 1
        assert set(members) <= {"train", "validation"}


@law
@given(st.integers(0, 99), st.integers(1, 60), st.booleans())
def test_the_row_order_changes_nothing(seed, groups, by_example):
    index = random_index(seed, 400, groups + 3)
    data = DataConfig(split_seed=seed, train_fraction=0.5, split_by="example" if by_example else "group")
    shuffled = index.sample(frac=1, random_state=seed)
    first = dict(zip(index["id"], assign_splits(index, data), strict=True))
    second = dict(zip(shuffled["id"], assign_splits(shuffled, data), strict=True))
    assert first == second


@law
@given(st.integers(0, 99), st.integers(5, 80))
def test_groups_stay_whole_and_fractions_come_close(seed, groups):
    index = random_index(seed, 600, groups)
    data = DataConfig(validation_fraction=0.25, train_fraction=0.5, split_seed=seed)
    splits = assign_splits(index, data)
    assert (pd.Series(splits).groupby(index["group"]).nunique() == 1).all()
    largest = index["group"].value_counts().max()
    for split, fraction in (("validation", 0.25), ("train", 0.5)):
        for label in (0, 1):
            members = index["label"] == label
            missed = abs((splits[members] == split).sum() - fraction * members.sum())
            assert missed <= largest, (split, label)


def test_many_groups_are_balanced_closely():
    # Sizes and class shares as uneven as slides are: a few tumour-rich large ones, many small ones.
    rng = np.random.default_rng(0)
    sizes = np.maximum(1, rng.lognormal(4, 1, 160)).astype(int)
    shares = rng.beta(0.6, 0.9, 160)
    groups = np.repeat(np.arange(160), sizes)
    index = make_index(rng.random(len(groups)) < shares[groups], groups)
    for seed in range(5):
        splits = assign_splits(index, DataConfig(split_seed=seed))
        for label in (0, 1):
            members = splits[index["label"] == label]
            assert np.mean(members == "validation") == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize("groups", [0, 12])
def test_folds_tile_the_labelled_set(groups):
    index = random_index(3, 200, groups)
    index.loc[:9, "label"] = -1
    index.loc[10:19, "split"] = "test"
    validated = np.zeros(len(index), int)
    for fold in range(4):
        splits = assign_splits(index, DataConfig(folds=4, fold=fold))
        validated += splits == "validation"
        np.testing.assert_array_equal(splits == "test", index["split"] == "test")
        np.testing.assert_array_equal(splits == "", (index["label"] == -1) & (index["split"] == ""))
    usable = (index["label"] >= 0) & (index["split"] != "test")
    np.testing.assert_array_equal(validated, usable.astype(int))


@pytest.mark.parametrize("groups", [0, 30])
def test_validation_does_not_depend_on_train_fraction(groups):
    index = random_index(5, 500, groups)
    whole = assign_splits(index, DataConfig(validation_fraction=0.3))
    smaller = {}
    for fraction in (0.1, 0.3, 0.7):
        splits = assign_splits(index, DataConfig(validation_fraction=0.3, train_fraction=fraction))
        np.testing.assert_array_equal(splits == "validation", whole == "validation")
        smaller[fraction] = set(index["id"][splits == "train"])
        assert len(smaller[fraction]) / len(index) == pytest.approx(
            fraction, abs=0.01 if not groups else 0.05
        )
    if not groups:
        assert smaller[0.1] < smaller[0.3] < smaller[0.7]


def test_seeds_and_only_seeds_change_the_split():
    for groups in (0, 20):
        index = random_index(1, 300, groups)
        drawn = [assign_splits(index, DataConfig(split_seed=seed)) for seed in (0, 0, 1)]
        np.testing.assert_array_equal(drawn[0], drawn[1])
        assert (drawn[0] != drawn[2]).any()


def test_every_group_gets_its_turn_in_validation():
    # Ten slides, one of them large: a greedy assignment would train on the large one for every seed.
    groups = np.repeat(np.arange(10), [200] + [40] * 9)
    index = make_index(np.arange(len(groups)) % 2, groups)
    turns = [
        set(index["group"][assign_splits(index, DataConfig(split_seed=seed)) == "validation"])
        for seed in range(40)
    ]
    assert set().union(*turns) >= {str(group) for group in range(1, 10)}


def test_raw_splits_are_honoured():
    labels = [0, 1] * 20 + [-1] * 4
    splits = ["train"] * 20 + ["validation"] * 10 + ["test"] * 12 + ["train", "validation"]
    index = make_index(labels, splits=splits)
    result = assign_splits(index, DataConfig())
    expected = np.array(splits)
    expected[-2:] = ""  # unlabelled rows cannot train or validate
    np.testing.assert_array_equal(result, expected)
    half = assign_splits(index, DataConfig(train_fraction=0.5))
    assert (half == "train").sum() == 10
    assert (half == "validation").sum() == 10


def test_equal_pixels_share_a_split():
    index = random_index(2, 60)
    index["id"] = [f"patch{number % 20:05d}" for number in range(60)]
    splits = assign_splits(index, DataConfig(validation_fraction=0.4))
    assert (pd.Series(splits).groupby(index["id"]).nunique() == 1).all()


def test_missing_labels_and_groups_may_be_nan():
    index = random_index(4, 40).astype({"label": float})
    index.loc[:3, "label"] = np.nan
    index["group"] = np.nan
    splits = assign_splits(index, DataConfig())
    assert (splits[:4] == "").all()
    assert (splits[4:] != "").all()


def test_a_new_row_moves_few_others():
    index = random_index(6, 1000)
    before = assign_splits(index.iloc[:-1], DataConfig())
    after = assign_splits(index, DataConfig())[:-1]
    assert (before != after).sum() <= 1


@pytest.mark.parametrize(
    ("settings_", "sentence"),
    [
        ({"validation_fraction": 0.0}, "data.validation_fraction is 0"),
        ({"validation_fraction": 1.5}, "data.validation_fraction is 1.5"),
        ({"train_fraction": 0.0}, "data.train_fraction is 0"),
        ({"train_fraction": 0.9}, "together more than 1"),
        ({"folds": 1}, "data.folds is 1"),
        ({"folds": 3, "fold": 3}, "data.fold is 3.*numbered 0 to 2"),
        ({"folds": 9}, "too few groups.*for data.folds = 9: 8"),
        ({"folds": 99, "split_by": "example"}, "too few examples.*: 40"),
        ({"split_by": "slide"}, "data.split_by is 'slide'"),
        ({"validation_fraction": 0.01, "split_by": "example"}, "validation split is empty"),
        ({"folds": 2, "split_file": "x.csv"}, "data.folds must be 0"),
    ],
)
def test_impossible_settings_are_sentences(settings_, sentence):
    index = make_index([0, 1] * 20, np.arange(40) // 5)
    with pytest.raises(UserError, match=sentence):
        assign_splits(index, DataConfig(**settings_))


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (make_index([-1, -1]), "train split is empty"),
        (make_index([0] * 20 + [1]), "no example of class 1"),
        (make_index([0, 1] * 9, [1] * 18), "too few groups.*: 1"),
        (make_index([0, 1, 0, 1], splits=["val", "", "", ""]), "the split 'val'"),
        (make_index([0, 1, 0], splits=["validation", "validation", "test"]), "train split is empty"),
    ],
)
def test_unsplittable_data_is_a_sentence(index, sentence):
    with pytest.raises(UserError, match=sentence):
        assign_splits(index, DataConfig())


def test_folds_over_dictated_validation_are_refused():
    index = make_index([0, 1] * 10, splits=["validation"] * 4 + ["train"] * 16)
    with pytest.raises(UserError, match="names its own validation"):
        assign_splits(index, DataConfig(folds=2))


def test_split_file_round_trip(tmp_path):
    index = random_index(7, 50)
    index.loc[:5, ["label", "split"]] = [-1, "test"]
    splits = assign_splits(index, DataConfig(split_seed=3, train_fraction=0.5))
    path = tmp_path / "split.csv"
    table = index[["id", "label"]].assign(split=splits)
    table.sample(frac=1, random_state=0).to_csv(path, index=False)
    np.testing.assert_array_equal(assign_splits(index, DataConfig(split_file=str(path))), splits)
    # Test rows that the raw data dictates need not be repeated.
    table[splits != "test"].to_csv(path, index=False)
    np.testing.assert_array_equal(assign_splits(index, DataConfig(split_file=str(path))), splits)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("id,split\na,train\nb,validation\nc,train\n", "leaves out labelled examples.*: d;"),
        ("id,split\na,train\nb,validation\nc,train\nd,validation\nz,train\n", "not in the store: z"),
        ("id,split\na,train\na,train\nb,validation\nc,train\nd,validation\n", "lists a more than once"),
        ("id,split\na,train\nb,validation\nc,train\nd,dev\n", "gives d the split 'dev'"),
        ("id,split\na,train\nb,validation\nc,train\nd,validation\ne,train\n", "unlabelled examples: e"),
        ("id,split\na,train\nb,validation\nc,train\nd,validation\nf,train\n", "calls test: f"),
        ("id,fold\na,1\n", "columns id and split"),
        ("", "cannot be read"),
        (None, "does not exist"),
    ],
)
def test_bad_split_files_are_named(tmp_path, text, sentence):
    index = make_index([0, 0, 1, 1, -1, 0], splits=["", "", "", "", "", "test"])
    index["id"] = list("abcdef")
    path = tmp_path / "split.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=sentence):
        assign_splits(index, DataConfig(split_file=str(path)))


def test_warnings_say_what_the_split_does(tmp_path):
    grouped, loose = random_index(8, 100, 10), random_index(8, 100)
    assert split_warning(grouped, DataConfig()) is None
    assert "random" in (split_warning(loose, DataConfig()) or "")
    assert "overstate" in (split_warning(grouped, DataConfig(split_by="example")) or "")
    partly = grouped.copy()
    partly.loc[:19, "group"] = ""
    assert "20 of 100 examples name no slide" in (split_warning(partly, DataConfig()) or "")
    path = tmp_path / "split.csv"
    leaky = assign_splits(grouped, DataConfig(split_by="example"))
    grouped[["id"]].assign(split=leaky).to_csv(path, index=False)
    assert "overstate" in (split_warning(grouped, DataConfig(split_file=str(path))) or "")


def test_undersampling_evens_the_training_classes_alone():
    index = pd.DataFrame(
        {"id": [f"p{n}" for n in range(200)], "label": [int(n % 10 == 0) for n in range(200)], "group": ""}
    )
    whole = assign_splits(index, DataConfig())
    even = assign_splits(index, DataConfig(undersample=True))
    assert np.array_equal(whole == "validation", even == "validation")
    labels = index["label"].to_numpy()
    assert np.bincount(labels[even == "train"]).tolist() == [16, 16]
    assert set(even[(whole == "train") & (even != "train")]) == {""}
    shuffled = index.sample(frac=1, random_state=0)
    again = assign_splits(shuffled, DataConfig(undersample=True))
    assert np.array_equal(again[np.argsort(shuffled.index)], even)
