"""The CUDA mask sampler. Without a GPU its source is compiled as C++ with cuda_on_cpu.h, which emulates threads."""

from __future__ import annotations

import ctypes
import logging
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import masking
from cjepa_fast import ops
from cjepa_fast.native import build
from cjepa_fast.native import cuda as native_cuda
from cjepa_fast.native import host as native
from cjepa_fast.reference import masks as reference_masks
from cjepa_fast.reference.masks import MaskArrays, MaskSpec, Mode
from masking import make

TESTS = Path(__file__).resolve().parent
KERNEL = TESTS.parent / "csrc" / "mask_sampler.cu"
FLAGS = ("-O2", "-std=c++17", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", "-x", "c++")  # fortified longjmp stays put
WARPS = (2, 8)  # images of a block: small blocks look back further, 8 is what is shipped
ASCENDING, DESCENDING, SHUFFLED = range(3)
UNTOUCHED = 0x5A

Schedule = tuple[int, int, int]  # seed, blocks that run at a time, order in which blocks start


def emulator(source: Path, output: Path, *flags: str) -> ctypes.CDLL:
    """Compile a CUDA source as C++ and type its `cuda_on_cpu_schedule`."""
    try:
        compiler = native.compiler()
    except build.Unavailable as reason:
        pytest.skip(f"nothing to build the emulation with: {reason}")
    include = ("-include", str(TESTS / "cuda_on_cpu.h"), "-I", str(KERNEL.parent), '-DCJEPA_SOURCE_HASH="emulated"')
    subprocess.run([*compiler, *FLAGS, *include, *flags, str(source), "-o", str(output)], check=True)
    library = ctypes.CDLL(str(output))
    library.cuda_on_cpu_schedule.argtypes = (ctypes.c_uint64, ctypes.c_int, ctypes.c_int)
    return library


@pytest.fixture(scope="module")
def emulators(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ctypes.CDLL]:
    folder = tmp_path_factory.mktemp("emulation")
    libraries = {}
    for warps in WARPS:
        path = folder / f"{warps}.so"
        emulator(KERNEL, path, f"-DCJEPA_WARPS={warps}")
        libraries[warps] = build.open_library(path, native_cuda.FUNCTIONS, "emulated")
        assert libraries[warps] is not None
    return libraries


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have torch.empty return UNTOUCHED memory between two guard pages; return a check that the guards are whole."""
    page, memories = 4096, []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = int(np.prod(shape)) * dtype.itemsize
        memory = torch.full((size + 2 * page,), UNTOUCHED, dtype=torch.uint8)
        memories.append(memory)
        return memory[page : page + size].view(dtype).reshape(shape)

    def check() -> None:
        for memory in memories:
            assert (memory[:page] == UNTOUCHED).all(), "written before its beginning"
            assert (memory[-page:] == UNTOUCHED).all(), "written behind its end"
        memories.clear()

    monkeypatch.setattr(torch, "empty", empty)
    return check


def new_workspace(library: ctypes.CDLL, images: int) -> torch.Tensor:
    return torch.zeros(library.cjepa_mask_workspace_bytes(images), dtype=torch.uint8)


def emulate(
    library: ctypes.CDLL,
    spec: MaskSpec,
    ids: np.ndarray,
    inverse: bool,
    union: bool,
    workspace: torch.Tensor,
    schedule: Schedule,
) -> tuple[native_cuda.DeviceMasks, int]:
    """Return masks and status; the step comes from memory, as in a replayed graph."""
    library.cuda_on_cpu_schedule(*schedule)
    step, status = torch.tensor(spec.step), torch.zeros((), dtype=torch.int32)
    spec = spec._replace(step=12345)
    masks = native_cuda.launch(
        library, spec, step, torch.from_numpy(ids), inverse, union, workspace, status, device=0, stream=0
    )
    return masks, int(status)


def assert_equal(masks: native_cuda.DeviceMasks, expected: MaskArrays) -> None:
    """Assert equal bits; in faithful mode contexts are uncut, with -1 from the image's count on."""
    for name, theirs in expected._asdict().items():
        tensor = getattr(masks, name)
        assert (tensor is None) == (theirs is None), name
        if theirs is None:
            continue
        ours = tensor.cpu().numpy()
        if name == "context" and masks.shortest is not None:
            assert int(masks.shortest) == expected.counts.min() == theirs.shape[1]
            np.testing.assert_array_equal(ours >= 0, np.arange(ours.shape[1]) < expected.counts[:, None])
            ours = ours[:, : theirs.shape[1]]
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


def random_spec(mode: Mode, rng: random.Random, large: bool) -> tuple[MaskSpec, np.ndarray]:
    """Draw a spec that the sampler accepts, and ids; some specs need many redraws or never succeed."""
    sides = (33, 47, 63, 64) if large else (2, 3, 5, 6, 7, 8, 9, 12, 14, 14, 14, 16, 16, 17, 28, 31, 32)
    height, width = rng.choice(sides), rng.choice(sides)
    room = mode == Mode.FAITHFUL
    num_targets = rng.choice((1, 2, 3, 4, 4, 4, 4, 5, 7, 64))
    shrink = rng.choice((1, 3, 3, 3))
    target_h, target_w = (max(1, rng.randint(1, side - room) // shrink) for side in (height, width))
    context_h, context_w = (rng.choice((side - room, rng.randint(1, side - room))) for side in (height, width))
    window = context_h * context_w
    min_keep = min(rng.randint(0, max(1, window // 4)), window - 1)
    keep = rng.randint(0, window) if rng.random() < 0.4 else rng.randint(0, max(1, window // 4))
    if mode == Mode.RASTERIZED:
        height, width = height // 2 * 2, width // 2 * 2
        num_targets, target_h, target_w = 3, height // 2, width // 2
        context_h, context_w, keep = target_h, target_w, target_h * target_w
    elif mode in (Mode.BLOCK, Mode.RANDOM):
        num_targets, context_h, context_w = 1, height, width
        if mode == Mode.RANDOM:
            target_h, target_w = 1, rng.randint(1, height * width)
        keep = height * width - target_h * target_w
    batch = rng.choice((1, 2, 3, 7, 8, 9, 16, 17, 40)) if large or rng.random() < 0.8 else rng.randint(41, 300)
    most = batch * height * width
    cap, union_cap = (rng.choice((0, 1, most, rng.randint(0, most // 2))) for _ in range(2))
    blocks = (num_targets, target_h, target_w, context_h, context_w)
    spec = MaskSpec(
        rng.getrandbits(64), rng.getrandbits(32), mode, height, width, *blocks, min_keep, keep, cap, union_cap
    )
    return spec, np.array([rng.getrandbits(63) for _ in range(batch)], np.int64)


def typical(mode: Mode, batch: int) -> MaskSpec:
    """Return a spec of a 14x14 grid with room for every patch."""
    blocks = {
        Mode.RASTERIZED: (3, 7, 7, 7, 7, 0, 49),
        Mode.BLOCK: (1, 10, 10, 14, 14, 0, 96),
        Mode.RANDOM: (1, 1, 140, 14, 14, 0, 56),
    }.get(mode, (4, 6, 6, 13, 13, 10, 45))
    return MaskSpec(2**63 + 5, 2**32 - 1, mode, 14, 14, *blocks, batch * 196, batch * 196)


@pytest.mark.parametrize("mode", Mode)
def test_equals_numpy_bit_for_bit(emulators: dict[int, ctypes.CDLL], guarded: Callable[[], None], mode: Mode) -> None:
    """All calls of a build share one workspace, for any size and mode."""
    workspaces = {warps: new_workspace(library, 300) for warps, library in emulators.items()}
    succeeded = 0
    for case in range(40):
        rng = random.Random(f"{mode} {case}")
        spec, ids = random_spec(mode, rng, large=case % 8 == 0)
        inverse, union, warps = rng.random() < 0.5, rng.random() < 0.5, rng.choice(WARPS)
        schedule = (case, rng.choice((1, 2, 3, 7, 100)), rng.randrange(3))
        masks, status = emulate(emulators[warps], spec, ids, inverse, union, workspaces[warps], schedule)
        guarded()
        try:
            expected = reference_masks.sample(spec, ids, inverse=inverse, union=union)
        except RuntimeError:
            assert status == 2, spec
            continue
        assert status == 0, spec
        assert_equal(masks, expected)
        succeeded += 1
    assert succeeded > 25


@pytest.mark.parametrize("order", [ASCENDING, DESCENDING, SHUFFLED])
@pytest.mark.parametrize("mode", [Mode.PACKED, Mode.FAITHFUL])
def test_any_schedule_gives_the_same_masks(
    emulators: dict[int, ctypes.CDLL], guarded: Callable[[], None], mode: Mode, order: int
) -> None:
    """300 images are 150 small blocks: with 64 threads each, the look-back takes up to three rounds."""
    spec, ids = typical(mode, 300), np.arange(300) << 33
    expected = reference_masks.sample(spec, ids, inverse=True, union=True)
    for seed, (warps, resident) in enumerate(((2, 1), (2, 5), (2, 1000), (8, 1), (8, 3), (8, 1000))):
        library = emulators[warps]
        masks, status = emulate(library, spec, ids, True, True, new_workspace(library, 300), (seed, resident, order))
        assert status == 0
        assert_equal(masks, expected)
    guarded()


@pytest.mark.parametrize("mode", Mode)
def test_replays_with_another_step_and_other_ids(emulators: dict[int, ctypes.CDLL], mode: Mode) -> None:
    library = emulators[8]
    workspace = new_workspace(library, 37)
    library.cuda_on_cpu_schedule(7, 3, SHUFFLED)
    step, ids = torch.zeros(1, dtype=torch.int64), torch.zeros(37, dtype=torch.int64)
    spec, status = typical(mode, 37), torch.zeros(1, dtype=torch.int32)
    for replay in (0, 1, 2**32 - 1):
        step.fill_(replay)
        ids.copy_(torch.arange(37) + 2**40 * replay // 2**20)
        masks = native_cuda.launch(library, spec, step, ids, True, True, workspace, status, device=0, stream=0)
        expected = reference_masks.sample(spec._replace(step=replay), ids.numpy(), inverse=True, union=True)
        assert_equal(masks, expected)
    assert int(status) == 0


@pytest.mark.parametrize("mode", [mode.name.lower() for mode in Mode])
def test_the_sampler_gives_the_same_masks_on_a_gpu(
    emulators: dict[int, ctypes.CDLL], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Run `MultiBlockSampler(impl="cuda")` on the CPU's memory, which the emulation can reach."""
    library = emulators[WARPS[0]]

    def sample(spec: MaskSpec, step: torch.Tensor, ids: torch.Tensor, **options: Any) -> native_cuda.DeviceMasks:
        assert len(ids) <= rooms[-1]
        wanted = [options[name] for name in ("inverse", "union", "workspace", "status")]
        return native_cuda.launch(library, spec._replace(step=99), step, ids, *wanted, device=0, stream=0)

    def workspace(images: int, device: str) -> torch.Tensor:
        rooms.append(images)
        return new_workspace(library, images)

    rooms: list[int] = []
    monkeypatch.setattr(native_cuda, "why_unavailable", lambda: None)
    monkeypatch.setattr(ops, "sample_masks_on_gpu", sample)
    monkeypatch.setattr(ops, "mask_workspace", workspace)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, **_: tensor)
    on_gpu, on_cpu = (make(mode, 8, seed=5, min_keep=3, impl=impl) for impl in ("cuda", "native"))
    for step, batch in ((0, 5), (7, 3), (2**32 - 1, 9)):
        ids = np.arange(batch) * 2**33
        theirs = on_cpu.sample(step, ids, inverse=True, union=True)
        masking.assert_equal(on_gpu.sample(step, ids, inverse=True, union=True), theirs)
    assert rooms == [5, 9]
    on_gpu.verify()
    on_gpu._status += 2
    with pytest.raises(RuntimeError, match="no context"):
        on_gpu.verify()


def test_launches_are_numbered_beyond_31_bits(emulators: dict[int, ctypes.CDLL]) -> None:
    library, ids = emulators[2], np.arange(200)
    workspace = new_workspace(library, 200)
    workspace[:8].view(torch.uint32)[1] = 2**31 - 3
    for step in range(4):
        spec = typical(Mode.PACKED, 200)._replace(step=step)
        masks, _ = emulate(library, spec, ids, False, True, workspace, (step, 4, SHUFFLED))
        assert_equal(masks, reference_masks.sample(spec, ids, union=True))


@pytest.mark.parametrize("mode", [Mode.FIXED, Mode.PACKED])
def test_an_image_without_context_is_empty_and_spoils_no_other(emulators: dict[int, ctypes.CDLL], mode: Mode) -> None:
    # At most 11 of the 16 patches are free, and all four targets coincide for some ids alone.
    blocks = (4, 2, 3, 4, 4, 10, 10)
    spec, ids = MaskSpec(3, 0, mode, 4, 4, *blocks, cap=4000, union_cap=4000), np.arange(60)
    found = np.ones(len(ids), bool)
    for sample_id in ids:
        try:
            reference_masks.sample(spec, ids[sample_id : sample_id + 1])
        except RuntimeError:
            found[sample_id] = False
    assert 5 < found.sum() < 55
    masks, status = emulate(emulators[2], spec, ids, True, False, new_workspace(emulators[2], 60), (0, 4, SHUFFLED))
    assert status == 2
    expected = reference_masks.sample(spec, ids[found], inverse=True)
    for ours, theirs in ((masks.target, expected.target), (masks.counts, expected.counts)):
        np.testing.assert_array_equal(ours.numpy()[found], theirs)
    assert masks.inverse is not None
    np.testing.assert_array_equal(masks.inverse.numpy()[found], expected.inverse)
    assert (masks.inverse.numpy()[~found] == -1).all() and (masks.counts.numpy()[~found] == 0).all()
    if mode == Mode.PACKED:
        np.testing.assert_array_equal(masks.context.numpy(), expected.context)  # they have no tokens
    else:
        np.testing.assert_array_equal(masks.context.numpy()[found], expected.context)
        assert (masks.context.numpy()[~found] == -1).all()


@pytest.mark.parametrize("mode", Mode)
def test_every_output_may_be_left_out(emulators: dict[int, ctypes.CDLL], mode: Mode) -> None:
    """Each output alone has the bits that it has among all; outputs that a mode lacks are ignored."""
    library, ids = emulators[8], torch.arange(20)
    workspace = new_workspace(library, 20)
    library.cuda_on_cpu_schedule(1, 2, SHUFFLED)
    spec = typical(mode, 20)
    arguments = (spec, torch.tensor(spec.step), ids)
    whole = native_cuda.launch(library, *arguments, True, True, workspace, None, device=0, stream=0)
    c_spec = native.Spec(*spec)
    for name, tensor in whole._asdict().items():
        if tensor is None:
            continue
        alone = torch.full_like(tensor, UNTOUCHED)
        outputs = native.Outputs(**({} if name == "shortest" else {name: alone.data_ptr()}))
        error = library.cjepa_sample_masks_cuda(
            *(ctypes.byref(c_spec), None, ids.data_ptr(), 20, ctypes.byref(outputs)),
            *(alone.data_ptr() if name == "shortest" else None, None, workspace.data_ptr(), 0, None),
        )
        assert error == 0
        torch.testing.assert_close(alone, tensor, rtol=0, atol=0, msg=name)
    if mode != Mode.PACKED:
        memory = torch.full((spec.cap,), UNTOUCHED, dtype=torch.int32)
        outputs = native.Outputs(offsets=memory.data_ptr(), image_of=memory.data_ptr())
        library.cjepa_sample_masks_cuda(
            *(ctypes.byref(c_spec), None, ids.data_ptr(), 20, ctypes.byref(outputs)),
            *(None, None, workspace.data_ptr(), 0, None),
        )
        assert (memory == UNTOUCHED).all()


def test_the_library_refuses_what_it_cannot_do(emulators: dict[int, ctypes.CDLL]) -> None:
    library, step, ids = emulators[8], torch.zeros(1, dtype=torch.int64), torch.arange(20)
    workspace = new_workspace(library, 20)
    too_wide = typical(Mode.FIXED, 20)._replace(context_w=15)
    with pytest.raises(RuntimeError, match="impossible block sizes at MaskSpec"):
        native_cuda.launch(library, too_wide, step, ids, False, False, workspace, None, device=0, stream=0)
    with pytest.raises(ValueError, match=r"workspace has 24 bytes: 20 images need 72"):
        spec = typical(Mode.FIXED, 20)
        native_cuda.launch(library, spec, step, ids, False, False, workspace[:24], None, device=0, stream=0)


FAULTY = """
#include <stdint.h>
__global__ void races(int* out) {
    __shared__ int seen[64];
    seen[threadIdx.x] = threadIdx.x;
#ifdef BARRIER
    __syncthreads();
#endif
    out[threadIdx.x] = seen[63 - threadIdx.x];
}
__global__ void diverges(int* out) {
    if (threadIdx.x % 2 == 0) out[threadIdx.x] = __ballot_sync(0xFFFFFFFF, 1);
    else out[threadIdx.x] = __ballot_sync(0xFFFFFFFF, 2);
}
__global__ void waits(int* out) {  // for the last block, which starts when there is room
    if (blockIdx.x == gridDim.x - 1) out[0] = 1;
    while (*(volatile int*)out == 0) __nanosleep(20);
}
__global__ void skips_a_barrier(int* out) {
    if (threadIdx.x < 32) __syncthreads();
    else __syncwarp();
    out[0] = 1;
}
extern "C" int run(int which, int blocks, int* out) {
    void (*kernels[])(int*) = {races, diverges, waits, skips_a_barrier};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(64);
    return cudaLaunchKernelEx(&config, kernels[which], out);
}
extern "C" const char* message() { return cudaGetErrorString(cudaErrorLaunchFailure); }
"""


def test_the_emulation_sees_races_divergence_and_deadlock(tmp_path: Path) -> None:
    source = tmp_path / "faulty.cu"
    source.write_text(FAULTY)
    libraries = {name: emulator(source, tmp_path / name, f"-D{name}") for name in ("BARRIER", "NO_BARRIER")}

    def run(which: int, blocks: int, library: str = "NO_BARRIER") -> tuple[int, np.ndarray, str]:
        emulated, out = libraries[library], np.zeros(64, np.int32)
        emulated.message.restype = ctypes.c_char_p
        emulated.cuda_on_cpu_schedule(5, 2, ASCENDING)
        error = emulated.run(which, blocks, ctypes.c_void_p(out.ctypes.data))
        return error, out, emulated.message().decode()

    races, diverges, waits, skips_a_barrier = range(4)
    assert (run(races, 1, "BARRIER")[1] == 63 - np.arange(64)).all()
    assert (run(races, 1)[1] != 63 - np.arange(64)).any()
    error, _, message = run(diverges, 1)
    assert error == 719 and "lanes of a warp are also at line" in message
    assert run(waits, 2)[0] == 0  # both fit
    for which, blocks in ((waits, 4), (skips_a_barrier, 1)):
        error, _, message = run(which, blocks)
        assert error == 719 and message == "deadlock"


@pytest.fixture(scope="module")
def nvcc() -> str:
    if (found := native_cuda.find_nvcc()) is None:
        pytest.skip("no nvcc was found")
    return found


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_nvcc_compiles_without_spills(nvcc: str, tmp_path: Path, arch: int) -> None:
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    if f"sm_{arch}\n" not in known:
        pytest.skip(f"{nvcc} does not know sm_{arch}")
    command = [nvcc, *native_cuda.FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", '-DCJEPA_SOURCE_HASH="x"']
    done = subprocess.run([*command, str(KERNEL), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    kernels = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert kernels == [("0", "0", "0")] * 2, said
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", said))
    assert registers <= 80, "three blocks of 256 threads fit on a multiprocessor"


def test_builds_once_into_the_cache(
    nvcc: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, build.__name__)
    monkeypatch.setenv("CJEPA_CACHE", str(tmp_path))
    library = native_cuda.load([(9, 0)])
    (path,) = tmp_path.glob("*.so")
    assert len(caplog.records) == 1 and str(path) in caplog.text
    before = path.stat().st_mtime_ns
    native_cuda.load([(9, 0), (9, 0)])
    assert len(caplog.records) == 1 and list(tmp_path.glob("*.so")) == [path] and path.stat().st_mtime_ns == before
    assert library.cjepa_source_hash().decode() in path.name
    assert library.cjepa_mask_workspace_bytes(17) == 24 + 3 * 2 * 8
    if not torch.cuda.is_available():
        assert library.cjepa_cuda_check(0) != 0 and library.cjepa_cuda_error(library.cjepa_cuda_check(0))


def test_hash_and_code_belong_to_the_gpus() -> None:
    targets = native_cuda.targets([(9, 0), (8, 0), (9, 0)])
    names = [target.split("arch=")[1] for target in targets]
    assert names == ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]
    calls = [(some, version) for version in ("13.0", "13.1") for some in (targets, targets[:1])]
    assert len({build.source_hash("cu", *call) for call in calls}) == 4


def test_the_reason_is_given_where_it_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CJEPA_CACHE", str(tmp_path))
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo 'unsupported GNU version' >&2; exit 1; }\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(build.Unavailable, match="bin/nvcc failed: unsupported GNU version"):
        native_cuda.load([(9, 0)])
    monkeypatch.setattr(native_cuda, "find_nvcc", lambda: None)
    with pytest.raises(build.Unavailable, match="no nvcc was found"):
        native_cuda.load([(9, 0)])
    if not torch.cuda.is_available():
        assert native_cuda.why_unavailable() == "torch sees no CUDA GPU"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "ids is on cpu"),
        ({"ids": torch.arange(4, dtype=torch.int32)}, r"ids is torch.int32: pass torch.int64"),
        ({"ids": torch.arange(8)[::2]}, r"ids has strides \[2\]"),
        ({"ids": torch.arange(4)[None]}, r"ids has shape \[1, 4\]"),
        ({"ids": torch.arange(0)}, r"ids has shape \[0\]"),
        ({"step": torch.zeros(1)}, r"step is torch.float32: pass torch.int32 or"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, r"step has shape \[2\]"),
        ({"step": torch.zeros(1, dtype=torch.int64, device="meta")}, "step is on meta, ids on cpu"),
        ({"status": torch.zeros(1)}, "status is torch.float32"),
        ({"workspace": torch.zeros(99)}, "workspace is torch.float32"),
    ],
)
def test_bad_tensors_are_refused_with_the_value(changed: dict, words: str) -> None:
    arguments: dict[str, Any] = {"step": torch.zeros(1, dtype=torch.int64), "ids": torch.arange(4)} | changed
    with pytest.raises(ValueError, match=words):
        native_cuda.sample_masks(typical(Mode.FIXED, 4), **arguments)


@pytest.fixture
def gpu() -> None:
    if (reason := native_cuda.why_unavailable()) is not None:
        pytest.skip(f"the CUDA sampler is not available: {reason}")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", Mode)
def test_gpu_equals_numpy_bit_for_bit(gpu: None, mode: Mode) -> None:
    workspace = native_cuda.new_workspace(300, "cuda")
    for case in range(50):
        rng = random.Random(f"gpu {mode} {case}")
        spec, ids = random_spec(mode, rng, large=case % 8 == 0)
        inverse, union = rng.random() < 0.5, rng.random() < 0.5
        status = torch.zeros(1, dtype=torch.int32, device="cuda")
        step, device_ids = torch.tensor([spec.step], device="cuda"), torch.from_numpy(ids).cuda()
        masks = native_cuda.sample_masks(
            spec, step, device_ids, inverse=inverse, union=union, workspace=workspace, status=status
        )
        try:
            expected = reference_masks.sample(spec, ids, inverse=inverse, union=union)
        except RuntimeError:
            assert int(status) == 2
            continue
        assert int(status) == 0
        assert_equal(masks, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", Mode)
def test_gpu_graph_replays_with_another_step_and_other_ids(gpu: None, mode: Mode) -> None:
    batch = 2048
    spec, workspace = typical(mode, batch), native_cuda.new_workspace(batch, "cuda")
    step, ids = torch.zeros(1, dtype=torch.int64, device="cuda"), torch.arange(batch, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = native_cuda.sample_masks(spec, step, ids, inverse=True, union=True, workspace=workspace)
    for replay in (0, 1, 77, 2**32 - 1):
        step.fill_(replay)
        ids.copy_(torch.arange(batch) * 3 + replay)
        graph.replay()
        expected = reference_masks.sample(spec._replace(step=replay), ids.cpu().numpy(), inverse=True, union=True)
        assert_equal(masks, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [Mode.PACKED, Mode.FAITHFUL])
def test_gpu_many_more_blocks_than_fit(gpu: None, mode: Mode) -> None:
    """2**18 images are 32,768 blocks. Compare 2,048 images with NumPy, and the sums of all."""
    batch = 1 << 18
    spec = typical(mode, batch)
    step, ids = torch.tensor([spec.step], device="cuda"), torch.arange(batch, device="cuda")
    workspace = native_cuda.new_workspace(batch, "cuda")
    for _ in range(3):
        masks = native_cuda.sample_masks(spec, step, ids, inverse=True, union=True, workspace=workspace)
        assert masks.union_offsets is not None and masks.inverse is not None
        counts = masks.counts.long()
        if mode == Mode.PACKED:
            assert masks.offsets is not None
            assert torch.equal(masks.offsets[1:].long(), counts.cumsum(0)) and masks.offsets[0] == 0
        else:
            assert masks.shortest is not None and int(masks.shortest) == int(counts.min())
        kept = counts if mode == Mode.PACKED else counts.min()
        assert torch.equal((masks.inverse >= 0).sum(1), kept.expand(batch))
        some = np.arange(batch - 2048, batch)
        expected = reference_masks.sample(spec, some, union=True)
        np.testing.assert_array_equal(masks.counts[-2048:].cpu().numpy(), expected.counts)
        np.testing.assert_array_equal(masks.target[-2048:].cpu().numpy(), expected.target)
        begin = int(masks.union_offsets[batch - 2048])
        assert expected.union is not None and expected.union_offsets is not None
        size = expected.union_offsets[-1]
        assert masks.union is not None and int(masks.union_offsets[-1]) == begin + size
        np.testing.assert_array_equal(masks.union[begin : begin + size].cpu().numpy(), expected.union[:size])
