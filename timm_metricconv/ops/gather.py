"""The fast CPU backend: gather with `embedding_bag`, then a matrix product, slab by slab.

A bag is the four corners of one sample, the table is the channels-last image and the per-sample weights are the
bilinear weights. A slab of columns fits the cache: it is made, multiplied and forgotten, and the backward pass makes it
again. The image's gradient is the same gather transposed: the samples are sorted by their corner, a bag is then all the
samples that read one pixel. So nothing is scattered, the result is deterministic, and every pass uses all threads.

Temporary memory stays below some ten MiB whatever the batch: beyond that the allocator hands pages back to the system
after every call, and faulting them in again can cost more than the arithmetic.
"""

import warnings
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .flops import register_flops
from .reference import first_centre

# Columns in memory at a time: they fit a core's share of the last-level cache.
SLAB_BYTES = 3 * 2**20
# Samples planned at a time: enough for torch to use several threads, in elementwise passes (2**16) and to sort (2**15).
PLAN_SAMPLES = 2**17


class _Lattice(NamedTuple):
    """Where the samples of all output lines read: L = B·H_out lines of W_out pixels of K samples."""

    table: Tensor  # [B·height·width, C], the channels-last image
    size: Tuple[int, int]  # (height, width), two at least
    offsets: Tensor  # [2, L, W_out, K] positions as (x, y)
    rows: Tensor  # [L, 1, 1] the lines' centre in the image
    columns: Tensor  # [W_out, 1] the pixels' centre in the image
    first: Tensor  # [L, 1] int32, the row of the table where the line's image begins


class _Axis(NamedTuple):
    """Linear interpolation along an axis, for M samples."""

    near: Tensor  # [M] int32, the corner before the sample, clamped so that the next is in the image as well
    distance: Tensor  # [M] from the near corner
    shares: Tuple[Tensor, Tensor]  # [M] weights of the near and the far corner


class _Plan(NamedTuple):
    """How M samples, those of some output lines, read the table."""

    corners: Tensor  # [M, 4] int32 rows of the table: the corners (0, 0), (0, 1), (1, 0), (1, 1) as (down, right)
    weights: Tensor  # [M, 4] bilinear weights times the mask, in the image's dtype
    shares: Tensor  # [M, 4] bilinear weights
    mask: Optional[Tensor]  # [M, 1]
    x: _Axis
    y: _Axis


def _lattice(
    x: Tensor, positions: Tensor, weight: Tensor, stride: List[int], padding: List[int], dilation: List[int]
) -> _Lattice:
    # One row and column of zeros for one-pixel images: the far corner then always exists.
    if x.shape[2] < 2 or x.shape[3] < 2:
        x = F.pad(x, (0, int(x.shape[3] < 2), 0, int(x.shape[2] < 2)))
    batch, channels, height, width = x.shape
    out_height, out_width = positions.shape[3:]
    top, left = first_centre(weight, padding, dilation)
    rows = torch.arange(out_height, dtype=positions.dtype).mul_(stride[0]).add_(top)
    columns = torch.arange(out_width, dtype=positions.dtype).mul_(stride[1]).add_(left)
    first = torch.arange(0, batch * height * width, height * width, dtype=torch.int32)
    return _Lattice(
        x.detach().permute(0, 2, 3, 1).reshape(-1, channels),  # detached, or embedding_bag prepares for a backward
        (height, width),
        positions.permute(2, 0, 3, 4, 1).flatten(1, 2),
        rows.repeat(batch)[:, None, None],
        columns[:, None],
        first.repeat_interleave(out_height)[:, None],
    )


