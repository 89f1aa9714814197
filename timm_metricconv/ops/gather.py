"""The fast CPU backend: gather with `embedding_bag`, then a matrix product, slab by slab.

A bag is the four corners of one sample, the table is the channels-last image and the per-sample weights are the
bilinear weights. A slab of columns fits the cache: it is made, multiplied and forgotten, and the backward pass makes it
again. The image's gradient is the same gather transposed: the samples are sorted by their corner, a bag is then all the
samples that read one pixel. So nothing is scattered, the result is deterministic, and every pass uses all threads.

Positions, corners and weights are planned for a few images at a time. Temporary memory then stays at some ten MiB
whatever the batch; with more, the allocator gives it back to the system after every call, and to fault the pages in
again can cost more than the arithmetic.
"""

import functools
import warnings
from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .custom_op import Arguments, Gradients, by_pixels, define, with_far_corners
from .reference import first_centre
from .samples import FIELDS

# Columns in memory at a time: they fit the last-level cache, and a matrix product of them is large enough to be fast.
SLAB_BYTES = 8 * 2**20
# Samples planned at a time: enough for torch to use several threads, in elementwise passes (2**16) and to sort (2**15).
PLAN_SAMPLES = 2**17


# --- where the samples lie -------------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Offsets of the samples from their centres: as they come, or a pattern's points under affine maps."""

    values: Tensor  # [L, W_out, ...] positions (G·K, 2), or maps (G·6)
    pattern: Optional[Tensor]  # [6, 2K]: a map's row times this is y = L·p + t, all x and then all y

    def offsets(self, lines: slice) -> Tuple[Tensor, Tensor]:
        """(x, y) of the samples of some output lines, `[lines, W_out, G·K]` each."""
        values = self.values[lines]
        if self.pattern is None:
            return values[..., 0], values[..., 1]
        both = torch.mm(values.reshape(-1, FIELDS), self.pattern).view(*values.shape[:2], -1, 2, self._taps)
        return both[..., 0, :].flatten(2), both[..., 1, :].flatten(2)

    def gradient(self, lines: slice, grad_x: Tensor, grad_y: Tensor) -> Tensor:
        """Gradients of x and y `[M]` → of the lines' values."""
        if self.pattern is None:
            return torch.stack((grad_x, grad_y), -1).view_as(self.values[lines])
        both = torch.cat((grad_x.view(-1, self._taps), grad_y.view(-1, self._taps)), 1)
        return torch.mm(both, self.pattern.t()).view_as(self.values[lines])

    @property
    def _taps(self) -> int:
        assert self.pattern is not None
        return self.pattern.shape[1] // 2


def _source(arguments: Arguments) -> _Source:
    values, points = by_pixels(arguments.source).flatten(0, 1), arguments.points
    if points is None:
        return _Source(values, None)
    pattern = values.new_zeros(FIELDS, 2, len(points))
    pattern[0:2, 0], pattern[2:4, 1] = points.t(), points.t()
    pattern[4, 0], pattern[5, 1] = 1, 1
    return _Source(values, pattern.flatten(1))


class _Lattice(NamedTuple):
    """Where the samples of all output lines read: L = B·H_out lines of W_out pixels of G·K samples."""

    table: Tensor  # [B·height·width·G, C/G], the channels-last image: a row is one pixel of one metric group
    size: Tuple[int, int]  # (height, width), two at least
    metric_groups: int  # G
    source: _Source
    rows: Tensor  # [L, 1, 1] the lines' centre in the image
    columns: Tensor  # [W_out, 1] the pixels' centre in the image
    first: Tensor  # [L, 1] int32, the row of the table where the line's image begins

    @property
    def shifts(self) -> Tuple[int, int, int, int]:
        """Rows of the table from a sample's near corner to (0, 0), (0, 1), (1, 0), (1, 1) as (down, right)."""
        down = self.size[1] * self.metric_groups
        return 0, self.metric_groups, down, down + self.metric_groups


