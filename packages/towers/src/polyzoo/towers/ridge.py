"""A linear map from image features to text vectors: what an image is called, by its features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class RidgeMap:
    """Ridge regression on standardised features, solved in closed form.

    Example:
        >>> ridge = RidgeMap.fit(train_features, text.encode(train_names), penalty=100.0)
        >>> scores = ridge.scores(test_features, text.encode(names))
    """

    def __init__(self, *, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.mean, self.scale = mean.double(), scale.double()
        self.weight, self.bias = weight.double(), bias.double()

    @classmethod
    def fit(cls, features: Tensor, targets: Tensor, *, penalty: float = 100.0) -> RidgeMap:
        """Fit `features -> targets`.

        Args:
            features: `(n, f)`.
            targets: `(n, d)`.
            penalty: Weight of the squared map, in units of rows: larger is smoother, above 0.

        Raises:
            ValueError: Shapes or the penalty break a rule.
        """
        if features.dim() != 2 or targets.dim() != 2 or len(features) != len(targets):
            raise ValueError(
                f"features are {tuple(features.shape)}, targets {tuple(targets.shape)}; they must "
                "be (n, f) and (n, d)"
            )
        if len(features) < 2:
            raise ValueError(f"{len(features)} rows of features: two are the least")
        if not penalty > 0:
            raise ValueError(f"penalty={penalty} must be above 0")
        x, y = features.double(), targets.double()
        mean, bias = x.mean(0), y.mean(0)
        scale = x.std(0).clamp(min=1e-6 * float(x.std()) + 1e-12)
        x, y = (x - mean) / scale, y - bias
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(x.T @ x + penalty * identity, x.T @ y)
        return cls(mean=mean, scale=scale, weight=weight, bias=bias)

    def __call__(self, features: Tensor) -> Tensor:
        """Return `(n, d)` float32 vectors of length 1."""
        return F.normalize(self._offsets(features) + self.bias, dim=1).float()

    def scores(self, features: Tensor, vectors: Tensor) -> Tensor:
        """Compare features with text vectors, both without what all training texts share.

        Leaving out the mean target tells texts of one kind ("a face with ...") better apart than
        the plain cosine.

        Args:
            features: `(n, f)`.
            vectors: `(m, d)`, such as the candidates' text vectors.

        Returns:
            Cosines `(n, m)`, float32.
        """
        centred = F.normalize(vectors.double() - self.bias, dim=1)
        return (F.normalize(self._offsets(features), dim=1) @ centred.T).float()

    def to(self, device: str | torch.device) -> RidgeMap:
        """Return the map on a device."""
        return RidgeMap(**{name: value.to(device) for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return what makes up the map, to be stored."""
        return {name: getattr(self, name) for name in ("mean", "scale", "weight", "bias")}

    def _offsets(self, features: Tensor) -> Tensor:
        return ((features.double() - self.mean) / self.scale) @ self.weight
