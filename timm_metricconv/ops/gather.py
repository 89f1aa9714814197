"""The fast CPU backend: gather with `embedding_bag`, then a matrix product, slab by slab.

A bag is the four corners of one sample, the table is the channels-last image and the per-sample weights are the
bilinear weights. A slab of columns fits the cache: it is made, multiplied and forgotten, and the backward pass makes it
again. The image's gradient is the same gather transposed: the samples are sorted by their corner, a bag is then all the
samples that read one pixel. So nothing is scattered, the result is deterministic, and every pass uses all threads.
"""

from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import register_flops
from .reference import first_centre

# Fits a core's share of the last-level cache, and stays under malloc's threshold for fresh (slow) pages.
SLAB_BYTES = 4 * 2**20


class _Axis(NamedTuple):
    """Linear interpolation along an axis, for M samples."""

    near: Tensor  # [M] int32, the corner before the sample, clamped so that the next is in the image as well
    distance: Tensor  # [M] from the near corner
    shares: Tuple[Tensor, Tensor]  # [M] weights of the near and the far corner


class _Plan(NamedTuple):
    """Where the M = B·H_out·W_out·K samples read a padded image table of `size` rows and columns."""

    table: Tensor  # [B·height·width, C]
    size: Tuple[int, int]
    corners: Tensor  # [M, 4] int32 rows of the table: the corners (0, 0), (0, 1), (1, 0), (1, 1) as (down, right)
    shares: Tensor  # [M, 4] bilinear weights, without the mask
    x: _Axis
    y: _Axis


