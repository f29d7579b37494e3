"""Everything a user's LightningModule or data module may define for lightning_acc, on one page. All of it is optional.

A LightningModule whose loss is a mean or a sum over samples needs none of it. What it defines makes scoring faster, or tells
what cannot be seen from outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import pyarrow
    from torch import Tensor


@runtime_checkable
class HasPerSampleLoss(Protocol):
    """A LightningModule that gives its losses sample by sample.

    Without it the reductions of ``training_step`` are observed (torch's losses, ``mean``, ``sum``, a masked sum divided by the
    mask's); where these do not show what each sample contributes, it is called on batches of one sample, which is slower.
    Either way the decomposition is compared with the training's own gradient in the first steps.
    """

    def per_sample_loss(self, batch: Any) -> Tensor | tuple[Tensor, Tensor]:
        """The losses of the samples, (B,), whose mean (or sum) ``training_step`` returns for the same batch.

        Or a pair ``(losses, weights)``, (B,) each, whose weighted mean that is: tokens, masks, class weights. The weights count
        as constants of the batch. Where the training's own reductions do not show them too, recording them takes one more
        forward pass a step, without gradient.
        """


@runtime_checkable
class HasPerSampleAccuracy(Protocol):
    """A LightningModule that says what it gets right, where that is not the arg max of ``module(inputs)``.

    ``clean`` tells gains in accuracy with it; without it, and where there are no logits to read, gains in loss.
    """

    def per_sample_accuracy(self, batch: Any) -> Tensor:
        """Whether each sample is right: 0 and 1, or a share between them, shape (B,), of the dtype of the logits."""


@runtime_checkable
class HasHyperParameters(Protocol):
    """A LightningModule that a later process can build anew: it called ``self.save_hyperparameters()`` in its ``__init__``.

    Otherwise it is given back by hand, as ``la.Run(path, module=...)``.
    """

    @property
    def hparams(self) -> Any:
        """The arguments of ``__init__`` by name; those that JSON can hold are kept."""


@runtime_checkable
class DescribesSamples(Protocol):
    """A LightningDataModule that tells people what its training samples are."""

    def describe_samples(self) -> dict[str, Any] | pyarrow.Table:
        """Columns with a value for each training sample, in the order of the data set.

        ``image`` (a PNG file as bytes), ``text``, ``label``, ``true_label`` and ``corrupted`` (bool) are shown on the page
        and in W&B. By every column the page's ranking is sorted and filtered, and all but pictures and texts are in the CSV
        file. Each column makes groups: ``--removals group:COLUMN``. Where the batches name their samples
        (``TrajectoryRecorder(..., sample_id=...)``), a column ``id`` says which sample a row is about.
        """


@runtime_checkable
class DescribesExamples(Protocol):
    """A LightningDataModule that tells people what the examples of its validation data are."""

    def describe_examples(self, query: str) -> dict[str, Any] | pyarrow.Table | None:
        """Columns as those of ``describe_samples``, with a value for each example, in the order of the query's data.

        ``query`` is ``val``, of further validation loaders ``val-1``, ``val-2`` and so on; None where nothing is known of it.
        What is described is shown beside the samples that made the prediction what it is.
        """
