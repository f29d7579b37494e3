"""The studies' LightningDataModules, over Hugging Face ``datasets``: digits, Adult, 20 Newsgroups, MNIST."""

from lightning_acc.studies.data.adult import AdultDataModule
from lightning_acc.studies.data.digits import DigitsDataModule
from lightning_acc.studies.data.mnist import MNISTDataModule
from lightning_acc.studies.data.newsgroups import NewsgroupsDataModule

__all__ = ["AdultDataModule", "DigitsDataModule", "MNISTDataModule", "NewsgroupsDataModule"]
