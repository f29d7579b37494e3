"""20 Newsgroups: which group was a post sent to?"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from lightning_acc.errors import RequestError
from lightning_acc.extras import extra
from lightning_acc.studies.data.base import Samples, StudyDataModule, load

NAME = "SetFit/20_newsgroups"
HARDWARE = ("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware")


class NewsgroupsDataModule(StudyDataModule):
    """Posts as TF-IDF weights of the most frequent words, without stop words; posts without any of these are left out.

    Words and weights are those of the chosen groups' whole training split, so that they do not depend on single samples.
    Where the groups have fewer words than ``n_features``, the last features are 0. Feature noise replaces half of a post's
    words by random ones.

    Args:
        path: a name on the Hub or a local folder of its layout; None: ``SetFit/20_newsgroups``, from $LIGHTNING_ACC_DATA
            where that is set.
        groups: names of the groups to tell apart; by default the two on hardware.
        n_features: number of words.
        n_train, n_val, n_test, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise: see
            ``StudyDataModule``.
    """

    def __init__(
        self,
        path: str | None = None,
        groups: tuple[str, ...] = HARDWARE,
        n_features: int = 2000,
        n_train: int | None = 200,
        n_val: int = 200,
        n_test: int | None = None,
        batch_size: int = 100,
        label_noise: float = 0.0,
        class_dependent: bool = False,
        feature_noise: float = 0.0,
        seed: int = 0,
        val_label_noise: bool = False,
    ) -> None:
        super().__init__(n_train, n_val, n_test, batch_size, label_noise, class_dependent, feature_noise, seed, val_label_noise)
        if len(set(groups)) < 2:
            raise RequestError(f"groups={list(groups)} leaves nothing to tell apart: name at least two newsgroups.")
        self.path, self.words = path, n_features
        self.class_names = list(groups)
        self.save_hyperparameters()
        self._posts: dict[str, tuple[list[str], np.ndarray]] = {}

    def _load(self, split: str) -> tuple[list[str], np.ndarray]:
        """Texts and class numbers of the chosen groups' posts."""
        if split not in self._posts:
            rows = load(NAME, self.path, split).to_pandas()
            unknown = set(self.class_names) - set(rows["label_text"])
            if unknown:
                there = ", ".join(sorted(set(rows["label_text"])))
                raise RequestError(f"There is no newsgroup {sorted(unknown)[0]!r} in the data; there are {there}.")
            rows = rows[rows["label_text"].isin(self.class_names)]
            labels = np.array([self.class_names.index(name) for name in rows["label_text"]], dtype=np.int64)
            self._posts[split] = rows["text"].tolist(), labels
        return self._posts[split]

    def _vectorizer(self) -> Any:
        if not hasattr(self, "_fitted"):
            with extra():
                from sklearn.feature_extraction.text import TfidfVectorizer
            vectorizer = TfidfVectorizer(stop_words="english", max_features=self.words, token_pattern=r"(?u)\b[a-zA-Z]{2,}\b")
            self._fitted = vectorizer.fit(self._load("train")[0])
        return self._fitted

    def candidates(self, split: str) -> np.ndarray:
        """The posts with at least one word that counts."""
        found: np.ndarray = np.flatnonzero(np.diff(self._vectorizer().transform(self._load(split)[0]).indptr))
        return found

    def take(self, split: str, indices: np.ndarray, noisy: np.ndarray, random: np.random.Generator) -> Samples:
        """The posts at ``indices``."""
        texts, labels = self._load(split)
        vectorizer = self._vectorizer()
        words = vectorizer.get_feature_names_out()
        chosen = [texts[i] for i in indices]
        for i in np.flatnonzero(noisy):
            chosen[i] = _scrambled(chosen[i], words, random)
        features = np.zeros((len(indices), self.words), np.float32)
        features[:, : len(words)] = vectorizer.transform(chosen).toarray()
        return Samples(features, labels[indices], {"text": chosen})


def _scrambled(text: str, words: np.ndarray, random: np.random.Generator) -> str:
    """The text with half of its words replaced by random ones."""
    pieces = re.split(r"(\W+)", text)
    places = [i for i, piece in enumerate(pieces) if piece.isalpha()]
    for i in random.choice(places, (len(places) + 1) // 2, replace=False) if places else ():
        pieces[i] = str(random.choice(words))
    return "".join(pieces)
