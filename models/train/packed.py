"""Attention of many questions behind one picture, each as if asked alone.

Head tokens attend causally to the head; the tokens of a question to the whole head and causally to
their own question.  The two parts of a question's row are joined by their log-sum-exp, and each
part's gradient is flash attention's own, given the joined output and log-sum-exp (as in Liu et al.,
"Ring Attention", 2023).  Nothing is masked, expanded or computed twice.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Pack = tuple[int, int, int]  # head tokens, questions, tokens of each question


def plain(q: Tensor, k: Tensor, v: Tensor, pack: Pack) -> Tensor:
    """The same with scaled_dot_product_attention and a mask: the definition, and the way without flash."""
    head, count, length = pack
    t = head + count * length
    i = torch.arange(t, device=q.device)
    part = torch.where(i < head, -1, (i - head) // length)
    sees = (i[:, None] >= i) & ((part[:, None] == part) | (part == -1))
    return F.scaled_dot_product_attention(q, k, v, sees)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp [b, h, t]."""
    if q.is_cuda:
        out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out[0], out[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)


def _flash_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, causal: bool
                    ) -> tuple[Tensor, Tensor, Tensor]:
    if q.is_cuda:
        seed = torch.zeros((), dtype=torch.long, device=q.device)  # there is no dropout
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            g, q, k, v, y, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, seed, seed)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(g, q, k, v, y, lse, 0.0, causal)


def _split(x: Tensor, head: int, count: int) -> Tensor:
    """[n, h, t, d] -> the questions by themselves [n * count, h, length, d] (memory as [.., length, h, d])."""
    n, h, t, d = x.shape
    return x.transpose(1, 2)[:, head:].reshape(n * count, (t - head) // count, h, d).transpose(1, 2)


def _join(x: Tensor, n: int) -> Tensor:
    """Back to [n, h, count * length, d]."""
    return x.transpose(1, 2).reshape(n, -1, x.shape[1], x.shape[3]).transpose(1, 2)


@torch.library.custom_op("hae::packed", mutates_args=())
def packed(q: Tensor, k: Tensor, v: Tensor, head: int, count: int) -> tuple[Tensor, Tensor]:
    """q, k, v [n, h, t, d] -> output (in memory [n, t, h, d]) and log-sum-exp [n, h, t]."""
    n = q.shape[0]
    hk, hv = k[:, :, :head], v[:, :, :head]
    first, lse_first = _flash(q[:, :, :head], hk, hv, True)
    a, lse_a = _flash(q[:, :, head:], hk, hv, False)
    b, lse_b = _flash(_split(q, head, count), _split(k, head, count), _split(v, head, count), True)
    lse_b = _join(lse_b.unsqueeze(-1), n).squeeze(-1)
    share = torch.sigmoid(lse_a - lse_b).unsqueeze(-1)
    rest = a * share + _join(b, n) * (1 - share)
    out = torch.empty(n, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
    out[:, :, :head], out[:, :, head:] = first, rest
    return out, torch.cat([lse_first, torch.logaddexp(lse_a, lse_b)], 2)


@packed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, head: int, count: int) -> tuple[Tensor, Tensor]:
    n, h, t, d = q.shape
    return q.new_empty(n, t, h, d).transpose(1, 2), q.new_empty(n, h, t, dtype=torch.float32)


@torch.library.custom_op("hae::packed_backward", mutates_args=())
def packed_backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, head: int, count: int
                    ) -> tuple[Tensor, Tensor, Tensor]:
    n = q.shape[0]
    hk, hv = k[:, :, :head], v[:, :, :head]
    lse_head, lse_rest = lse[:, :, :head].contiguous(), lse[:, :, head:].contiguous()
    q0, k0, v0 = _flash_backward(g[:, :, :head], q[:, :, :head], hk, hv, y[:, :, :head], lse_head, True)
    q1, k1, v1 = _flash_backward(g[:, :, head:], q[:, :, head:], hk, hv, y[:, :, head:], lse_rest, False)
    go, qo, ko, vo, yo = (_split(x, head, count) for x in (g, q, k, v, y))
    lse_own = _split(lse.unsqueeze(-1), head, count).squeeze(-1).contiguous()
    q2, k2, v2 = _flash_backward(go, qo, ko, vo, yo, lse_own, True)
    grads = []
    for x0, x1 in ((q0, q1 + _join(q2, n)), (k0 + k1, _join(k2, n)), (v0 + v1, _join(v2, n))):
        out = torch.empty(n, q.shape[2], q.shape[1], q.shape[3], dtype=q.dtype, device=q.device).transpose(1, 2)
        out[:, :, :head], out[:, :, head:] = x0, x1
        grads.append(out)
    return grads[0], grads[1], grads[2]


@packed_backward.register_fake
def _(g: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, head: int, count: int
      ) -> tuple[Tensor, Tensor, Tensor]:
    n, h, t, d = q.shape
    a, b, c = (q.new_empty(n, t, h, d).transpose(1, 2) for _ in range(3))
    return a, b, c


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, ctx.head, ctx.count = inputs
    ctx.save_for_backward(q, k, v, *output)


def _grad(ctx, g, _):  # type: ignore[no-untyped-def]
    return *torch.ops.hae.packed_backward(g, *ctx.saved_tensors, ctx.head, ctx.count), None, None


packed.register_autograd(_grad, setup_context=_keep)


def error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative error of output and gradients against the definition in float32."""
    torch.manual_seed(0)
    pack = (37, 3, 12)
    x = torch.randn(3, 2, pack[0] + pack[1] * pack[2], 4, 64, device=device).transpose(2, 3)  # [3, n, h, t, d]
    g = torch.randn_like(x[0])
    results = []
    for y, run in ((x, plain), (x.to(dtype), lambda q, k, v, p: packed(q, k, v, p[0], p[1])[0])):
        y = y.detach().requires_grad_()
        q, k, v = y.unbind(0)
        out = run(q, k, v, pack)
        out.backward(g.to(out.dtype))
        assert y.grad is not None
        results.append((out.detach().float(), y.grad.float()))
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*results))
