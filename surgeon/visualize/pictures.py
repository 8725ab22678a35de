"""The pictures of each layer type, by name. A type without its own still gets feature maps."""

from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from surgeon.layers import ACDAConv2d, DynamicConv2d, PAFUConv2d, SEKGConv2d
from surgeon.layers.acda.bases import basis_elements, centered, fourier_bessel, scale_boxes
from surgeon.visualize.capture import Captured, channel_rms
from surgeon.visualize.measures import FROM_WEIGHTS, alpha_by_scale, kernel_energy, numbers
from surgeon.visualize.sheet import SIDE, SIGNED, Panel, draw, figure_of, sheet, side_of

# Okabe and Ito's colors, distinguishable for color-blind readers, then more of the kind.
PALETTE = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#555555"),
    *("#7b3294", "#a6761d", "#1b9e77", "#e7298a", "#66a61e", "#b2182b", "#2166ac", "#bbbbbb"),
)
POINTS = (3, 4)  # rows and columns of positions whose atoms are shown


def pictures(seen: Captured, photo: NDArray[Any], bayer: str | None = None) -> dict[str, Figure]:
    """Every picture of one layer for one photo (H, W, 3) in [0, 1], by name.

    `bayer` is the sensor's pattern, read row by row, if the model's input is a mosaic of the photo.
    """
    found: dict[str, Figure] = {}
    if seen.code is not None and isinstance(seen.layer, PAFUConv2d):
        found["selection"] = selection(seen, photo)
        if bayer is not None and tuple(seen.code.shape[1:]) == photo.shape[:2]:
            found[f"selection-{bayer}"] = selection_by_color(seen, photo, bayer)
    if seen.code is not None and isinstance(seen.layer, ACDAConv2d):
        found["scales"] = coefficient_maps(seen, photo)
        found["atoms"] = atoms(seen, photo)
    if seen.code is not None and isinstance(seen.layer, SEKGConv2d):
        found["kernels"] = kernel_maps(seen, photo)
    found["features"] = feature_maps(seen, photo)
    return found


# --- PAFU ---------------------------------------------------------------------------------------------------------


def selection(seen: Captured, photo: NDArray[Any]) -> Figure:
    """Photo, selection mask (PAFU, Figures 2-5) and the share of each kernel."""
    assert seen.code is not None
    n = len(seen.code)
    shares = numbers(seen)["shares"]
    colors = [PALETTE[i % len(PALETTE)] for i in range(n)]
    tall = max(side_of(photo), 0.19 * n) + 0.6
    figure = figure_of(3 * SIDE + 0.4, tall, f"{seen.name}: kernel selected at each pixel")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    draw(figure, left, _photo(photo))
    mask = Panel(
        title=f"selection, {_size(seen.code[0])}",
        values=_array(seen.code.argmax(0)),
        colors=ListedColormap(colors),
        limits=(-0.5, n - 0.5),
        bar=False,
    )
    draw(figure, middle, mask)
    right.barh(range(n), [100 * s for s in shares], color=colors)
    right.set_title("share of pixels, %", fontsize=9)
    right.set_yticks(range(n), [f"kernel {i}" for i in range(n)], fontsize=8)
    right.tick_params(length=0)
    right.set_xlim(0, 118)
    right.set_xticks([])
    right.invert_yaxis()
    for i, share in enumerate(shares):
        right.text(100 * share + 1.5, i, f"{100 * share:.1f}", va="center", fontsize=8)
    for spine in right.spines.values():
        spine.set_visible(False)
    return figure


