"""Models that draw noise in their training step, and what trains two networks against each other."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from wild import LeavesOut, Setup


def points(n: int = 14, seed: int = 0, batch_size: int = 5, shuffle: bool = True) -> DataLoader[Any]:
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x), batch_size, shuffle=shuffle)


class Generative(pl.LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch[0])
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch[0]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Vae(Generative):
    """Reparametrised noise; the squared error and the KL term, each a mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(6, 12), nn.SiLU(), nn.Linear(12, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 12), nn.SiLU(), nn.Linear(12, 6))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, log_var = self.encoder(x).chunk(2, dim=1)
        z = mu + torch.randn_like(mu) * torch.exp(0.5 * log_var)
        return self.decoder(z), mu, log_var

    def loss(self, x: Tensor) -> Tensor:
        x_hat, mu, log_var = self.parts(x)
        kl = torch.mean(-0.5 * torch.sum(1 + log_var - mu**2 - log_var.exp(), dim=1), dim=0)
        return F.mse_loss(x_hat, x) + 0.1 * kl


class VaeByHand(LeavesOut, Vae):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_hat, mu, log_var = self.parts(batch[0])
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
        return self.mean(((x_hat - batch[0]) ** 2).mean(1) + 0.1 * kl)


class SummedVae(Vae):
    """PyTorch's example: sums over the batch, over its size."""

    def loss(self, x: Tensor) -> Tensor:
        x_hat, mu, log_var = self.parts(x)
        mse = F.mse_loss(x_hat, x, reduction="sum")
        kl = -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp())
        return (mse + 0.1 * kl) / x.size(0)


class SummedVaeByHand(LeavesOut, SummedVae):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_hat, mu, log_var = self.parts(batch[0])
        kl = -0.5 * (1 + log_var - mu**2 - log_var.exp()).sum(1)
        return self.mean(((x_hat - batch[0]) ** 2).sum(1) + 0.1 * kl)


class Diffusion(Generative):
    """DDPM: a random time step and random noise for each sample."""

    STEPS = 20

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("alpha_bar", torch.cumprod(1 - torch.linspace(1e-3, 0.2, self.STEPS), 0))
        self.embed = nn.Embedding(self.STEPS, 6)
        self.net = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 6))

    def errors(self, x: Tensor) -> Tensor:
        t = torch.randint(0, self.STEPS, (x.shape[0],), device=self.device)
        noise = torch.randn_like(x)
        a = self.alpha_bar[t][:, None]
        noisy = a.sqrt() * x + (1 - a).sqrt() * noise
        return self.net(torch.cat([noisy, self.embed(t)], 1)) - noise

    def loss(self, x: Tensor) -> Tensor:
        return self.errors(x).pow(2).mean()


class DiffusionByHand(LeavesOut, Diffusion):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.errors(batch[0]).pow(2))


class FlowMatching(Generative):
    """Straight paths from noise to data; labels dropped at random, as for classifier-free guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))

    def errors(self, x1: Tensor) -> Tensor:
        x0, t = torch.randn_like(x1), torch.rand(len(x1), 1, device=x1.device, dtype=x1.dtype)
        x1 = torch.where(torch.rand(len(x1), 1, dtype=x1.dtype) < 0.1, torch.zeros_like(x1), x1)
        return self.net(torch.cat([(1 - t) * x0 + t * x1, t], 1)) - (x1 - x0)

    def loss(self, x: Tensor) -> Tensor:
        return F.mse_loss(self.errors(x), torch.zeros_like(x))


class FlowMatchingByHand(LeavesOut, FlowMatching):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.mean(self.errors(batch[0]) ** 2)


class Gan(pl.LightningModule):
    """Lightning's example: two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(3, 6), nn.Linear(6, 1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        (x,) = batch
        g, d = self.optimizers()
        fake = self.generator(torch.randn(len(x), 3))
        loss = F.softplus(-self.discriminator(fake)).mean()
        g.zero_grad(), self.manual_backward(loss), g.step()
        loss = F.softplus(-self.discriminator(x)).mean() + F.softplus(self.discriminator(fake.detach())).mean()
        d.zero_grad(), self.manual_backward(loss), d.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=2e-3) for part in (self.generator, self.discriminator)]


class Vq(Generative):
    """Vector quantisation: nearest codes by arg min, straight-through gradient, commitment loss."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes, self.decoder = nn.Linear(6, 4), nn.Embedding(8, 4), nn.Linear(4, 6)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x)
        nearest = self.codes(torch.cdist(z, self.codes.weight).argmin(1))
        return z, nearest, self.decoder(z + (nearest - z).detach())

    def loss(self, x: Tensor) -> Tensor:
        z, nearest, x_hat = self.parts(x)
        return F.mse_loss(x_hat, x) + F.mse_loss(nearest, z.detach()) + 0.25 * F.mse_loss(z, nearest.detach())


class VqByHand(LeavesOut, Vq):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z, nearest, x_hat = self.parts(batch[0])
        codes = (nearest - z.detach()).pow(2).mean(1) + 0.25 * (z - nearest.detach()).pow(2).mean(1)
        return self.mean((x_hat - batch[0]).pow(2).mean(1) + codes)


NOISY: dict[str, Any] = {"validation": lambda: points(8, 1, 8, shuffle=False), "scores": False}

SETUPS: dict[str, Setup] = {
    "VAE": Setup("reparametrisation noise, a KL term", Vae, points, VaeByHand, **NOISY),
    "VAE, sums over the batch's size": Setup("`sum() / x.size(0)`, two terms", SummedVae, points, SummedVaeByHand, **NOISY),
    "VQ-VAE": Setup("nearest codes, straight-through gradient, three terms", Vq, points, VqByHand, NOISY["validation"]),
    "DDPM": Setup("random time steps and noise for each sample, dropout", Diffusion, points, DiffusionByHand, **NOISY),
    "flow matching": Setup(
        "noise, times and dropped conditions drawn for each sample", FlowMatching, points, FlowMatchingByHand, **NOISY
    ),
    "GAN": Setup("manual optimisation, two optimizers", Gan, points, refused="automatic_optimization=False.*use automatic"),
}
