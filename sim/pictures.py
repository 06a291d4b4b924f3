"""PNG pictures: samples of float and quantized models, and where activations are zero."""

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from golden.checkpoint import replace_file
from golden.data import to_pixels

__all__ = ["samples", "sparsity"]


def samples(path, rows):
    """Draw images as a grid, the rows of `rows` (a dict by title of (N, C, H, W) in [-1, 1])."""
    count = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.2 + 0.9 * count, 0.4 + 0.9 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (title, images) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image in zip(line, to_pixels(images), strict=False):
            planes = image.permute(1, 2, 0).numpy()
            axis.imshow(planes if planes.shape[2] == 3 else planes[:, :, 0], cmap="gray",
                        vmin=0, vmax=255)
        line[0].text(-0.15, 0.5, title, transform=line[0].transAxes, ha="right", va="center")
    save(figure, path)


def sparsity(path, model):
    """Draw the calibration's zero fractions, channel by evaluation, and the labels they lead to.

    Channels lie one under the other, layer by layer; labels follow the counts of the evaluation
    before.
    """
    fractions, labels, names, edges = [], [], [], [0]
    for name, item in model.layers.items():
        if not item.sparse_capable:
            continue
        pixels = item.height * item.width
        zeros = item.zeros.long().T                                  # (Cin, evaluations)
        before = torch.cat([zeros[:, :1], zeros[:, :-1]], 1)
        fractions.append(zeros.double() / pixels)
        labels.append(before * 65536 >= item.threshold * pixels)
        names.append(name)
        edges.append(edges[-1] + len(zeros))
    figure = Figure(figsize=(12, 2 + 0.012 * edges[-1]), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    shown = left.imshow(np.concatenate(fractions), aspect="auto", vmin=0, vmax=1,
                        interpolation="nearest")
    figure.colorbar(shown, ax=left, label="zeros / pixels")
    right.imshow(np.concatenate(labels), aspect="auto", vmin=0, vmax=1, cmap="gray_r",
                 interpolation="nearest")
    left.set_title("zero fraction")
    right.set_title("label: black is sparse")
    left.set_yticks([(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)], names,
                    fontsize=6)
    borders = [edge - 0.5 for edge in edges[1:-1]]
    for axis, color in ((left, "white"), (right, "gray")):
        axis.set_xlabel("evaluation")
        axis.hlines(borders, *axis.get_xlim(), colors=color, linewidth=0.3)
    save(figure, path)


def save(figure, path):
    canvas = FigureCanvasAgg(figure)
    replace_file(path, lambda temporary: canvas.print_png(temporary, metadata={"Software": None}))
