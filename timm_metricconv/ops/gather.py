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
from typing import List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .custom_op import Arguments, define, kernel_format, with_far_corners
from .reference import first_centre

# Columns in memory at a time: they fit a core's share of the last-level cache.
SLAB_BYTES = 3 * 2**20
# Samples planned at a time: enough for torch to use several threads, in elementwise passes (2**16) and to sort (2**15).
PLAN_SAMPLES = 2**17


# --- where the samples lie -------------------------------------------------------------------------------------------


class _Positions:
    """Offsets of the samples from their centres as they come."""

    def __init__(self, positions: Tensor):
        self.values = positions.permute(0, 3, 4, 1, 2).flatten(0, 1)  # [L, W_out, K, 2]

    def offsets(self, lines: slice) -> Tuple[Tensor, Tensor]:
        """(x, y) of the samples of some output lines, `[lines, W_out, K]` each."""
        return self.values[lines, ..., 0], self.values[lines, ..., 1]

    def gradient(self, lines: slice, grad_x: Tensor, grad_y: Tensor) -> Tensor:
        """Gradients of x and y `[M]` → of the lines' values."""
        return torch.stack((grad_x, grad_y), -1).view_as(self.values[lines])


class _Metrics:
    """Offsets y_j = p_j / (F(û_j) + ε), F(û) = sqrt(ûᵀMû) + ωᵀû, from fields (a, b, d, ω_x, ω_y) of metrics."""

    def __init__(self, fields: Tensor, points: Tensor, eps_omega: float, eps: float):
        self.values = fields.permute(0, 2, 3, 1).flatten(0, 1)  # [L, W_out, 5]
        radii = torch.linalg.vector_norm(points, dim=1, keepdim=True)
        # any direction serves for a point at the origin
        directions = torch.where(radii > 0, points / radii, points.new_tensor([1.0, 0.0]))
        x, y = self.directions = directions.t()
        self.products = torch.stack((x * x, 2 * x * y, y * y))
        self.points, self.eps_omega, self.eps = points.t().contiguous(), eps_omega, eps

    def _finsler(self, fields: Tensor) -> Tuple[Tensor, Tensor]:
        """sqrt(ûᵀMû) and F(û), `[lines·W_out, K]`; the two bounds are idle, as in `geometry.randers`."""
        riemannian = torch.mm(fields[:, :3], self.products).clamp_(min=1e-30).sqrt_()
        if self.eps_omega == 1.0:
            return riemannian, riemannian
        finsler = torch.addmm(riemannian, fields[:, 3:], self.directions)
        return riemannian, torch.maximum(finsler, riemannian * (0.5 * self.eps_omega))

    def offsets(self, lines: slice) -> Tuple[Tensor, Tensor]:
        """As `_Positions.offsets`."""
        fields = self.values[lines]
        stretch = (self._finsler(fields.flatten(0, 1))[1] + self.eps).reciprocal_().view(*fields.shape[:2], -1)
        return stretch * self.points[0], stretch * self.points[1]

    def gradient(self, lines: slice, grad_x: Tensor, grad_y: Tensor) -> Tensor:
        """As `_Positions.gradient`."""
        fields = self.values[lines]
        riemannian, finsler = self._finsler(fields.flatten(0, 1))
        grad_finsler = grad_x.view_as(finsler) * self.points[0]
        grad_finsler.addcmul_(grad_y.view_as(finsler), self.points[1]).div_((finsler + self.eps).square_().neg_())
        grad_riemannian, grad_drift = grad_finsler, grad_finsler
        if self.eps_omega == 1.0:
            grad_drift = torch.zeros_like(grad_finsler)
        elif (at_bound := finsler <= riemannian * (0.5 * self.eps_omega)).any():
            grad_riemannian = torch.where(at_bound, grad_finsler * (0.5 * self.eps_omega), grad_finsler)
            grad_drift = grad_finsler.masked_fill(at_bound, 0)
        grad_metric = _matmul(grad_riemannian / riemannian, 0.5 * self.products)
        return torch.cat((grad_metric, _matmul(grad_drift, self.directions)), 1).view_as(fields)


class _Lattice(NamedTuple):
    """Where the samples of all output lines read: L = B·H_out lines of W_out pixels of K samples."""

    table: Tensor  # [B·height·width, C], the channels-last image
    size: Tuple[int, int]  # (height, width), two at least
    source: Union[_Positions, _Metrics]
    rows: Tensor  # [L, 1, 1] the lines' centre in the image
    columns: Tensor  # [W_out, 1] the pixels' centre in the image
    first: Tensor  # [L, 1] int32, the row of the table where the line's image begins