def _lattice(arguments: Arguments) -> _Lattice:
    x, source, weight, _, stride, padding, dilation, *_ = arguments
    x = with_far_corners(x)
    batch, channels, height, width = x.shape
    out_height, out_width = source.shape[-2:]
    metric_groups = arguments.metric_groups
    top, left = first_centre(weight, padding, dilation)
    rows = torch.arange(out_height, dtype=source.dtype).mul_(stride[0]).add_(top)
    columns = torch.arange(out_width, dtype=source.dtype).mul_(stride[1]).add_(left)
    first = torch.arange(batch, dtype=torch.int32).mul_(height * width * metric_groups)
    return _Lattice(
        # detached, or embedding_bag prepares for a backward
        x.detach().permute(0, 2, 3, 1).reshape(-1, channels // metric_groups),
        (height, width),
        metric_groups,
        _source(arguments),
        rows.repeat(batch)[:, None, None],
        columns[:, None],
        first.repeat_interleave(out_height)[:, None],
    )


class _Axis(NamedTuple):
    """Linear interpolation along an axis, for M samples."""

    distance: Tensor  # [M] from the near corner
    near: Tensor  # [M] weight of the near corner
    far: Tensor  # [M] and of the far one


class _Plan(NamedTuple):
    """How M samples, those of some output lines, read the table."""

    corners: Tensor  # [M, 4] int32 rows of the table: the corners (0, 0), (0, 1), (1, 0), (1, 1) as (down, right)
    weights: Tensor  # [M, 4] bilinear weights times the mask, in the image's dtype
    shares: Tensor  # [M, 4] bilinear weights
    mask: Optional[Tensor]  # [M, 1]
    x: _Axis
    y: _Axis


def _axis(coordinate: Tensor, size: int) -> Tuple[Tensor, _Axis]:
    """The near corner `[M]` int32, and the interpolation."""
    # Truncation is floor above zero, and integers are clamped, so NaN cannot become a wild index. The near corner stays
    # in the image and the hat function does the rest: a sample that is a pixel or more outside weighs nothing.
    corner = coordinate.to(torch.int32).clamp_(0, size - 2)
    distance = coordinate.sub_(corner)
    return corner, _Axis(distance, _hat(distance.abs()), _hat((distance - 1).abs_()))


def _hat(distance: Tensor) -> Tensor:
    """max(0, 1 − distance), in place."""
    return distance.neg_().add_(1).clamp_(min=0)


def _plan(lattice: _Lattice, lines: slice, mask: Optional[Tensor]) -> _Plan:
    height, width = lattice.size
    x_offsets, y_offsets = lattice.source.offsets(lines)
    column, x = _axis((x_offsets + lattice.columns).reshape(-1), width)
    row, y = _axis((y_offsets + lattice.rows[lines]).reshape(-1), height)
    first = lattice.first[lines]
    base = column.add_(row, alpha=width)
    if lattice.metric_groups > 1:
        groups = torch.arange(lattice.metric_groups, dtype=base.dtype)
        groups = groups.repeat_interleave(x_offsets.shape[-1] // lattice.metric_groups)
        base = base.mul_(lattice.metric_groups).view(-1, len(groups)).add_(groups)
    base = base.view(len(first), -1).add_(first).view(-1)
    # strided stores: a trailing dimension of 2 or 4 would cost a loop call for each sample
    shares = x.distance.new_empty(len(base), 4)
    corners = base.new_empty(len(base), 4)
    for corner, shift in enumerate(lattice.shifts):
        vertical, horizontal = (y.near, y.far)[corner // 2], (x.near, x.far)[corner % 2]
        torch.mul(vertical, horizontal, out=shares[:, corner])
        torch.add(base, shift, out=corners[:, corner])
    weights = shares
    if mask is not None:
        mask = mask.permute(0, 2, 3, 1).flatten(0, 1)[lines].reshape(-1, 1)
        weights = shares * mask
    return _Plan(corners, weights.to(lattice.table.dtype), shares, mask, x, y)


def _pieces(total: int, limit: int, step: int = 1) -> List[slice]:
    """Slices of `range(total)`, about equally long, in whole steps and, where a step allows, within `limit`."""
    pieces = max(1, -(-total // max(limit, step)))
    length = max(1, -(-total // (pieces * step))) * step
    return [slice(i, min(i + length, total)) for i in range(0, total, length)]


def _slab_pixels(arguments: Arguments) -> int:
    """Output pixels of a slab: no fewer than the kernel has rows, lest reading the kernel take the time."""
    weight = arguments.weight
    row_bytes = weight[0].numel() * arguments.groups * weight.element_size()
    return max(SLAB_BYTES // row_bytes, weight.shape[0])


# --- forward ---------------------------------------------------------------------------------------------------------


def _columns(table: Tensor, corners: Tensor, weights: Tensor, taps: int) -> Tensor:
    """`[n, K·C]` columns of n output pixels from the corners and weights `[M, 4]` of their `taps` samples each."""
    return F.embedding_bag(corners, table, per_sample_weights=weights, mode="sum").view(len(corners) // taps, -1)


def _kernel(arguments: Arguments) -> Tensor:
    """`[groups/r, r, C_out/groups, q, K, c]`: taps slow and channels fast, as in the columns.

    r kernel groups share a metric group, or q metric groups lie in a kernel group; c channels are in both.
    """
    weight, groups, metric_groups = arguments.weight.flatten(2), arguments.groups, arguments.metric_groups
    weight = weight.unflatten(1, (max(1, metric_groups // groups), -1)).transpose(2, 3)
    return weight.unflatten(0, (min(groups, metric_groups), max(1, groups // metric_groups), -1)).contiguous()


def _grouped(columns: Tensor, kernel: Tensor) -> Tensor:
    """`[n, G·K·C/G]` → `[groups, n, K·C/groups]`."""
    outer, shared, _, *taps, channels = kernel.shape
    columns = columns.view(len(columns), outer, *taps, shared, channels)
    return columns.permute(1, 4, 0, 2, 3, 5).flatten(3).flatten(0, 1)


def _product(columns: Tensor, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Columns → output `[n, C_out]`."""
    matrices = kernel.flatten(3).flatten(0, 1)
    if len(matrices) == 1:
        # as an image of one column: oneDNN's 1×1 convolution is faster than any of torch's matrix products here
        image = columns[None, :, None].permute(0, 3, 1, 2)
        return by_pixels(F.conv2d(image, matrices[0][:, :, None, None], bias)).flatten(0, 2)
    product = torch.bmm(_grouped(columns, kernel), matrices.transpose(1, 2)).transpose(0, 1).flatten(1)
    return product if bias is None else product + bias


def _forward(arguments: Arguments, bias: Optional[Tensor], out: Tensor) -> None:
    lattice, kernel, slab, mask = _lattice(arguments), _kernel(arguments), _slab_pixels(arguments), arguments.mask
    (batch, out_height, out_width, _), taps = by_pixels(out).shape, arguments.metric_groups * arguments.taps
    out = by_pixels(out).flatten(0, 2)
    for lines in _pieces(batch * out_height, PLAN_SAMPLES // (out_width * taps)):
        corners, weights = _plan(lattice, lines, mask)[:2]
        planned = out[lines.start * out_width : lines.stop * out_width]
        for pixels in _pieces(len(planned), slab):
            samples = slice(pixels.start * taps, pixels.stop * taps)
            planned[pixels] = _product(_columns(lattice.table, corners[samples], weights[samples], taps), kernel, bias)
        del corners, weights  # or they would be in memory together with the next


# --- backward --------------------------------------------------------------------------------------------------------


def _gradients(arguments: Arguments, grad: Tensor, into: Gradients) -> None:
    lattice, kernel, slab, mask = _lattice(arguments), _kernel(arguments), _slab_pixels(arguments), arguments.mask
    (batch, _, out_height, out_width), taps = grad.shape, arguments.metric_groups * arguments.taps
    image_pixels, image_rows = out_height * out_width, lattice.size[0] * lattice.shifts[2]
    grad = by_pixels(grad).reshape(-1, len(arguments.weight))
    wide = torch.promote_types(lattice.table.dtype, torch.float32)
    table = lattice.table if into.source is None else lattice.table.to(wide)
    grad_table = None if into.x is None else torch.empty_like(lattice.table)
    grad_source = None if into.source is None else by_pixels(into.source).flatten(0, 1)
    grad_mask = None if into.mask is None else by_pixels(into.mask).flatten()
    grad_kernel = None

    # Whole images: then a slab's samples read (and their gradients return to) those images' rows of the table alone.
    for lines in _pieces(batch * out_height, PLAN_SAMPLES // (out_width * taps), out_height):
        plan = _plan(lattice, lines, mask)
        first_pixel, first_image = lines.start * out_width, lines.start // out_height
        upstream = grad[first_pixel : lines.stop * out_width]
        if into.weight is not None:
            gradient = _kernel_gradient(lattice.table, plan, upstream, kernel, slab)
            grad_kernel = gradient if grad_kernel is None else grad_kernel.add_(gradient)
        readers = None if grad_table is None else _readers(plan)
        grad_shares = plan.shares.new_empty(0 if grad_source is None else plan.shares.shape)
        for pixels in [] if grad_table is grad_source is None else _pieces(len(upstream), slab, image_pixels):
            samples = slice(pixels.start * taps, pixels.stop * taps)
            grad_samples = _sample_gradient(upstream[pixels], kernel)
            if readers is not None and grad_table is not None:
                images = (first_image + pixels.start // image_pixels, first_image + pixels.stop // image_pixels)
                rows = slice(images[0] * image_rows, images[1] * image_rows)
                grad_table[rows] = _transposed_gather(grad_samples, readers, samples, rows, lattice.shifts)
            if grad_source is not None:
                grad_shares[samples] = _corner_products(grad_samples.to(wide), table, plan.corners[samples])
            del grad_samples
        if grad_source is not None:
            if plan.mask is not None and grad_mask is not None:
                samples = slice(first_pixel * taps, lines.stop * out_width * taps)
                grad_mask[samples] = (grad_shares * plan.shares).sum(1)
                grad_shares *= plan.mask
            grad_source[lines] = lattice.source.gradient(lines, *_coordinate_gradients(grad_shares, plan))
        del plan, readers, grad_shares

    if into.x is not None and grad_table is not None:
        grad_table = grad_table.view(batch, *lattice.size, -1)
        by_pixels(into.x).copy_(grad_table[:, : into.x.shape[2], : into.x.shape[3]])
    if into.weight is not None and grad_kernel is not None:
        into.weight.copy_(grad_kernel.flatten(0, 2).transpose(2, 3).reshape(into.weight.shape))


def _kernel_gradient(table: Tensor, plan: _Plan, upstream: Tensor, kernel: Tensor, slab: int) -> Tensor:
    """The kernel's gradient from the plan's pixels, whose gradients `[n, C_out]` are given; in float32 at least."""
    taps, total = len(plan.corners) // len(upstream), None
    for pixels in _pieces(len(upstream), slab):
        samples = slice(pixels.start * taps, pixels.stop * taps)
        columns = _columns(table, plan.corners[samples], plan.weights[samples], taps)
        part = _product_gradient(columns, upstream[pixels], kernel)
        total = part.to(torch.promote_types(part.dtype, torch.float32)) if total is None else total.add_(part)
        del columns, part
    assert total is not None, "a plan has pixels"
    return total


def _product_gradient(columns: Tensor, upstream: Tensor, kernel: Tensor) -> Tensor:
    """The kernel's gradient from n pixels' columns and gradients `[n, C_out]`."""
    groups = kernel.shape[0] * kernel.shape[1]
    if groups == 1:
        return torch.mm(upstream.t(), columns).view_as(kernel)
    grouped = upstream.unflatten(1, (groups, -1)).permute(1, 2, 0)
    return torch.bmm(grouped, _grouped(columns, kernel)).view_as(kernel)


def _sample_gradient(upstream: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of n pixels `[n, C_out]` → of their samples, `[n·G·K, C/G]`."""
    outer, shared, _, *taps, channels = kernel.shape
    matrices = kernel.flatten(3).flatten(0, 1)
    if len(matrices) == 1:
        return torch.mm(upstream, matrices[0]).view(-1, channels)
    grouped = torch.bmm(upstream.unflatten(1, (len(matrices), -1)).transpose(0, 1), matrices)
    grouped = grouped.view(outer, shared, len(upstream), *taps, channels)
    return grouped.permute(2, 0, 3, 4, 1, 5).reshape(-1, shared * channels)


class _Readers(NamedTuple):
    """The M samples of a plan sorted by the row of the table that their first corner reads."""

    rows: Tensor  # [M] int32, ascending
    samples: Tensor  # [M] int32
    weights: Tensor  # [M, 4]


def _readers(plan: _Plan) -> _Readers:
    rows, samples = torch.sort(plan.corners[:, 0].contiguous(), stable=True)
    return _Readers(rows, samples.to(torch.int32), plan.weights.index_select(0, samples))


def _transposed_gather(grad_samples: Tensor, readers: _Readers, samples: slice, rows: slice, shifts: Tuple) -> Tensor:
    """The gradient of some images' `rows` of the table, `[n, C]`, from that of all `samples` that read them."""
    numbers = torch.arange(rows.start, rows.stop, dtype=readers.rows.dtype)
    bags = torch.searchsorted(readers.rows[samples], numbers, out_int32=True)
    members = readers.samples[samples] - samples.start
    by_corner = (
        F.embedding_bag(members, grad_samples, bags, per_sample_weights=weights.contiguous(), mode="sum")
        for weights in readers.weights[samples].unbind(1)
    )
    out = next(by_corner)
    for shift, read in zip(shifts[1:], by_corner, strict=True):
        out[shift:] += read[: len(out) - shift]
    return out


@functools.cache
def _hear_the_beta_warning() -> None:
    """torch says once in a process that sparse CSR tensors are in beta, which is nothing to our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1))


def _corner_products(grad_samples: Tensor, table: Tensor, corners: Tensor) -> Tensor:
    """⟨gradient of a sample, pixel⟩ for its four corners, `[M, 4]`: the gradient of the bilinear weights.

    It is a matrix product of which only the entries (sample, corner) are wanted.
    """
    _hear_the_beta_warning()
    rows = torch.arange(0, corners.numel() + 1, 4, dtype=corners.dtype)
    values, size = table.new_zeros(corners.numel()), (len(corners), len(table))
    wanted = torch.sparse_csr_tensor(rows, corners.flatten(), values, size, check_invariants=False)
    return torch.sparse.sampled_addmm(wanted, grad_samples, table.t(), beta=0).values().view(-1, 4)


def _coordinate_gradients(grad_shares: Tensor, plan: _Plan) -> Tuple[Tensor, Tensor]:
    """Gradient of the shares `[M, 4]` → of the coordinates x and y, `[M]`."""
    g00, g01, g10, g11 = (grad_shares[:, corner].contiguous() for corner in range(4))
    (_, left, right), (_, top, bottom) = plan.x, plan.y
    return (
        _through_hats((g00 * top).addcmul_(g10, bottom), (g01 * top).addcmul_(g11, bottom), plan.x.distance),
        _through_hats((g00 * left).addcmul_(g01, right), (g10 * left).addcmul_(g11, right), plan.y.distance),
    )


def _through_hats(near: Tensor, far: Tensor, distance: Tensor) -> Tensor:
    """Gradients of an axis' two shares → of its coordinate.

    A hat's slope is taken from the right, as torchvision's: a sample on a pixel sees its right neighbour.
    """
    pixel = distance.floor()
    return (far - near).mul_(pixel == 0).addcmul_(near, pixel == -1).addcmul_(far, pixel == 1, value=-1)


# `ball_conv2d_reference`, fast on CPUs and straight from affine maps
gather_conv2d = define("gather_conv2d", _forward, _gradients, device_types="cpu")
