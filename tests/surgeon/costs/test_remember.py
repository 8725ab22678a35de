"""Results on the meta device, remembered: the same as torch's own, and nothing that shapes alone do not decide."""

import pytest
import timm
import torch
from torch import Tensor

from surgeon import convert
from surgeon.costs import cost, remember

ATEN = torch.ops.aten


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remember, "_RESULTS", {})


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_a_result_is_a_new_tensor_of_the_same_layout() -> None:
    x = meta(2, 3, 4, 5).to(memory_format=torch.channels_last)
    first, second = (remember.run(ATEN.relu.default, (x,), {}) for _ in range(2))
    assert first.stride() == second.stride() == x.stride()
    assert len({t.untyped_storage()._cdata for t in (x, first, second)}) == 3
    parts = [remember.run(ATEN.native_batch_norm.default, (x, *[meta(3)] * 4, True, 0.1, 1e-5), {}) for _ in range(2)]
    assert [t.shape for t in parts[0]] == [t.shape for t in parts[1]] == [x.shape, (3,), (3,)]
    assert type(parts[0]) is type(parts[1])


def test_a_call_that_raises_raises_again() -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError):
            remember.run(ATEN.mm.default, (meta(2, 3), meta(2, 3)), {})


def test_numbers_of_other_types_are_other_numbers() -> None:
    x = meta(3, dtype=torch.int64)
    dtypes = [remember.run(ATEN.mul.Tensor, (x, number), {}).dtype for number in (1, 1.0, True, 1)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert remember.run(ATEN.mul.Tensor, (x, 1.0), {}).dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


def test_in_place_gives_what_was_given() -> None:
    for _ in range(2):
        x, y = meta(3), meta(3)
        assert remember.run(ATEN.add_.Tensor, (x, y), {}) is x
        assert remember.run(ATEN._foreach_add_.List, ([x, y], [y, x]), {}) is None
    assert len(remember._RESULTS) == 2


@pytest.mark.parametrize("func", [ATEN.unsqueeze_.default, ATEN.squeeze_.dim])
def test_a_change_of_shape_in_place_happens_every_time(func: torch._ops.OpOverload) -> None:
    for _ in range(2):
        x = meta(1, 3)
        remember.run(func, (x, 0), {})
        assert x.shape == ((1, 1, 3) if func is ATEN.unsqueeze_.default else (3,))


@pytest.mark.parametrize("func", [ATEN.view.default, ATEN._unsafe_view.default])
def test_views_share_the_storage_every_time(func: torch._ops.OpOverload) -> None:
    for _ in range(2):
        x = meta(2, 3)
        assert remember.run(func, (x, [6]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_tensors_with_data_are_computed() -> None:
    for number in (1.0, 2.0):
        out = remember.run(ATEN.add.Tensor, (torch.full((2,), number), torch.ones(2)), {})
        assert out.tolist() == [number + 1] * 2
    assert not remember._RESULTS


def test_what_is_remembered_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remember, "LIMIT", 4)
    for size in range(1, 9):
        assert remember.run(ATEN.relu.default, (meta(size),), {}).shape == (size,)
        assert len(remember._RESULTS) <= 4


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_cost_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(name)
    models = [model]
    if name == "test_resnet":
        models += [convert(model, layers="stage4", type=kind, input_size=64)[0] for kind in ("acda", "pafu", "sekg")]
    settings = {"input_size": 64, "batch_size": 2, "optimizer": "adamw", "amp": True}
    again = [cost(one, **settings) for one in models for _ in range(2)][1::2]
    assert remember._RESULTS
    monkeypatch.setattr(remember, "run", lambda func, args, kwargs: func(*args, **kwargs))
    assert again == [cost(one, **settings) for one in models]