def _axis(offsets: Tensor, start: float, stride: int, dim: int, size: int) -> _Axis:
    """Interpolation of one coordinate: `offsets` `[B, H_out, W_out, K]`, centres `start + stride·i` along `dim`."""
    shape = [1, 1, 1, 1]
    shape[dim] = offsets.shape[dim]
    centres = torch.arange(offsets.shape[dim], dtype=offsets.dtype).mul_(stride).add_(start)
    coordinate = (offsets + centres.view(shape)).reshape(-1)
    # Truncation is floor above zero, and integers are clamped, so NaN cannot become a wild index. The near corner stays
    # in the image and the hat function does the rest: a sample that is a pixel or more outside weighs nothing.
    near = coordinate.to(torch.int32).clamp_(0, size - 2)
    distance = coordinate.sub_(near)
    return _Axis(near, distance, (_hat(distance.abs()), _hat((distance - 1).abs_())))


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 − distance), in place."""
    return distance.neg_().add_(1).clamp_(min=0)


def _plan(
    x: Tensor, positions: Tensor, weight: Tensor, stride: List[int], padding: List[int], dilation: List[int]
) -> _Plan:
    # One row and column of zeros for one-pixel images: the far corner then always exists.
    if x.shape[2] < 2 or x.shape[3] < 2:
        x = F.pad(x, (0, int(x.shape[3] < 2), 0, int(x.shape[2] < 2)))
    batch, channels, height, width = x.shape
    offsets = positions.permute(2, 0, 3, 4, 1)
    top, left = first_centre(weight, padding, dilation)
    y = _axis(offsets[1], top, stride[0], 1, height)
    x_ = _axis(offsets[0], left, stride[1], 2, width)
    # flat vectors and strided stores: a trailing dimension of 2 or 4 would cost a loop call for each sample
    shares = x_.distance.new_empty(len(x_.distance), 4)
    corners = y.near.new_empty(len(y.near), 4)
    base = torch.add(x_.near, y.near, alpha=width).view(batch, offsets[0, :1].numel())
    base += torch.arange(0, batch * height * width, height * width, dtype=torch.int32)[:, None]
    for corner, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        torch.mul(y.shares[down], x_.shares[right], out=shares[:, corner])
        torch.add(base.view(-1), down * width + right, out=corners[:, corner])
    table = x.permute(0, 2, 3, 1).reshape(-1, channels)
    return _Plan(table, (height, width), corners, shares, x_, y)


def _matmul(columns: Tensor, kernel: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """`[n, p] @ [q, p]ᵀ + bias` with oneDNN, as Inductor does: faster than the BLAS behind `linear`."""
    if columns.dtype == torch.float32 and torch.backends.mkldnn.is_available() and columns.numel():
        return torch.ops.mkldnn._linear_pointwise(columns, kernel, bias, "none", [], "")
    return F.linear(columns, kernel, bias)


def _columns(plan: _Plan, shares: Tensor, rows: slice, taps: int) -> Tensor:
    """`[n, K·C]` columns of the output pixels `rows`, taps slow and channels fast."""
    samples = slice(rows.start * taps, rows.stop * taps)
    gathered = F.embedding_bag(plan.corners[samples], plan.table, per_sample_weights=shares[samples], mode="sum")
    return gathered.view(rows.stop - rows.start, -1)


def _slabs(pixels: int, row_bytes: int, step: int = 1, limit: int = SLAB_BYTES) -> List[slice]:
    """Slices of whole multiples of `step` output pixels whose columns take about `limit` bytes."""
    count = max(1, limit // max(1, row_bytes * step)) * step
    return [slice(i, min(i + count, pixels)) for i in range(0, pixels, count)]


def _masked(shares: Tensor, mask: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    if mask is not None:
        shares = shares * mask.permute(0, 2, 3, 1).reshape(-1, 1)
    return shares.to(dtype)


def _grouped(columns: Tensor, taps: Tensor, groups: int) -> Tensor:
    """`[n, K·C]` → `[groups, n, K·C/groups]`."""
    return columns.view(columns.shape[0], taps.shape[2], groups, -1).permute(2, 0, 1, 3).flatten(2)


@torch.library.custom_op("timm_metricconv::gather_conv2d", mutates_args=(), device_types="cpu")
def gather_conv2d(
    x: Tensor,
    positions: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    dilation: List[int],
    groups: int,
) -> Tensor:
    """`ball_conv2d_reference`, fast on CPUs."""
    batch, _, _, out_height, out_width = positions.shape
    taps = weight.flatten(2)
    out_channels, _, count = taps.shape
    plan = _plan(x, positions, weight, stride, padding, dilation)
    shares = _masked(plan.shares, mask, x.dtype)
    out = x.new_empty(batch * out_height * out_width, out_channels)
    # taps slow, channels fast, as the columns
    kernel = taps.transpose(1, 2).reshape(groups, out_channels // groups, -1)
    for rows in _slabs(len(out), count * x.shape[1] * x.element_size()):
        columns = _columns(plan, shares, rows, count)
        if groups == 1:
            out[rows] = _matmul(columns, kernel[0], bias)
        else:
            product = torch.bmm(_grouped(columns, taps, groups), kernel.transpose(1, 2)).transpose(0, 1).flatten(1)
            out[rows] = product if bias is None else product + bias
    return out.view(batch, out_height, out_width, out_channels).permute(0, 3, 1, 2)


@gather_conv2d.register_fake
def _(x, positions, weight, bias, mask, stride, padding, dilation, groups):
    shape = (positions.shape[0], weight.shape[0], positions.shape[3], positions.shape[4])
    return x.new_empty(shape).to(memory_format=torch.channels_last)


@torch.library.custom_op("timm_metricconv::gather_conv2d_backward", mutates_args=(), device_types="cpu")
def gather_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    weight: Tensor,
    mask: Optional[Tensor],
    stride: List[int],
    padding: List[int],
    dilation: List[int],
    groups: int,
    need_x: bool,
    need_points: bool,
    need_weight: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, positions, weight and mask; an empty tensor for what is not needed."""
    batch, _, _, out_height, out_width = positions.shape
    taps = weight.flatten(2)
    out_channels, group_channels, count = taps.shape
    pixels, channels = out_height * out_width, x.shape[1]
    plan = _plan(x, positions, weight, stride, padding, dilation)
    shares = _masked(plan.shares, mask, x.dtype)
    grad = grad.permute(0, 2, 3, 1).reshape(-1, out_channels)
    kernel = taps.transpose(1, 2).reshape(groups, out_channels // groups, -1)
    rows_per_image = plan.size[0] * plan.size[1]
    grad_table = torch.zeros_like(plan.table) if need_x else x.new_empty(0)
    grad_kernel = torch.zeros(kernel.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    grad_shares = shares.new_empty(shares.shape if need_points else 0)

    # Whole images, so that a slab's samples read (and their gradients return to) that slab's part of the table alone.
    for rows in _slabs(len(grad), count * channels * x.element_size(), step=max(pixels, 1)):
        upstream = grad[rows]
        if need_weight:
            columns = _columns(plan, shares, rows, count)
            if groups == 1:
                grad_kernel[0] += upstream.t() @ columns
            else:
                grouped = upstream.view(len(upstream), groups, -1).permute(1, 2, 0)
                grad_kernel += torch.bmm(grouped, _grouped(columns, taps, groups))
        if not (need_x or need_points):
            continue
        if groups == 1:
            grad_columns = _matmul(upstream, kernel[0].t())
        else:
            grouped = torch.bmm(upstream.view(len(upstream), groups, -1).transpose(0, 1), kernel)
            grad_columns = grouped.view(groups, -1, count, group_channels).permute(1, 2, 0, 3)
        grad_samples = grad_columns.reshape(-1, channels)
        samples = slice(rows.start * count, rows.stop * count)
        if need_points:
            grad_shares[samples] = _corner_products(grad_samples, plan.table, plan.corners[samples])
        if need_x:
            table = slice(rows.start // pixels * rows_per_image, rows.stop // pixels * rows_per_image)
            base = plan.corners[samples, 0] - table.start
            _scatter(grad_table[table], grad_samples, base, shares[samples], plan.size[1])

    grad_x = x.new_empty(0)
    if need_x:
        grad_x = grad_table.view(batch, *plan.size, channels)[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)
        grad_x = grad_x.contiguous(memory_format=torch.channels_last) if grad_x.numel() else torch.zeros_like(x)
    grad_positions, grad_mask = positions.new_empty(0), x.new_empty(0)
    if need_points:
        grad_shares = grad_shares.to(plan.shares.dtype)
        if mask is not None:
            grad_mask = (grad_shares * plan.shares).sum(1).view(batch, out_height, out_width, count)
            grad_mask = grad_mask.permute(0, 3, 1, 2).to(mask.dtype)
            grad_shares = grad_shares * mask.permute(0, 2, 3, 1).reshape(-1, 1)
        grad_positions = _grad_points(grad_shares, plan)
        grad_positions = grad_positions.view(2, batch, out_height, out_width, count).permute(1, 4, 0, 2, 3)
    grad_weight = x.new_empty(0)
    if need_weight:
        grad_weight = grad_kernel.view(out_channels, count, group_channels).transpose(1, 2)
        grad_weight = grad_weight.reshape(weight.shape).to(weight.dtype).contiguous()
    return grad_x, grad_positions, grad_weight, grad_mask


def _corner_products(grad_samples: Tensor, table: Tensor, index: Tensor) -> Tensor:
    """⟨gradient of a sample, pixel⟩ for its four corners, `[M, 4]`: the gradient of the bilinear weights."""
    bags = torch.arange(len(index), dtype=index.dtype)
    offsets, bag_of = bags * 4, bags.repeat_interleave(4)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        grad_samples, table, index.flatten(), offsets, bag_of, 0, -1
    )
    return products.view(-1, 4)


def _scatter(out: Tensor, grad_samples: Tensor, base: Tensor, shares: Tensor, width: int) -> None:
    """Adds every sample's gradient to its four corners in `out` `[rows, C]`, as four gathers over sorted samples."""
    ordered, order = torch.sort(base, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(len(out), dtype=ordered.dtype), out_int32=True)
    shares = shares[order].t().contiguous()
    order = order.to(torch.int32)
    for corner, shift in enumerate((0, 1, width, width + 1)):
        bags = F.embedding_bag(order, grad_samples, offsets, per_sample_weights=shares[corner], mode="sum")
        out[shift:] += bags[: len(out) - shift]


def _slope(distance: Tensor, corner: int) -> Tensor:
    """Derivative of a corner's hat, from the right as torchvision's: a sample on a pixel sees its right neighbour.

    `distance` is from the near corner, 0; the far one is 1. (`distance - 1` would round −1e-9 onto a pixel.)
    """
    rising, falling = (distance >= corner - 1).to(distance.dtype), (distance >= corner).to(distance.dtype)
    return rising.sub_(falling, alpha=2).add_(distance >= corner + 1)


def _grad_points(grad_shares: Tensor, plan: _Plan) -> Tensor:
    """Gradient of the shares `[M, 4]` → of the coordinates `[2, M]` as (x, y)."""
    g00, g01, g10, g11 = grad_shares.t().contiguous()
    (left, right), (top, bottom) = plan.x.shares, plan.y.shares
    grad_x = (g00 * top).addcmul_(g10, bottom).mul_(_slope(plan.x.distance, 0))
    grad_x += (g01 * top).addcmul_(g11, bottom).mul_(_slope(plan.x.distance, 1))
    grad_y = (g00 * left).addcmul_(g01, right).mul_(_slope(plan.y.distance, 0))
    grad_y += (g10 * left).addcmul_(g11, right).mul_(_slope(plan.y.distance, 1))
    return torch.stack((grad_x, grad_y))


@gather_conv2d_backward.register_fake
def _(grad, x, positions, weight, mask, stride, padding, dilation, groups, need_x, need_points, need_weight):
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0),
        torch.empty_like(positions.permute(2, 0, 3, 4, 1).contiguous()).permute(1, 4, 0, 2, 3)
        if need_points
        else positions.new_empty(0),
        weight.new_empty(weight.shape) if need_weight else x.new_empty(0),
        torch.empty_like(mask.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
        if need_points and mask is not None
        else x.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    x, positions, weight, _, mask, *ctx.arguments = inputs
    ctx.save_for_backward(x, positions, weight, mask)


def _backward(ctx, grad):
    x, positions, weight, mask = ctx.saved_tensors
    need_x, need_positions, need_weight, need_bias, need_mask = ctx.needs_input_grad[:5]
    grad_x, grad_positions, grad_weight, grad_mask = gather_conv2d_backward(
        grad, x, positions, weight, mask, *ctx.arguments, need_x, need_positions or need_mask, need_weight
    )
    return (
        grad_x if need_x else None,
        grad_positions if need_positions else None,
        grad_weight if need_weight else None,
        grad.sum((0, 2, 3)) if need_bias else None,
        grad_mask if need_mask else None,
        None,
        None,
        None,
        None,
    )


gather_conv2d.register_autograd(_backward, setup_context=_setup_context)
register_flops(torch.ops.timm_metricconv.gather_conv2d, torch.ops.timm_metricconv.gather_conv2d_backward)
