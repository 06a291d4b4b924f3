"""PNG pictures: samples of float and quantized models, and where activations are zero."""

import textwrap

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from golden.checkpoint import replace_file
from golden.data import to_pixels

__all__ = ["LAYERS", "samples", "sparsity"]

LAYERS = 5   # of `sparsity`, if none are named


def samples(path, rows, title=""):
    """Draw images as a grid.

    Parameters
    ----------
    path : of the PNG file
    rows : dict by title of (N, C, H, W) in [-1, 1], a row of the grid each
    title : of the picture
    """
    count = max(len(images) for images in rows.values())
    size = (max(1.2 + 0.9 * count, 4.2), (0.6 if title else 0.2) + 0.95 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    if title:
        figure.suptitle(textwrap.fill(title, int(12 * size[0])), fontsize=9)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, to_pixels(images), strict=False):
            planes = image.permute(1, 2, 0).numpy()
            axis.imshow(planes if planes.shape[2] == 3 else planes[:, :, 0], cmap="gray",
                        vmin=0, vmax=255)
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center",
                     fontsize=9)
    save(figure, path)


def sparsity(path, model, counts, thresholds, names=None):
    """Draw zero fractions, channel by evaluation, and the labels they lead to.

    Channels are sorted by their mean zero fraction. Labels follow the counts of the evaluation
    before; those of evaluation 0, the calibration's.

    Parameters
    ----------
    path : of the PNG file
    model : golden.quantized_network.QuantizedModel
    counts : zero codes of one image, (evaluations, Cin) by layer
    thresholds : by layer
    names : of the layers to draw; by default `LAYERS` of the W4A4 layers, from first to last
    """
    capable = [name for name, item in model.layers.items() if item.sparse_capable]
    if names is None:
        spaced = np.linspace(0, len(capable) - 1, min(LAYERS, len(capable)))
        names = [capable[round(place)] for place in spaced]
    figure = Figure(figsize=(2.9 * len(names) + 0.8, 6.4), dpi=110, layout="constrained")
    figure.suptitle("Zero activations of W4A4 layers over a sampling run, and the side each channel"
                    " goes to", fontsize=12)
    grid = figure.subplots(2, len(names), squeeze=False, sharex=True)
    for (above, below), name in zip(grid.T, names, strict=True):
        item = model.layers[name]
        pixels, zeros = item.height * item.width, counts[name].long()
        before = torch.cat([item.zeros[:1].long(), zeros[:-1]])
        sparse = before * 65536 >= thresholds[name] * pixels
        order = zeros.double().mean(0).argsort(stable=True)
        fractions = (zeros.double() / pixels)[:, order].T.numpy()
        shown = above.imshow(fractions, aspect="auto", vmin=0, vmax=1, cmap="viridis",
                             interpolation="nearest", origin="lower")
        below.imshow(sparse[:, order].T.numpy(), aspect="auto", vmin=0, vmax=1, cmap="gray_r",
                     interpolation="nearest", origin="lower")
        above.set_title(f"{name}\n{item.height}x{item.width}, {sum(item.segments)} channels,"
                        f" {(zeros.double() / pixels).mean():.0%} zeros", fontsize=8)
        share = sparse.double().mean()
        limit = ("never sparse" if thresholds[name] > 65536 else
                 f"sparse from {thresholds[name] / 65536:.0%} zeros on")
        below.set_title(f"{limit}: {share:.0%} of channels", fontsize=8)
        below.set_xlabel("evaluation (noise falls)", fontsize=8)
        for axis in (above, below):
            axis.tick_params(labelsize=7)
    grid[0, 0].set_ylabel("channel, by mean zeros", fontsize=8)
    grid[1, 0].set_ylabel("channel: black is sparse side", fontsize=8)
    bar = figure.colorbar(shown, ax=grid[0].tolist(), pad=0.01)
    bar.set_label("zeros / pixels", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    save(figure, path)


def save(figure, path):
    canvas = FigureCanvasAgg(figure)
    replace_file(path, lambda temporary: canvas.print_png(temporary, metadata={"Software": None}))
