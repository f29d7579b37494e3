"""The studies' LightningDataModules, over Hugging Face ``datasets``: digits, Adult, 20 Newsgroups, MNIST."""

from lightning_acc.data.adult import AdultDataModule
from lightning_acc.data.digits import DigitsDataModule
from lightning_acc.data.mnist import MNISTDataModule
from lightning_acc.data.newsgroups import NewsgroupsDataModule

__all__ = ["AdultDataModule", "DigitsDataModule", "MNISTDataModule", "NewsgroupsDataModule"]
