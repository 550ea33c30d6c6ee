import pytest
import torch
from vitgraph.kernels.image_embed import image_embed, image_embed_op, image_embed_ref
from vitgraph.kernels.testing import assert_as_accurate


def arguments(count, H, W, patch, class_rows, D, dtype, device, has_bias=True):
    g = torch.Generator().manual_seed(H * W + D)
    make = lambda *s: torch.randn(*s, generator=g).to(device, dtype)  # noqa: E731
    K = 3 * patch**2
    rows = class_rows + (H // patch) * (W // patch)
    images, weight = make(count, 3, H, W), make(D, K) * K**-0.5
    table = torch.randn(rows, D, generator=g).to(device)
    return images, weight, make(D) if has_bias else None, table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("count", "H", "W", "patch", "class_rows", "D", "has_bias"),
    [(3, 42, 28, 14, 0, 40, False), (2, 28, 42, 14, 4, 72, True), (1, 12, 12, 2, 1, 136, True)],
)
def test_matches_oracle(count, H, W, patch, class_rows, D, has_bias, dtype, device):
    args = arguments(count, H, W, patch, class_rows, D, dtype, device, has_bias)
    images, weight, bias, table = args
    # a tower's own steps, each rounded to this dtype, with the class row like any other
    eager = torch.nn.functional.conv2d(images, weight.view(D, 3, patch, patch), bias, stride=patch)
    eager = eager.flatten(2).mT
    classes = torch.zeros(count, class_rows, D, dtype=dtype, device=device)
    eager = torch.cat([classes, eager], 1) + table.to(dtype)
    double = [None if a is None else a.double() for a in args]
    oracle = image_embed_ref(*double, patch)
    got = image_embed(*args, patch=patch)
    # fp32: one running sum over the pixels, where the library keeps several
    factor = 3.0 if dtype == torch.float32 else 2.0
    assert_as_accurate(got, eager.flatten(0, 1), oracle, factor=factor)


@pytest.mark.parametrize("live", [0, 1, 10, 13, 20])
def test_padding_is_zero_and_stale_images_are_not_read(live, device):
    args = arguments(2, 42, 28, 14, 4, 24, torch.float32, device)
    clean = image_embed(*args, patch=14)
    args[0].view(2, -1)[-(-live // 10) :] = float("nan")
    live_rows = torch.tensor([live], dtype=torch.int32, device=device)
    x = image_embed(*args, patch=14, live_rows=live_rows)
    torch.testing.assert_close(x[:live], clean[:live], rtol=1e-6, atol=1e-6)
    assert (x[live:] == 0).all()


def test_no_images(device):
    args = arguments(0, 28, 28, 14, 0, 8, torch.float32, device)
    assert image_embed(*args, patch=14).shape == (0, 8)


@pytest.mark.parametrize(
    ("images", "weight", "table", "message"),
    [
        (torch.zeros(1, 3, 28), torch.zeros(8, 588), torch.zeros(4, 8), r"\[I, channels, H, W\]"),
        (torch.zeros(1, 28, 28, 3).permute(0, 3, 1, 2), torch.zeros(8, 588), torch.zeros(4, 8),
         "contiguous"),
        (torch.zeros(1, 3, 28, 30), torch.zeros(8, 588), torch.zeros(4, 8), "28 x 30 .* side 14"),
        (torch.zeros(1, 3, 28, 28), torch.zeros(8, 500), torch.zeros(4, 8), r"\[8, 588\]"),
        (torch.zeros(1, 3, 28, 28), torch.zeros(8, 588), torch.zeros(3, 8), "each of 4 patches"),
    ],
)  # fmt: skip
def test_bad_arguments(images, weight, table, message):
    with pytest.raises(ValueError, match=message):
        image_embed(images, weight, None, table, patch=14)


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor"])
def test_opcheck(check, device):
    args = arguments(2, 28, 28, 14, 1, 16, torch.float32, device)
    torch.library.opcheck(image_embed_op, (*args, 14, None), test_utils=check)
