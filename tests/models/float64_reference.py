"""Convolution and pooling in float64 numpy, written from the definition, with their gradients."""

from __future__ import annotations

import numpy as np


def _windows(x, height, width, stride):
    view = np.lib.stride_tricks.sliding_window_view(x, (height, width), axis=(1, 2))
    return view[:, ::stride, ::stride]  # [B, h, w, C, kh, kw]


def _add_windows(shape, contributions, stride):
    """Sum `[B, h, w, C, kh, kw]` window contributions back into an image of the given shape."""
    image = np.zeros(shape)
    _, rows, columns, _, height, width = contributions.shape
    for i in range(height):
        for j in range(width):
            image[:, i : i + rows * stride : stride, j : j + columns * stride : stride] += contributions[
                ..., i, j
            ]
    return image


def conv2d(x, kernel, stride, pads, grad, depthwise=False):
    """(output, gradient of x, gradient of kernel) for an upstream gradient."""
    x, kernel, grad = (np.asarray(a, np.float64) for a in (x, kernel, grad))
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    windows = _windows(padded, *kernel.shape[:2], stride)
    if depthwise:
        rules = ("bhwcij,ijc->bhwc", "bhwc,ijc->bhwcij", "bhwcij,bhwc->ijc")
        weights = kernel[:, :, 0]
    else:
        rules = ("bhwcij,ijco->bhwo", "bhwo,ijco->bhwcij", "bhwcij,bhwo->ijco")
        weights = kernel
    grad_padded = _add_windows(padded.shape, np.einsum(rules[1], grad, weights), stride)
    (top, _), (left, _) = pads
    grad_x = grad_padded[:, top : top + x.shape[1], left : left + x.shape[2]]
    return (
        np.einsum(rules[0], windows, weights),
        grad_x,
        np.einsum(rules[2], windows, grad).reshape(kernel.shape),
    )


def max_pool(x, window, stride, padding, grad):
    """(output, gradient of x): a tie goes to the first tap, NaN counts as largest (numpy's argmax does both)."""
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(np.asarray(x, np.float64), pads, constant_values=-np.inf)
    windows = _windows(padded, window, window, stride)
    flat = windows.reshape(*windows.shape[:4], window * window)
    winner = flat.argmax(-1)
    output = np.take_along_axis(flat, winner[..., None], -1)[..., 0]
    placed = (np.arange(window * window) == winner[..., None]) * np.asarray(grad, np.float64)[..., None]
    grad_padded = _add_windows(padded.shape, placed.reshape(windows.shape), stride)
    return output, grad_padded[:, padding : padding + x.shape[1], padding : padding + x.shape[2]]
