# SPDX-License-Identifier: Apache-2.0
"""Supervised losses of the keypoint network. Each is a pure function that returns a *sum*; the caller divides by counts
taken over the global batch, so that several processes give the loss of one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def focal_loss(logit: Tensor, state: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Return the summed sigmoid focal loss (Lin et al., ICCV 2017, eq. 5).

    `logit` [B,N,C]; `state` [B,N,C] with 1 positive, 0 background, -1 ignored. FL = -α_t (1 - p_t)^γ log p_t.
    """
    positive = (state == 1).to(logit.dtype)
    probability = torch.sigmoid(logit)
    p_t = probability * positive + (1 - probability) * (1 - positive)
    alpha_t = alpha * positive + (1 - alpha) * (1 - positive)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logit, positive, reduction="none")
    counted = (state >= 0).to(logit.dtype)
    return (alpha_t * (1 - p_t) ** gamma * entropy * counted).sum()


def ray_loss(xy: Tensor, points_camera: Tensor, ray_matrix: Tensor, diameter: Tensor, knee: float = 0.02) -> Tensor:
    """Return the summed 3D ray loss: SmoothL1 of the distance from each true 3D keypoint to its predicted viewing ray.

    `xy` [P,K,2] predicted keypoints in window px; `points_camera` [P,K,3] true keypoints in the optical frame, m;
    `ray_matrix` [P,3,3] window px → ray; `diameter` [P] m. The distance d is divided by the diameter; below `knee` (a
    fraction of the diameter) the loss is quadratic (0.5 d²/knee), above it linear (d - knee/2).
    After WDRNet (arXiv 2104.00633, eq. 4).
    """
    homogeneous = torch.cat((xy, torch.ones_like(xy[..., :1])), -1)
    ray = torch.nn.functional.normalize(homogeneous @ ray_matrix.transpose(1, 2), dim=-1)
    along = (points_camera * ray).sum(-1, keepdim=True)
    # squared first: the norm has no gradient at zero
    squared = ((points_camera - along * ray) ** 2).sum(-1) / diameter[:, None] ** 2
    distance = torch.sqrt(squared + 1e-12)
    return torch.where(distance < knee, 0.5 * squared / knee, distance - 0.5 * knee).sum()


def pose_loss(
    xy: Tensor, target: Tensor, points_camera: Tensor, ray_matrix: Tensor, diameter: Tensor, reach: float = 0.1
) -> Tensor:
    """Return the summed cost of how far the pose that these keypoints ask for is from the true one.

    `xy`, `target` [P,K,2] predicted and true keypoints in window px; the rest as in `ray_loss`. The pose is that of one
    Gauss-Newton step from the truth, δ = (JᵀJ)⁻¹ Jᵀ (xy - target), J [2K,6] the derivative of the projection; its
    distance is the root mean square of the keypoints' displacements by δ over the diameter, what ADD measures. A
    common error of scale, 2 % of an object's size, is 2 % of its *distance*: `ray_loss` hardly sees it. A distance d
    costs ½ r log(1 + d²/r²): steepest at `reach` r, what is called a right pose, and flat for what is hopeless.
    The step is that of EPro-PnP's derivative regularisation (Chen et al., CVPR 2022, section 3.3).
    """
    # in diameters from the points' centre, in float64: depth is worth a hundredth of the rest
    points, size = points_camera.double(), diameter.double()[:, None, None]
    moved = (points - points.mean(1, keepdim=True)) / size
    zero = torch.zeros_like(moved[..., 0])
    x, y, z = moved.unbind(-1)
    turned = torch.stack((zero, z, -y, -z, zero, x, y, -x, zero), -1).reshape(*zero.shape, 3, 3)  # -[p]×
    shifted = torch.eye(3, dtype=points.dtype, device=points.device).expand_as(turned)
    step = torch.cat((shifted, turned), -1)  # [P,K,3,6]: displacement in diameters by (dt, dθ)
    project = torch.linalg.inv(ray_matrix.double())[:, None]
    h = (project @ points[..., None])[..., 0]
    at = h[..., :2] / h[..., 2:]
    slope = (project[..., :2, :] - at[..., None] * project[..., 2:, :]) / h[..., 2:, None]
    J = ((slope * size[..., None]) @ step).flatten(1, 2)
    normal = J.transpose(-1, -2) @ J
    least = 1e-9 * normal.diagonal(dim1=-2, dim2=-1).mean(-1)  # points that hardly fix a pose make no infinite gradient
    normal = normal + least[:, None, None] * torch.eye(6, dtype=J.dtype, device=J.device)
    delta = torch.linalg.solve(normal, J.transpose(-1, -2) @ (xy - target).double().flatten(1)[..., None])
    displaced = step @ delta[:, None]
    squared = displaced.square().sum((-3, -2, -1)).to(xy.dtype) / points.shape[1]
    return (0.5 * reach * torch.log1p(squared / reach**2)).sum()


def gaussian_nll(error: Tensor, scale: Tensor, beta: float = 0.0) -> Tensor:
    """Return the summed negative log-likelihood of 2D errors under the votes' own Gaussians, without the constant.

    `error` [P,K,2] px (detach it to leave the mean alone); `scale` [P,K,3] = (σ_u, σ_v px, ρ).
    NLL = log σ_u + log σ_v + ½ log(1-ρ²) + ½ (a² - 2ρab + b²)/(1-ρ²), a = e_u/σ_u, b = e_v/σ_v.
    `beta` > 0 weights each term by the detached (σ_u σ_v)^β (β-NLL, Seitzer et al., ICLR 2022), so that a large scale
    does not starve the mean.
    """
    sigma_u, sigma_v, rho = scale.unbind(-1)
    a, b = error[..., 0] / sigma_u, error[..., 1] / sigma_v
    rest = 1 - rho**2
    nll = torch.log(sigma_u) + torch.log(sigma_v) + 0.5 * torch.log(rest) + 0.5 * (a**2 - 2 * rho * a * b + b**2) / rest
    if beta > 0:
        nll = nll * (sigma_u * sigma_v).detach() ** beta
    return nll.sum()
