"""The studies' data modules on the real data sets; needs LIGHTNING_ACC_DATA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_acc as la
from lightning_acc.studies.data import AdultDataModule, DigitsDataModule, MNISTDataModule, NewsgroupsDataModule

real = pytest.mark.skipif("LIGHTNING_ACC_DATA" not in os.environ, reason="needs LIGHTNING_ACC_DATA")
MODULES: dict[str, Any] = {
    "adult": AdultDataModule,
    "mnist": lambda **options: MNISTDataModule(digits=[1, 7], **options),
    "newsgroups": NewsgroupsDataModule,
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def ready(name: str, **options: Any) -> Any:
    module = MODULES[name](n_train=60, n_val=40, n_test=50, **options)
    module.setup("fit")
    return module


@real
@pytest.mark.parametrize("name", MODULES)
def test_splits_are_apart_repeatable_and_of_both_classes(name: str) -> None:
    one, same, other = ready(name), ready(name), ready(name, seed=1)
    assert {split: len(samples.labels) for split, samples in one.splits.items()} == {"train": 60, "val": 40, "test": 50}
    for split in one.splits:
        assert np.array_equal(one.splits[split].features, same.splits[split].features)
        assert set(one.splits[split].labels) == {0, 1}
        assert np.isfinite(one.splits[split].features).all()
    assert not np.array_equal(one.splits["train"].features, other.splits["train"].features)
    x, y = next(iter(one.train_dataloader()))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert not any(one.describe_samples()["corrupted"])
    assert x[0].numel() == one.n_features
    train = {row.tobytes() for row in one.splits["train"].features}
    assert sum(row.tobytes() in train for row in one.splits["val"].features) <= 1  # Adult has a few exact repeats


@real
def test_adult_is_described_answer_by_answer() -> None:
    told = ready("adult").describe_samples()
    assert {"age", "education", "occupation", "sex", "hours.per.week"} < set(told)
    for words, age, sex in zip(told["text"], told["age"], told["sex"], strict=True):
        assert words.startswith(f"{age} years, {sex}, ")
    assert type(told["age"][0]) is int


@real
@pytest.mark.parametrize("name", MODULES)
def test_label_noise_touches_the_share_asked_for_and_says_which(name: str) -> None:
    clean, noisy = ready(name), ready(name, label_noise=0.2)
    told = noisy.describe_samples()
    wrong = noisy.splits["train"].labels != clean.splits["train"].labels
    assert wrong.sum() == 12
    assert wrong.tolist() == told["corrupted"]
    assert [a != b for a, b in zip(told["label"], told["true_label"], strict=True)] == told["corrupted"]
    assert np.array_equal(noisy.splits["train"].features, clean.splits["train"].features)
    for split in ("val", "test"):
        assert np.array_equal(noisy.splits[split].labels, clean.splits[split].labels)
    sided = ready(name, label_noise=0.2, class_dependent=True)
    changed = np.array(sided.describe_samples()["corrupted"])
    assert changed.sum() == 12
    assert set(sided.true_labels[changed]) == {0}


@real
@pytest.mark.parametrize("class_dependent", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_validation_labels_are_wrong_in_the_same_way_where_that_is_asked_for(name: str, class_dependent: bool) -> None:
    options = {"label_noise": 0.2, "class_dependent": class_dependent, "feature_noise": 0.1}
    usual, wrong = ready(name, **options), ready(name, **options, val_label_noise=True)
    for split in usual.splits:
        assert np.array_equal(wrong.splits[split].features, usual.splits[split].features)
    for split in ("train", "test"):
        assert np.array_equal(wrong.splits[split].labels, usual.splits[split].labels)
    assert wrong.describe_samples() == usual.describe_samples()
    before, after = usual.splits["val"].labels, wrong.splits["val"].labels
    changed = before != after
    assert changed.sum() == 8  # a fifth of the 40
    if class_dependent:
        assert set(before[changed]) == {0}
    assert np.array_equal(ready(name, **options, val_label_noise=True).splits["val"].labels, after)
    assert np.array_equal(ready(name, val_label_noise=True).splits["val"].labels, before)  # no noise: none to repeat


@pytest.mark.parametrize("n", [100, 600])
def test_class_dependent_noise_flips_the_share_of_all_labels(n: int) -> None:
    module = DigitsDataModule(n_train=n, n_val=n, label_noise=0.2, class_dependent=True, val_label_noise=True)
    module.setup()
    clean = DigitsDataModule(n_train=n, n_val=n, label_noise=0.0)
    clean.setup()
    for split in ("train", "val"):
        before, after = clean.splits[split].labels, module.splits[split].labels
        changed = before != after
        assert changed.sum() == round(0.2 * n)
        assert (before[changed] % 2 == 0).all()
        assert (after[changed] == before[changed] + 1).all()
    most = DigitsDataModule(n_train=n, n_val=n, label_noise=0.9, class_dependent=True)
    most.setup()
    assert most.corrupted.sum() == (most.true_labels % 2 == 0).sum()  # all there are


@real
@pytest.mark.parametrize("name", MODULES)
def test_feature_noise_touches_features_only(name: str) -> None:
    clean, noisy = ready(name), ready(name, feature_noise=0.25)
    changed = (noisy.splits["train"].features != clean.splits["train"].features).reshape(60, -1).any(1)
    told = np.array(noisy.describe_samples()["corrupted"])
    assert told.sum() == 15
    assert not changed[~told].any()
    assert changed[told].sum() >= 14  # a post of one word may be replaced by itself
    assert np.array_equal(noisy.splits["train"].labels, clean.splits["train"].labels)
    if name == "mnist":
        assert noisy.splits["train"].features.min() >= 0
        assert noisy.splits["train"].features.max() <= 1


@real
def test_features_are_what_they_say() -> None:
    adult = ready("adult")
    assert adult.n_features == 91
    one_hot = adult.splits["train"].features[:, 5:]
    assert set(np.unique(one_hot)) == {0, 1}
    assert (one_hot.sum(1) == 7).all()  # one answer, "?" included, to each of the seven questions
    posts = ready("newsgroups")
    np.testing.assert_allclose(np.linalg.norm(posts.splits["train"].features, axis=1), 1, rtol=1e-5)
    everything = MNISTDataModule(n_train=50, n_val=20, n_test=20)
    everything.setup()
    assert len(everything.class_names) == 10
    assert everything.describe_samples()["image"][0].startswith(b"\x89PNG")


def test_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(la.RequestError, match=r"label_noise=1\.5 is no share"):
        AdultDataModule(label_noise=1.5)
    with pytest.raises(la.RequestError, match="at least two digits"):
        MNISTDataModule(digits=[3])
    with pytest.raises(la.RequestError, match="batch_size=0 is too few"):
        NewsgroupsDataModule(batch_size=0)
    with pytest.raises(la.RequestError, match=r"cannot be loaded .*LIGHTNING_ACC_DATA"):
        AdultDataModule(path=str(tmp_path / "nothing")).setup()


@real
def test_more_samples_than_there_are() -> None:
    with pytest.raises(la.RequestError, match=r"n_train=20000 and n_val=200 ask for more than the \d+ samples there are"):
        MNISTDataModule(digits=[1, 7], n_train=20000).setup()
    with pytest.raises(la.RequestError, match="no newsgroup 'comp"):
        NewsgroupsDataModule(groups=("comp.sys.amiga", "comp.sys.mac.hardware")).setup()
