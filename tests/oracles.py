"""Slow and obviously right: what the fast paths are compared with."""

import math

import numpy as np
import torch

from influence import diffusion, keys


def gradients_by_loop(network, parameters, schedule, x0, t, eps, cond, num_draws):
    """One image at a time, one draw at a time, plain autograd: mean loss gradient of each image, flat."""
    rows = []
    tensors = list(parameters.values())
    flags = [p.requires_grad for p in tensors]
    for p in tensors:
        p.requires_grad_(True)
    for first in range(0, len(x0), num_draws):
        total = 0.0
        for r in range(first, first + num_draws):
            one = slice(r, r + 1)
            x_t = diffusion.noised(schedule, x0[one], t[one], eps[one])
            prediction = network(x_t, t[one], None if cond is None else cond[one])
            wanted = diffusion.target(schedule, x0[one], t[one], eps[one])
            w = diffusion.weight(schedule, t[one])
            total = total + (w * ((prediction - wanted) ** 2).mean()).sum() / num_draws
        grads = torch.autograd.grad(total, tensors)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    for p, flag in zip(tensors, flags, strict=True):
        p.requires_grad_(flag)
    return torch.stack(rows)


def jvp_rows_by_loop(network, parameters, x_t, t, cond, vectors):
    """J_θᵀ v of each row, by plain autograd."""
    rows = []
    tensors = list(parameters.values())
    flags = [p.requires_grad for p in tensors]
    for p in tensors:
        p.requires_grad_(True)
    for r in range(len(x_t)):
        one = slice(r, r + 1)
        prediction = network(x_t[one], t[one], None if cond is None else cond[one])
        grads = torch.autograd.grad(prediction, tensors, vectors[one])
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    for p, flag in zip(tensors, flags, strict=True):
        p.requires_grad_(flag)
    return torch.stack(rows)


def dense_countsketch(shapes, dim, seed):
    """P [k, p] written out entry by entry from the definition."""
    columns = []
    for name, shape in shapes.items():
        key = (seed, name, repr(tuple(shape)))
        size = math.prod(shape)
        signs = keys.signs(("countsketch-signs", *key), size)
        offsets = keys.integers(("countsketch-offsets", *key, dim), -(-size // dim), dim)
        part = np.zeros((dim, size))
        for j in range(size):
            part[(j + offsets[j // dim]) % dim, j] = signs[j]
        columns.append(part)
    return np.concatenate(columns, axis=1)


def dense_rademacher(shapes, dim, seed):
    """P [k, p] from the definition: blocks of 256 columns, each with a key of its own."""
    columns = []
    for name, shape in shapes.items():
        size = math.prod(shape)
        for start in range(0, size, 256):
            width = min(256, size - start)
            key = ("rademacher", seed, name, repr(tuple(shape)), dim, start)
            columns.append(keys.signs(key, width * dim).reshape(width, dim).T / math.sqrt(dim))
    return np.concatenate(columns, axis=1)


def project(projection, shapes, rows):
    """Apply a Projection to flat rows, parameter by parameter."""
    out = torch.zeros(len(rows), projection.dim)
    start = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        projection.add(out, name, rows[:, start : start + size])
        start += size
    return out


def damped_inverse_times(psi, weights, damping, v):
    """(H + λI)⁻¹ v in float64, by a dense solve."""
    psi = np.asarray(psi, np.float64)
    k = psi.shape[1]
    h = (psi.T * weights) @ psi / np.sum(weights)
    lam = damping * np.trace(h) / k
    return np.linalg.solve(h + lam * np.eye(k), np.asarray(v, np.float64).T).T
