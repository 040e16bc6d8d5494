"""The choice among the back-ends of attention, and requests that cannot run."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from cjepa_fast import ops
from cjepa_fast.errors import UserError
from cjepa_fast.ops import _attention_choice as choice
from cjepa_fast.ops import _choice


def choose(impl: str = "auto", **changes: Any) -> str:
    arguments = {
        "device": "cuda", "index": 0, "dtype": "torch.bfloat16", "head_dim": 64, "bucket": 64, "packed": False,
        "structured": False, "known": False,
    }  # fmt: skip
    return choice.choose_attention(impl, **{**arguments, **changes})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Pretend to have a GPU called "GPU"; return the log of the choice."""
    monkeypatch.setattr(choice, "gpu_name", lambda index: "GPU")
    _choice.announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="cjepa_fast"):
        yield caplog


def test_auto_without_a_measurement(gpu: pytest.LogCaptureFixture) -> None:
    assert [choose(), choose(packed=True), choose(structured=True), choose(packed=True, head_dim=40)] == [
        "sdpa", "triton", "triton", "eager"
    ]  # fmt: skip
    assert choose(structured=True, head_dim=40) == "sdpa"
    assert gpu.messages == [
        "attention: sdpa (no measurement for GPU)",
        "attention (packed): triton (no measurement for GPU)",
        "attention (structured): triton (no measurement for GPU)",
        "attention (packed): eager (no measurement for GPU; triton cannot run: head width 40 is not among 24, 32, 64, "
        "80, 88, 128)",
        "attention (structured): sdpa (no measurement for GPU; triton cannot run: head width 40 is not among 24, 32, "
        "64, 80, 88, 128)",
    ]


def test_auto_takes_the_fastest_measured(gpu: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: "xformers is here")
    monkeypatch.setitem(choice.MEASURED, "GPU", {(96, 32): ("sdpa", "xformers", "triton"), (64, 32): ("triton",)})
    chosen = [choose(bucket=bucket, head_dim=32) for bucket in (96, 64, 128)]
    assert chosen == ["sdpa", "triton", "sdpa"]
    assert choose(bucket=96, head_dim=32, packed=True) == "xformers"
    assert choose(bucket=96, head_dim=32, packed=True, structured=True) == "triton"
    assert choose(bucket=64, head_dim=32, dtype="torch.float32") == "sdpa"  # measurements are of 16 bits
    assert gpu.messages[0] == "attention: sdpa (the fastest measured on GPU)"


def test_measurements_name_buckets_and_back_ends() -> None:
    for table in choice.MEASURED.values():
        for (tokens, head_dim), ranking in table.items():
            assert tokens in choice.TOKENS and head_dim > 0 and set(ranking) <= set(choice.BACKENDS)


def test_auto_on_cpu() -> None:
    assert choose(device="cpu") == choose(device="cpu", structured=True) == "sdpa"
    assert choose(device="cpu", packed=True, known=True) == "sdpa"
    assert choose(device="cpu", packed=True) == "eager", "compiled: the host may not look at the lengths"


@pytest.mark.parametrize(
    "impl, changes, message",
    [
        ("fast", {}, "unknown impl 'fast' for attention; known: auto, triton, sdpa, xformers, eager"),
        ("triton", {"dtype": "torch.float64"}, r"dtype torch\.float64 is not fp32, bf16 or fp16"),
        ("triton", {"head_dim": 40}, "head width 40 is not among 24, 32, 64, 80, 88, 128"),
        ("triton", {"bucket": 0}, "sequences are longer than 1024 tokens"),
        ("sdpa", {"packed": True}, "packed sequences would have to be padded"),
    ],
)
def test_impl_that_cannot_run_is_refused(impl: str, changes: dict[str, Any], message: str) -> None:
    """Also where "auto" would run another."""
    with pytest.raises(UserError, match=message):
        choose(impl, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"packed": True, "structured": True}, "packed sequences with target blocks would have to be taken apart"),
        ({"device": "cpu"}, "the tensors are on cpu, not cuda"),
        ({"dtype": "torch.float64"}, r"dtype torch\.float64 is not fp32, bf16 or fp16"),
        ({"head_dim": 20}, "head width 20 is not a multiple of 8"),
        ({"head_dim": 264}, "head width 264 is over 256"),
    ],
)
def test_xformers_that_cannot_run_is_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: "xformers is here")
    assert choose("xformers") == choose("xformers", packed=True) == choose("xformers", structured=True) == "xformers"
    with pytest.raises(UserError, match=message):
        choose("xformers", **changes)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="impl='triton' cannot run attention: triton is not installed; take another"):
        choose("triton")
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="xformers is not installed"):
        choose("xformers")


def require(impl: str, device: str = "cuda", **changes: Any) -> None:
    arguments = {
        "dtype": torch.bfloat16, "head_dims": (64,), "length": 196, "packed": False, "structured": False,
        "compiled": False,
    }  # fmt: skip
    ops.require_attention(impl, device, **{**arguments, **changes})


@pytest.mark.parametrize(
    "impl, device, changes, message",
    [
        ("flash", "cuda", {}, "unknown 'flash'; known: auto, triton, sdpa, xformers, eager"),
        ("triton", "cpu", {}, "triton cannot run: the tensors are on cpu, not cuda (or set TRITON_INTERPRET=1); use "
         "auto"),
        ("triton", "cuda", {"head_dims": (64, 12)}, "triton cannot run: head width 12 is not among 24, 32, 64, 80, 88, "
         "128; use auto"),
        ("triton", "cuda", {"length": 1025}, "triton cannot run: sequences are longer than 1024 tokens; use auto"),
        ("triton", "cuda", {"dtype": torch.float64}, "triton cannot run: dtype torch.float64 is not fp32, bf16 or "
         "fp16; use auto"),
        ("sdpa", "cuda", {"packed": True}, "sdpa cannot run: packed sequences would have to be padded; use auto"),
        ("sdpa", "cpu", {"packed": True, "compiled": True}, "sdpa cannot run: packed sequences would have to be "
         "padded; use auto"),
        ("xformers", "cuda", {}, "xformers cannot run: xformers is not installed; use auto"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_a_run(
    impl: str, device: str, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refused:
        require(impl, device, **changes)
    assert str(refused.value) == f"runtime.attention: {message}"


def test_what_can_run_is_not_refused() -> None:
    everything = {"packed": True, "structured": True, "compiled": True}
    for impl in ("auto", "triton", "eager"):
        require(impl, **everything)
    for impl in ("auto", "eager"):
        require(impl, "cpu", **everything, dtype=torch.float64, head_dims=(7,), length=5000)
    require("sdpa", structured=True, compiled=True)
    require("sdpa", "cpu", packed=True, structured=True)