def _axis(coordinate: Tensor, size: int) -> _Axis:
    # Truncation is floor above zero, and integers are clamped, so NaN cannot become a wild index. The near corner stays
    # in the image and the hat function does the rest: a sample that is a pixel or more outside weighs nothing.
    near = coordinate.to(torch.int32).clamp_(0, size - 2)
    distance = coordinate.sub_(near)
    return _Axis(near, distance, (_hat(distance.abs()), _hat((distance - 1).abs_())))


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 − distance), in place."""
    return distance.neg_().add_(1).clamp_(min=0)


def _plan(lattice: _Lattice, lines: slice, mask: Optional[Tensor]) -> _Plan:
    height, width = lattice.size
    x = _axis((lattice.offsets[0, lines] + lattice.columns).flatten(), width)
    y = _axis((lattice.offsets[1, lines] + lattice.rows[lines]).flatten(), height)
    first = lattice.first[lines]
    base = torch.add(x.near, y.near, alpha=width).view(len(first), -1).add_(first).view(-1)
    # strided stores: a trailing dimension of 2 or 4 would cost a loop call for each sample
    shares = x.distance.new_empty(len(base), 4)
    corners = base.new_empty(len(base), 4)
    for corner, (down, right) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        torch.mul(y.shares[down], x.shares[right], out=shares[:, corner])
        torch.add(base, down * width + right, out=corners[:, corner])
    weights = shares
    if mask is not None:
        mask = mask.permute(0, 2, 3, 1).flatten(0, 1)[lines].reshape(-1, 1)
        weights = shares * mask
    return _Plan(corners, weights.to(lattice.table.dtype), shares, mask, x, y)


def _matmul(columns: Tensor, kernel: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """`[n, p] @ [q, p]ᵀ + bias` with oneDNN, as Inductor does: faster than the BLAS behind `linear`."""
    if columns.dtype == torch.float32 and torch.backends.mkldnn.is_available() and columns.numel():
        return torch.ops.mkldnn._linear_pointwise(columns, kernel, bias, "none", [], "")
    return F.linear(columns, kernel, bias)


def _pieces(total: int, limit: int, step: int = 1) -> List[slice]:
    """Slices of `range(total)`, about equally long, in whole steps and, where a step allows, within `limit`."""
    pieces = max(1, -(-total // max(limit, step)))
    length = max(1, -(-total // (pieces * step))) * step
    return [slice(i, min(i + length, total)) for i in range(0, total, length)]


def _columns(table: Tensor, corners: Tensor, weights: Tensor, taps: int) -> Tensor:
    """`[n, K·C]` columns of n output pixels from their samples' corners and weights `[n·K, 4]`, channels fast."""
    return F.embedding_bag(corners, table, per_sample_weights=weights, mode="sum").view(len(corners) // taps, -1)


def _kernel(weight: Tensor, groups: int) -> Tensor:
    """`[groups, C_out/groups, K, C_in/groups]`: taps slow and channels fast, as in the columns."""
    return weight.flatten(2).transpose(1, 2).unflatten(0, (groups, -1)).contiguous()


def _grouped(columns: Tensor, kernel: Tensor) -> Tensor:
    """`[n, K·C]` → `[groups, n, K·C/groups]`."""
    groups, _, taps, _ = kernel.shape
    return columns.view(len(columns), taps, groups, -1).permute(2, 0, 1, 3).flatten(2)


def _product(columns: Tensor, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Columns → output `[n, C_out]`."""
    if len(kernel) == 1:
        return _matmul(columns, kernel[0].flatten(1), bias)
    product = torch.bmm(_grouped(columns, kernel), kernel.flatten(2).transpose(1, 2)).transpose(0, 1).flatten(1)
    return product if bias is None else product + bias


def _slab_pixels(weight: Tensor, groups: int) -> int:
    """Output pixels of a slab: no fewer than the kernel has rows, lest reading the kernel take the time."""
    row_bytes = weight[:1].numel() * groups * weight.element_size()
    return max(SLAB_BYTES // max(row_bytes, 1), weight.shape[0])


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
    batch, taps, _, out_height, out_width = positions.shape
    lattice = _lattice(x, positions, weight, stride, padding, dilation)
    kernel, slab = _kernel(weight, groups), _slab_pixels(weight, groups)
    out = x.new_empty(batch * out_height * out_width, weight.shape[0])
    for lines in _pieces(batch * out_height, PLAN_SAMPLES // (out_width * taps)):
        corners, weights = _plan(lattice, lines, mask)[:2]
        planned = out[lines.start * out_width : lines.stop * out_width]
        for pixels in _pieces(len(planned), slab):
            samples = slice(pixels.start * taps, pixels.stop * taps)
            planned[pixels] = _product(_columns(lattice.table, corners[samples], weights[samples], taps), kernel, bias)
        del corners, weights  # or they would be in memory together with the next
    return out.view(batch, out_height, out_width, weight.shape[0]).permute(0, 3, 1, 2)


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
    batch, taps, _, out_height, out_width = positions.shape
    lattice = _lattice(x, positions, weight, stride, padding, dilation)
    kernel, slab = _kernel(weight, groups), _slab_pixels(weight, groups)
    grad = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
    image_pixels, image_rows = out_height * out_width, lattice.size[0] * lattice.size[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    table = lattice.table.to(wide) if need_points else lattice.table
    grad_table = torch.empty_like(lattice.table) if need_x else x.new_empty(0)
    grad_coordinates = positions.new_empty(2, len(grad) * taps if need_points else 0)
    grad_mask = x.new_empty(0) if mask is None else mask.new_empty(len(grad) * taps if need_points else 0)
    grad_kernel = torch.zeros_like(kernel, dtype=wide)

    # Whole images: then a slab's samples read (and their gradients return to) those images' rows of the table alone.
    for lines in _pieces(batch * out_height, PLAN_SAMPLES // (out_width * taps), out_height):
        plan = _plan(lattice, lines, mask)
        first_pixel, first_image = lines.start * out_width, lines.start // out_height
        upstream = grad[first_pixel : lines.stop * out_width]
        if need_weight:
            for pixels in _pieces(len(upstream), slab):
                samples = slice(pixels.start * taps, pixels.stop * taps)
                columns = _columns(lattice.table, plan.corners[samples], plan.weights[samples], taps)
                grad_kernel += _kernel_gradient(upstream[pixels], columns, kernel)
                del columns
        readers = _readers(plan) if need_x else None
        grad_shares = plan.shares.new_empty(plan.shares.shape if need_points else 0)
        for pixels in _pieces(len(upstream), slab, image_pixels) if need_x or need_points else []:
            samples = slice(pixels.start * taps, pixels.stop * taps)
            grad_samples = _sample_gradient(upstream[pixels], kernel)
            if readers is not None:
                images = (first_image + pixels.start // image_pixels, first_image + pixels.stop // image_pixels)
                rows = slice(images[0] * image_rows, images[1] * image_rows)
                grad_table[rows] = _transposed_gather(grad_samples, readers, samples, rows, lattice.size[1])
            if need_points:
                grad_shares[samples] = _corner_products(grad_samples.to(wide), table, plan.corners[samples])
            del grad_samples
        if need_points:
            samples = slice(first_pixel * taps, first_pixel * taps + len(grad_shares))
            if plan.mask is not None:
                grad_mask[samples] = (grad_shares * plan.shares).sum(1)
                grad_shares *= plan.mask
            _grad_coordinates(grad_shares, plan, grad_coordinates[:, samples])
        del plan, readers, grad_shares

    if need_x:
        grad_x = grad_table.view(batch, *lattice.size, x.shape[1])[:, : x.shape[2], : x.shape[3]].permute(0, 3, 1, 2)
        grad_x = grad_x.contiguous(memory_format=torch.channels_last) if grad_x.numel() else torch.zeros_like(x)
    else:
        grad_x = grad_table
    by_pixel = batch, out_height, out_width, taps
    grad_positions = positions.new_empty(0)
    if need_points:
        grad_positions = grad_coordinates.view(2, *by_pixel).permute(1, 4, 0, 2, 3)
    if need_points and mask is not None:
        grad_mask = grad_mask.view(by_pixel).permute(0, 3, 1, 2)
    grad_weight = x.new_empty(0)
    if need_weight:
        grad_weight = grad_kernel.flatten(0, 1).transpose(1, 2).to(weight.dtype).reshape(weight.shape)
        grad_weight = grad_weight.contiguous(memory_format=_memory_format(weight))
    return grad_x, grad_positions, grad_weight, grad_mask


def _memory_format(weight: Tensor) -> torch.memory_format:
    """The one in which autograd takes the kernel's gradient over without a copy."""
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _kernel_gradient(upstream: Tensor, columns: Tensor, kernel: Tensor) -> Tensor:
    """The kernel's gradient from some pixels: their gradients `[n, C_out]` and their columns."""
    if len(kernel) == 1:
        return _matmul(upstream.t(), columns.t()).view_as(kernel)
    upstream = upstream.unflatten(1, kernel.shape[:2]).permute(1, 2, 0)
    return torch.bmm(upstream, _grouped(columns, kernel)).view_as(kernel)


def _sample_gradient(upstream: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of n pixels `[n, C_out]` → of their samples, `[n·K, C]`."""
    groups, _, taps, group_channels = kernel.shape
    if groups == 1:
        return _matmul(upstream, kernel[0].flatten(1).t()).view(-1, group_channels)
    grouped = torch.bmm(upstream.unflatten(1, kernel.shape[:2]).transpose(0, 1), kernel.flatten(2))
    return grouped.unflatten(2, (taps, -1)).permute(1, 2, 0, 3).reshape(-1, groups * group_channels)


def _corner_products(grad_samples: Tensor, table: Tensor, corners: Tensor) -> Tensor:
    """⟨gradient of a sample, pixel⟩ for its four corners, `[M, 4]`: the gradient of the bilinear weights.

    A matrix product where only the entries (sample, corner) of the result are wanted.
    """
    rows = torch.arange(0, corners.numel() + 1, 4, dtype=corners.dtype)
    values = table.new_zeros(corners.numel())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        wanted = torch.sparse_csr_tensor(
            rows, corners.flatten(), values, (len(corners), len(table)), check_invariants=False
        )
    return torch.sparse.sampled_addmm(wanted, grad_samples, table.t(), beta=0).values().view(-1, 4)


class _Readers(NamedTuple):
    """The M samples of a plan sorted by the row of the table that their first corner reads."""

    rows: Tensor  # [M] int32, ascending
    samples: Tensor  # [M] int32
    weights: Tensor  # [M, 4]


def _readers(plan: _Plan) -> _Readers:
    rows, samples = torch.sort(plan.corners[:, 0].contiguous(), stable=True)
    return _Readers(rows, samples.to(torch.int32), plan.weights.index_select(0, samples))


def _transposed_gather(grad_samples: Tensor, readers: _Readers, samples: slice, rows: slice, width: int) -> Tensor:
    """The gradient of some images' `rows` of the table, `[n, C]`, from that of all `samples` that read them."""
    first = torch.arange(rows.start, rows.stop, dtype=readers.rows.dtype)
    bags = torch.searchsorted(readers.rows[samples], first, out_int32=True)
    members = readers.samples[samples] - samples.start
    out = torch.empty(0)
    for corner, shift in enumerate((0, 1, width, width + 1)):
        weights = readers.weights[samples, corner].contiguous()
        read = F.embedding_bag(members, grad_samples, bags, per_sample_weights=weights, mode="sum")
        if corner == 0:
            out = read
        else:
            out[shift:] += read[: len(out) - shift]
    return out


def _grad_coordinates(grad_shares: Tensor, plan: _Plan, out: Tensor) -> None:
    """Gradient of the shares `[M, 4]` → of the coordinates, into `out` `[2, M]` as (x, y)."""
    g00, g01, g10, g11 = (grad_shares[:, corner].contiguous() for corner in range(4))
    (left, right), (top, bottom) = plan.x.shares, plan.y.shares
    _through_hats((g00 * top).addcmul_(g10, bottom), (g01 * top).addcmul_(g11, bottom), plan.x.distance, out[0])
    _through_hats((g00 * left).addcmul_(g01, right), (g10 * left).addcmul_(g11, right), plan.y.distance, out[1])


def _through_hats(near: Tensor, far: Tensor, distance: Tensor, out: Tensor) -> None:
    """Gradients of an axis' two shares → of its coordinate.

    A hat's slope is taken from the right, as torchvision's: a sample on a pixel sees its right neighbour.
    """
    pixel = distance.floor()
    torch.sub(far, near, out=out).mul_(pixel == 0).addcmul_(near, pixel == -1).addcmul_(far, pixel == 1, value=-1)


@gather_conv2d_backward.register_fake
def _(grad, x, positions, weight, mask, stride, padding, dilation, groups, need_x, need_points, need_weight):
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if need_x else x.new_empty(0),
        torch.empty_like(positions.permute(2, 0, 3, 4, 1).contiguous()).permute(1, 4, 0, 2, 3)
        if need_points
        else positions.new_empty(0),
        torch.empty_like(weight, memory_format=_memory_format(weight)) if need_weight else x.new_empty(0),
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
