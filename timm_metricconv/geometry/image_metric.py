"""A metric without training: unit balls that lie along the edges of an image."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .metrics import Metric


def image_metric(
    image: Tensor,
    *,
    scale: float = 0.1,
    anisotropy: float = 10.0,
    tau: float = 0.0,
    along: str = "gradient",
    eps: float = 1e-6,
) -> Metric:
    """The metric whose balls are long along edges and thin across them: M = R diag(λ) Rᵀ with R = (v̂, v̂⊥).

    v̂ is the direction of Sobel's gradient + eps and v̂⊥ = (−v̂_y, v̂_x). With g = ‖∇‖ / max‖∇‖ over each image,
    λ = scale·(1 + anisotropy·g, 1 / (1 + anisotropy·g)): a disk of radius 1/√scale pixels where the image is flat, and
    axes in the ratio 1 + anisotropy at its strongest edge. The whitened drift is v = τ·g·e, with e the direction of the
    gradient or of the edge, so that ‖ω‖_{M⁻¹} = |τ|·g; the ball leans against it.

    Args:
        image: `[B, C, H, W]`; of several channels the mean counts.
        scale: Eigenvalue of M where the image is flat, in 1 / pixel².
        anisotropy: Strength of the stretch along edges; 0 for none.
        tau: τ, the strength of the drift, |τ| < 1.
        along: Where ω points: "gradient" (towards the brighter side) or "edge" (that direction turned from x to y).
        eps: Keeps the direction defined where the image is flat.

    Returns:
        The metric in whitened form, components `[B, H, W]`, float32 at least; `.tensors()` gives M and ω.

    Raises:
        ValueError: An argument is out of its range.

    Source: Dagès, Lindenbaum, Bruckstein, Metric Convolutions (ICCV 2025), the heuristic metric for denoising.
    """
    if image.dim() != 4:
        raise ValueError(f"image: expected [B, C, H, W], got {tuple(image.shape)}.")
    if scale <= 0 or anisotropy < 0 or not -1 < tau < 1:
        raise ValueError(
            f"scale={scale}, anisotropy={anisotropy}, tau={tau}: expected scale > 0, anisotropy ≥ 0 and |tau| < 1."
        )
    if along not in ("gradient", "edge"):
        raise ValueError(f"along={along!r}: expected 'gradient' or 'edge'.")
    grey = image.to(torch.promote_types(image.dtype, torch.float32)).mean(1, keepdim=True)
    derivative = grey.new_tensor([1.0, 2.0, 1.0])[:, None] * grey.new_tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack((derivative, derivative.mT))[:, None]
    gradient = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    strength = torch.linalg.vector_norm(gradient, dim=1)
    # a gradient that small is the rounding of an image that is flat
    least = 1e-4 * grey.abs().amax((2, 3))[..., None]
    g = strength / torch.maximum(strength.amax((1, 2), keepdim=True), least).clamp(min=1e-12)
    x, y = F.normalize(gradient + eps, dim=1, eps=1e-12).unbind(1)
    across = (scale * (1 + anisotropy * g)).sqrt()
    tangent = scale / across
    a, b, d = across * x * x + tangent * y * y, (across - tangent) * x * y, across * y * y + tangent * x * x
    lean = tau * g
    return Metric(a, b, d, *((lean * x, lean * y) if along == "gradient" else (-lean * y, lean * x)))