def selection_by_color(seen: Captured, photo: NDArray[Any], bayer: str) -> Figure:
    """Selection masks of the pixels that measure each color of the Bayer cell, stacked (PAFU, Figure 3)."""
    assert seen.code is not None
    n = len(seen.code)
    colors = ListedColormap([PALETTE[i % len(PALETTE)] for i in range(n)])
    chosen = _array(seen.code.argmax(0))
    masks = [
        Panel(
            title=f"{color}, row {i // 2}, column {i % 2} of the cell",
            values=chosen[i // 2 :: 2, i % 2 :: 2],
            colors=colors,
            limits=(-0.5, n - 0.5),
            bar=False,
        )
        for i, color in enumerate(bayer)
    ]
    title = f"{seen.name}: kernel selected at each pixel, by what the {bayer} sensor measures there"
    return sheet(title, [[_photo(photo), *masks[:2]], [None, *masks[2:]]])


# --- ACDA ---------------------------------------------------------------------------------------------------------


def coefficient_maps(seen: Captured, photo: NDArray[Any]) -> Figure:
    """Magnitude of the basis coefficients at each scale (ACDA, Figures 7 and D), and their distance from the mean."""
    assert seen.code is not None
    assert isinstance(seen.layer, ACDAConv2d)
    upper: list[Panel | None] = [_photo(photo)]
    lower: list[Panel | None] = [None]
    for name, alpha in alpha_by_scale(seen.layer, seen.code).items():
        title = "extra elements" if name == FROM_WEIGHTS else f"{name} bases"
        norm = alpha.square().sum((0, 1)).sqrt()
        upper.append(Panel(title=title, values=_array(norm), limits=(0.0, float(norm.max()) or 1.0)))
        away = (alpha - alpha.mean((2, 3), keepdim=True)).square().sum((0, 1)).sqrt()
        lower.append(Panel(title=f"from their mean, {_share(away, norm)}", values=_array(away)))
    distance = numbers(seen)["cosine_distance"]
    note = "norm of the coefficients over all atoms, lighter is higher"
    if distance is not None:
        note += f"; average pairwise cosine distance (A.5): {distance:.2g}"
    varies = any(panel is not None and panel.values.max() > 1e-6 for panel in lower)
    return sheet(f"{seen.name}: basis coefficients by scale", [upper, lower] if varies else [upper], note=note)


def atoms(seen: Captured, photo: NDArray[Any]) -> Figure:
    """The first dynamic atom at several positions of the image (ACDA, Figure C)."""
    assert seen.code is not None
    layer = seen.layer
    assert isinstance(layer, ACDAConv2d)
    alpha = seen.code.unflatten(0, (layer.config.atoms, -1))[0]
    height, width = alpha.shape[1:]
    rows, columns = POINTS
    places = [
        (int((r + 0.5) * height / rows), int((c + 0.5) * width / columns)) for r in range(rows) for c in range(columns)
    ]
    psi = layer.psi.detach().float().cpu()
    found = [torch.einsum("k,khw->hw", alpha[:, y, x].cpu(), psi) for y, x in places]
    most = max(float(atom.abs().max()) for atom in found) or 1.0
    scale = (photo.shape[0] / height, photo.shape[1] / width)
    marks = [((x + 0.5) * scale[1], (y + 0.5) * scale[0], str(i)) for i, (y, x) in enumerate(places, start=1)]
    figure = figure_of(
        SIDE * 2.9, max(side_of(photo) * 1.3, 1.05 * rows) + 0.4, f"{seen.name}: first atom at {len(places)} places"
    )
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.3))
    left, right = halves
    draw(figure, left.subplots(), Panel(title="picture", values=photo, colors=None, marks=marks))
    grid = right.subplots(rows, columns)
    for i, (place, atom) in enumerate(zip(grid.flat, found, strict=True), start=1):
        draw(figure, place, Panel(title=str(i), values=_array(atom), colors=SIGNED, limits=(-most, most), bar=False))
    bar = right.colorbar(grid[0, 0].images[0], ax=grid, shrink=0.8, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    return figure


def basis_name(layer: DynamicConv2d) -> str | None:
    """Name of a layer's basis, shared by layers with the same basis; None for a layer without one."""
    if not isinstance(layer, ACDAConv2d):
        return None
    config, (height, width) = layer.config, layer.geometry.kernel_size
    return f"bases-{height}x{width}-S{config.scales}-{config.basis_size}"


def bases(layer: DynamicConv2d) -> Figure:
    """The Fourier-Bessel elements, one row per scale, padded to the largest (ACDA, Figure B)."""
    assert isinstance(layer, ACDAConv2d)
    config, kernel = layer.config, layer.geometry.kernel_size
    boxes = scale_boxes(kernel, config.scales)
    window = tuple(basis_elements(kernel, config.scales, config.basis_size).shape[1:])
    figure = figure_of(
        1.05 * config.basis_size + 0.9,
        1.15 * len(boxes) + 0.5,
        f"Fourier-Bessel bases of a {kernel[0]}x{kernel[1]} kernel",
    )
    grid = figure.subplots(len(boxes), config.basis_size, squeeze=False)
    for row, box in zip(grid, boxes, strict=True):
        elements = centered(fourier_bessel(box, config.basis_size), (window[0], window[1]))
        for i, place in enumerate(row):
            if i >= len(elements):
                place.set_axis_off()
                continue
            most = float(elements[i].abs().max())
            draw(
                figure,
                place,
                Panel(title="", values=_array(elements[i]), colors=SIGNED, limits=(-most, most), bar=False),
            )
        row[0].set_ylabel(f"{box[0]}x{box[1]}", fontsize=9)
    return figure


# --- SEKG ---------------------------------------------------------------------------------------------------------


def kernel_maps(seen: Captured, photo: NDArray[Any]) -> Figure:
    """Energy that the generated part adds to the DConv's kernels at each pixel."""
    assert seen.code is not None
    assert isinstance(seen.layer, SEKGConv2d)
    about_static, about_mean = kernel_energy(seen.layer, seen.code)
    panels = [
        _photo(photo),
        Panel(title="kernel less its static part", values=_array(about_static)),
        Panel(title="kernel less its mean", values=_array(about_mean)),
    ]
    note = "energy of the difference, summed over channels, as a part of the static kernels' energy"
    return sheet(f"{seen.name}: energy of the dynamic kernels", [panels], note=note)


# --- every type ---------------------------------------------------------------------------------------------------


def feature_maps(seen: Captured, photo: NDArray[Any]) -> Figure:
    """Input and output, next to the output of the static part and of the original layer."""
    output = _array(channel_rms(seen.output))
    static = _array(channel_rms(seen.static))
    others = [static] + ([] if seen.original is None else [_array(channel_rms(seen.original))])
    shared = (0.0, max(float(values.max()) for values in (output, *others)) or 1.0)
    rows: list[list[Panel | None]] = [
        [
            _photo(photo),
            Panel(title=f"layer's input, {_size(seen.input)}", values=_array(channel_rms(seen.input))),
            Panel(title=f"output, {_size(seen.output)}", values=output, limits=shared),
        ],
        [
            None,
            Panel(title="output, dynamic part off", values=static, limits=shared),
            _change("by the dynamic part", seen.output, seen.static),
        ],
    ]
    if seen.original is not None:
        rows.append(
            [
                None,
                Panel(title="output of the original", values=others[-1], limits=shared),
                _change("from the original", seen.output, seen.original),
            ]
        )
    return sheet(f"{seen.name}: features before and after", rows, note="root mean square over channels")


def _change(what: str, output: Tensor, before: Tensor) -> Panel:
    """The difference with a color scale of its own, and its size in the title: the scale alone makes any difference look large."""
    change = output - before
    return Panel(title=f"change {what}, {_share(change, before)}", values=_array(channel_rms(change)))


def _share(part: Tensor, whole: Tensor) -> str:
    """Root mean square of one tensor as a percentage of the other's."""
    rms = [float(values.float().square().mean().sqrt()) for values in (part, whole)]
    return f"{100 * rms[0] / rms[1]:.2g} %" if rms[1] else "from 0"


def _photo(photo: NDArray[Any]) -> Panel:
    return Panel(title="picture", values=photo, colors=None)


def _array(values: Tensor) -> NDArray[Any]:
    found: NDArray[Any] = np.asarray(values.detach().cpu().numpy())
    return found


def _size(features: Tensor) -> str:
    return "x".join(map(str, features.shape))
