"""That the functions of the package are checked against their annotations, and each closure as its first one was."""

import checking
import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from influence import projection


def closure(value):
    @jaxtyped(typechecker=checking.kept_beartype)
    def scaled(x: Tensor, count: int) -> Tensor:
        return value if count == 0 else value * x

    return scaled


def test_closures_share_a_check_and_not_what_they_do():
    first = closure(torch.tensor(2.0))
    kept = len(checking._KEPT)
    second = closure(torch.tensor(3.0))
    assert len(checking._KEPT) == kept
    assert [float(f(torch.tensor(5.0), 1)) for f in (first, second)] == [10, 15]
    for f in (first, second, closure(None)):
        with pytest.raises(TypeCheckError):
            f(torch.tensor(5.0), "1")
        with pytest.raises(TypeCheckError):
            f(5.0, 1)
    with pytest.raises(TypeCheckError, match="return value"):
        closure(None)(torch.tensor(5.0), 0)


def test_shapes_are_bound_anew_in_each_call():
    pair = Float[Tensor, "n k"]

    def closure():
        @jaxtyped(typechecker=checking.kept_beartype)
        def dots(a: pair, b: pair) -> Float[Tensor, " n"]:
            return (a * b).sum(1)

        return dots

    for n, f in ((2, closure()), (3, closure())):
        assert f(torch.ones(n, 4), torch.ones(n, 4)).tolist() == [4] * n
        with pytest.raises(TypeCheckError):
            f(torch.ones(n, 4), torch.ones(n + 1, 4))


def test_functions_of_the_package_and_their_closures_are_checked():
    with pytest.raises(TypeCheckError):
        projection.countsketch({"w": (4,)}, dim="2", seed=0, device=torch.device("cpu"))
    made = [projection.countsketch({"w": (4,)}, dim=2, seed=seed, device=torch.device("cpu")) for seed in range(2)]
    for one in made:
        with pytest.raises(TypeCheckError):
            one.add(torch.zeros(1, 2), "w", [1.0, 2.0, 3.0, 4.0])