def _lattice(arguments: Arguments) -> _Lattice:
    x, source, weight, _, stride, padding, dilation, _, points, eps_omega, eps = arguments
    x = with_far_corners(x)
    batch, channels, height, width = x.shape
    out_height, out_width = source.shape[-2:]
    top, left = first_centre(weight, padding, dilation)
    rows = torch.arange(out_height, dtype=source.dtype).mul_(stride[0]).add_(top)
    columns = torch.arange(out_width, dtype=source.dtype).mul_(stride[1]).add_(left)
    first = torch.arange(batch, dtype=torch.int32).mul_(height * width)[:, None].expand(batch, out_height)
    return _Lattice(
        x.detach().permute(0, 2, 3, 1).reshape(-1, channels),  # detached, or embedding_bag prepares for a backward
        (height, width),
        _Positions(source) if points is None else _Metrics(source, points, eps_omega, eps),
        rows.repeat(batch)[:, None, None],
        columns[:, None],
        first.reshape(-1, 1),
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
    base = column.add_(row, alpha=width).view(len(first), -1).add_(first).view(-1)
    # strided stores: a trailing dimension of 2 or 4 would cost a loop call for each sample
    shares = x.distance.new_empty(len(base), 4)
    corners = base.new_empty(len(base), 4)
    for corner, (vertical, horizontal, shift) in enumerate(
        ((y.near, x.near, 0), (y.near, x.far, 1), (y.far, x.near, width), (y.far, x.far, width + 1))
    ):
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
    """`[n, K·C]` columns of n output pixels from their samples' corners and weights `[n·K, 4]`, channels fast."""
    return F.embedding_bag(corners, table, per_sample_weights=weights, mode="sum").view(len(corners) // taps, -1)


def _kernel(arguments: Arguments) -> Tensor:
    """`[groups, C_out/groups, K, C_in/groups]`: taps slow and channels fast, as in the columns."""
    return arguments.weight.flatten(2).transpose(1, 2).unflatten(0, (arguments.groups, -1)).contiguous()


def _grouped(columns: Tensor, kernel: Tensor) -> Tensor:
    """`[n, K·C]` → `[groups, n, K·C/groups]`."""
    groups, _, taps, _ = kernel.shape
    return columns.view(len(columns), taps, groups, -1).permute(2, 0, 1, 3).flatten(2)


def _matmul(columns: Tensor, kernel: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """`[n, p] @ [q, p]ᵀ + bias` with oneDNN, as Inductor does: faster than the BLAS behind `linear`."""
    if columns.dtype == torch.float32 and torch.backends.mkldnn.is_available() and columns.numel():
        return torch.ops.mkldnn._linear_pointwise(columns, kernel, bias, "none", [], "")
    return F.linear(columns, kernel, bias)


def _product(columns: Tensor, kernel: Tensor, bias: Optional[Tensor]) -> Tensor:
    """Columns → output `[n, C_out]`."""
    if len(kernel) == 1:
        return _matmul(columns, kernel[0].flatten(1), bias)
    product = torch.bmm(_grouped(columns, kernel), kernel.flatten(2).transpose(1, 2)).transpose(0, 1).flatten(1)
    return product if bias is None else product + bias


def _forward(arguments: Arguments, bias: Optional[Tensor]) -> Tensor:
    x, source, weight, mask = arguments[:4]
    lattice, kernel, slab = _lattice(arguments), _kernel(arguments), _slab_pixels(arguments)
    (batch, *_, out_height, out_width), taps = source.shape, weight[0, 0].numel()
    out = x.new_empty(batch * out_height * out_width, weight.shape[0])
    for lines in _pieces(batch * out_height, PLAN_SAMPLES // (out_width * taps)):
        corners, weights = _plan(lattice, lines, mask)[:2]
        planned = out[lines.start * out_width : lines.stop * out_width]
        for pixels in _pieces(len(planned), slab):
            samples = slice(pixels.start * taps, pixels.stop * taps)
            planned[pixels] = _product(_columns(lattice.table, corners[samples], weights[samples], taps), kernel, bias)
        del corners, weights  # or they would be in memory together with the next
    return out.view(batch, out_height, out_width, weight.shape[0]).permute(0, 3, 1, 2)


# --- backward --------------------------------------------------------------------------------------------------------


def _gradients(
    arguments: Arguments, grad: Tensor, need_x: bool, need_source: bool, need_weight: bool
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, positions or fields, weight and mask; an empty tensor for what is not needed."""
    x, source, weight, mask = arguments[:4]
    lattice, kernel, slab = _lattice(arguments), _kernel(arguments), _slab_pixels(arguments)
    (batch, *_, out_height, out_width), taps = source.shape, weight[0, 0].numel()
    image_pixels, image_rows = out_height * out_width, lattice.size[0] * lattice.size[1]
    grad = grad.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])
    wide = torch.promote_types(x.dtype, torch.float32)
    table = lattice.table.to(wide) if need_source else lattice.table
    grad_table = lattice.table.new_empty(lattice.table.shape if need_x else 0)
    grad_source = source.new_empty(lattice.source.values.shape) if need_source else x.new_empty(0)
    grad_mask = mask.new_empty(len(grad) * taps) if need_source and mask is not None else x.new_empty(0)
    grad_kernel = None

    # Whole images: then a slab's samples read (and their gradients return to) those images' rows of the table alone.
    for lines in _pieces(batch * out_height, PLAN_SAMPLES // (out_width * taps), out_height):
        plan = _plan(lattice, lines, mask)
        first_pixel, first_image = lines.start * out_width, lines.start // out_height
        upstream = grad[first_pixel : lines.stop * out_width]
        if need_weight:
            gradient = _kernel_gradient(lattice.table, plan, upstream, kernel, slab)
            grad_kernel = gradient if grad_kernel is None else grad_kernel.add_(gradient)
        readers = _readers(plan) if need_x else None
        grad_shares = plan.shares.new_empty(plan.shares.shape if need_source else 0)
        for pixels in _pieces(len(upstream), slab, image_pixels) if need_x or need_source else []:
            samples = slice(pixels.start * taps, pixels.stop * taps)
            grad_samples = _sample_gradient(upstream[pixels], kernel)
            if readers is not None:
                images = (first_image + pixels.start // image_pixels, first_image + pixels.stop // image_pixels)
                rows = slice(images[0] * image_rows, images[1] * image_rows)
                grad_table[rows] = _transposed_gather(grad_samples, readers, samples, rows, lattice.size[1])
            if need_source:
                grad_shares[samples] = _corner_products(grad_samples.to(wide), table, plan.corners[samples])
            del grad_samples
        if need_source:
            if plan.mask is not None:
                samples = slice(first_pixel * taps, lines.stop * out_width * taps)
                grad_mask[samples] = (grad_shares * plan.shares).sum(1)
                grad_shares *= plan.mask
            grad_source[lines] = lattice.source.gradient(lines, *_coordinate_gradients(grad_shares, plan))
        del plan, readers, grad_shares

    if need_x:
        grad_table = grad_table.view(batch, *lattice.size, x.shape[1])[:, : x.shape[2], : x.shape[3]]
        grad_table = grad_table.contiguous().permute(0, 3, 1, 2)
    if need_source:
        grad_source = grad_source.unflatten(0, (batch, out_height)).movedim((1, 2), (-2, -1))
        if mask is not None:
            grad_mask = grad_mask.view(batch, out_height, out_width, taps).permute(0, 3, 1, 2)
    if grad_kernel is None:
        return grad_table, grad_source, x.new_empty(0), grad_mask
    grad_weight = grad_kernel.flatten(0, 1).transpose(1, 2).to(weight.dtype).reshape(weight.shape)
    return grad_table, grad_source, grad_weight.contiguous(memory_format=kernel_format(weight)), grad_mask


def _kernel_gradient(table: Tensor, plan: _Plan, upstream: Tensor, kernel: Tensor, slab: int) -> Tensor:
    """The kernel's gradient from the plan's pixels, whose gradients `[n, C_out]` are given; in float32 at least."""
    taps, total = kernel.shape[2], None
    for pixels in _pieces(len(upstream), slab):
        samples = slice(pixels.start * taps, pixels.stop * taps)
        columns = _columns(table, plan.corners[samples], plan.weights[samples], taps)
        part = _product_gradient(columns, upstream[pixels], kernel)
        total = part.to(torch.promote_types(part.dtype, torch.float32)) if total is None else total.add_(part)
        del columns, part
    assert total is not None, "a plan has pixels"
    return total


def _product_gradient(columns: Tensor, upstream: Tensor, kernel: Tensor) -> Tensor:
    """The kernel's gradient from columns and the gradient of their product, `[n, C_out]`."""
    if len(kernel) == 1:
        return _matmul(upstream.t(), columns.t()).view_as(kernel)
    grouped = upstream.unflatten(1, kernel.shape[:2]).permute(1, 2, 0)
    return torch.bmm(grouped, _grouped(columns, kernel)).view_as(kernel)


def _sample_gradient(upstream: Tensor, kernel: Tensor) -> Tensor:
    """Gradient of n pixels `[n, C_out]` → of their samples, `[n·K, C]`."""
    groups, _, taps, group_channels = kernel.shape
    if groups == 1:
        return _matmul(upstream, kernel[0].flatten(1).t()).view(-1, group_channels)
    grouped = torch.bmm(upstream.unflatten(1, kernel.shape[:2]).transpose(0, 1), kernel.flatten(2))
    return grouped.unflatten(2, (taps, -1)).permute(1, 2, 0, 3).reshape(-1, groups * group_channels)


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
    numbers = torch.arange(rows.start, rows.stop, dtype=readers.rows.dtype)
    bags = torch.searchsorted(readers.rows[samples], numbers, out_int32=True)
    members = readers.samples[samples] - samples.start
    by_corner = (
        F.embedding_bag(members, grad_samples, bags, per_sample_weights=weights.contiguous(), mode="sum")
        for weights in readers.weights[samples].unbind(1)
    )
    out = next(by_corner)
    for shift, read in zip((1, width, width + 1), by_corner, strict=True):
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


# `ball_conv2d_reference`, fast on CPUs; and straight from a field of metrics
gather_conv2d = define("gather_conv2d", _forward, _gradients, device_types="cpu")
