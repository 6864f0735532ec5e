"""Float32 is float32 while measuring: TF32 and 16-bit sums are off, and are as before afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_mlp
from sharpscope import (
    Objective,
    Problem,
    SharpnessMonitor,
    loss_slice,
    measure_sharpness,
    spectral_density,
    top_eigenvalues,
)
from sharpscope.cli import main

BACKENDS = torch.backends
NEWER = [
    holder
    for holder in (BACKENDS, *(BACKENDS.cudnn, BACKENDS.cuda.matmul, BACKENDS.mkldnn))
    if hasattr(holder, "fp32_precision")
]
NEWER += [
    holder
    for parent in (BACKENDS.cudnn, BACKENDS.mkldnn)
    for name in ("conv", "rnn", "matmul")
    if (holder := getattr(parent, name, None)) is not None and hasattr(holder, "fp32_precision")
]
SUMS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation")


def older() -> list[Any]:
    """The flags of torch before 2.9; "mixed" where torch refuses to read them."""

    def read(flag: Callable[[], Any]) -> Any:
        try:
            return flag()
        except RuntimeError:
            return "mixed"

    flags = (
        lambda: BACKENDS.cudnn.allow_tf32,
        lambda: BACKENDS.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision,
    )
    return [read(flag) for flag in flags]


def flags() -> list[Any]:
    """All flags that decide what float32 and 16-bit products are rounded to."""
    sums = [getattr(BACKENDS.cuda.matmul, name, None) for name in SUMS]
    return [*older(), *(holder.fp32_precision for holder in NEWER), *sums]


def require_full() -> None:
    """No flag allows less than float32, by whichever interface it is read."""
    now = flags()
    assert not {"tf32", "bf16", "high", "medium", True} & set(now), now


@pytest.fixture(autouse=True)
def _flags_as_before() -> Iterator[None]:
    """Other tests find torch's defaults."""
    yield
    for holder in NEWER:
        holder.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.cudnn.allow_tf32 = True
    for name in SUMS[:2]:
        setattr(BACKENDS.cuda.matmul, name, True)


def setting(holder: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(holder, name, value)


STATES: dict[str, Callable[[], None]] = {
    "torch's default": lambda: None,
    "matmul high": lambda: torch.set_float32_matmul_precision("high"),
    "matmul medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older matmul": setting(BACKENDS.cuda.matmul, "allow_tf32", True),
    "older cudnn off": setting(BACKENDS.cudnn, "allow_tf32", False),
    "sums": setting(BACKENDS.cuda.matmul, SUMS[1], False),
}
if NEWER:
    STATES |= {
        "newer all": setting(BACKENDS, "fp32_precision", "tf32"),
        "newer all ieee": setting(BACKENDS, "fp32_precision", "ieee"),
        "newer cudnn ieee": setting(BACKENDS.cudnn, "fp32_precision", "ieee"),
        "newer conv": setting(BACKENDS.cudnn.conv, "fp32_precision", "ieee"),
        "newer matmul": setting(BACKENDS.cuda.matmul, "fp32_precision", "tf32"),
        "newer CPU": setting(BACKENDS.mkldnn.matmul, "fp32_precision", "bf16"),
    }


class Watching(nn.Module):
    """A linear layer that checks the flags at every forward pass, and its derivative at every backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        require_full()
        self.seen += 1
        out: Tensor = self.layer(x)
        if out.requires_grad:
            out.register_hook(lambda grad: require_full())
        return out


def watched() -> Problem:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(12, 3, generator=draw), torch.randn(12, 2, generator=draw)
    return Problem(model=Watching(), loss=nn.MSELoss(), data=data)


@pytest.mark.parametrize("state", STATES)
def test_tf32_is_off_while_measuring_and_as_before_afterwards(state: str) -> None:
    """Whatever the flags say, none allows TF32, bfloat16 or 16-bit sums inside, and all are restored."""
    STATES[state]()
    before = flags()
    with Objective(watched()).measuring():
        require_full()
    assert flags() == before


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("state", ["torch's default", "matmul high"])
def test_tf32_is_restored_on_errors(error: type[BaseException], state: str) -> None:
    """Errors, Ctrl-C and exit restore the flags."""
    STATES[state]()
    before = flags()
    with pytest.raises(error), Objective(watched()).measuring():
        raise error
    assert flags() == before


@pytest.mark.parametrize("analysis", [top_eigenvalues, spectral_density, measure_sharpness, loss_slice])
def test_every_analysis_computes_in_full_float32(analysis: Callable[..., Any]) -> None:
    """Each forward and backward pass of an analysis runs without TF32, and the provenance says so."""
    problem, before = watched(), flags()
    result = analysis(problem)
    assert problem.model.seen
    assert flags() == before
    assert result.provenance["tf32"] is False


def test_the_monitor_computes_in_full_float32() -> None:
    """A monitored step runs without TF32, and training goes on with the user's flags."""
    torch.set_float32_matmul_precision("high")
    problem, before = watched(), flags()
    monitor = SharpnessMonitor(problem, every=1)
    monitor.step()
    assert len(monitor.result().lambda_max) == 1
    assert flags() == before


def test_the_older_flags_can_be_read_and_set_inside_a_model() -> None:
    """A forward that turns cuDNN off with torch's own context manager can be measured: older and newer flags agree."""

    class Without(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = tiny_mlp(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            with BACKENDS.cudnn.flags(enabled=False):
                out: Tensor = self.layer(x)
            return out

    data = torch.eye(3), torch.zeros(3, 2)
    # The mean over 6 outputs: H = 2/6 [[I, 1], [1', 3]] for each output, whose largest eigenvalue is 4/3.
    found = top_eigenvalues(Problem(model=Without(), loss=nn.MSELoss(), data=data), k=1)
    assert found.lambda_max == pytest.approx(4 / 3, rel=1e-4)


def test_the_command_line_records_that_tf32_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`sharpscope eigen --json` has "tf32": false in its provenance."""
    torch.save(watched().model.state_dict(), tmp_path / "w.pt")
    assert main(["eigen", str(tmp_path / "w.pt"), "--problem", f"{__name__}:watched", "--k", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tf32"] is False
