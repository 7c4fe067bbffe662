"""Who serves what: choosing, explaining, naming and overriding backends."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import pickle
import threading
import timeit
from typing import Any

import pytest
import torch

from polyzoo.attention import (
    Backend,
    Choice,
    CuSeqlens,
    DecomposedBias,
    Request,
    attention,
    backends,
    choose,
    explain,
    use_backend,
)
from polyzoo.attention.cli import BackendsConfig, ExplainConfig
from polyzoo.attention.commands import explain_call, list_backends, render_backends
from polyzoo.attention.features import BIT, FEATURES, long_square
from polyzoo.attention.registry import pick, refusal
from polyzoo.attention.torch_build import build_problem
from polyzoo.core.errors import UsageError
from support.cli import run_cli, run_python

SHAPE = (2, 4, 6, 8)
CPU = torch.device("cpu")


def request(**changes) -> Request:
    return Request(CPU, torch.float32, 64, 64, 0, 0)._replace(**changes)


def name_of(choice: Choice) -> str:
    return "nobody" if choice.backend is None else choice.backend.name


def kept_back():
    """A backend that leaves packed calls to others, and the others."""
    by_name = {backend.name: backend for backend in backends()}
    capable = dataclasses.replace(
        by_name["triton"],
        min_cc=None,
        available=lambda: None,
        by_name_only=(("varlen", "packed calls: another one is faster"),),
    )
    return capable, [by_name["sdpa"], by_name["reference"]]


def served_by(**options) -> str:
    """Name of the backend that would serve a call."""
    return name_of(explain(SHAPE, SHAPE, SHAPE, **options))


class TestChoosing:
    def test_auto_takes_the_first_and_gives_a_line_for_every_other(self):
        choice = choose(request())
        assert name_of(choice) == "sdpa"
        assert choice.reasons == ("reference: sdpa comes first",)
        assert str(choice).splitlines()[0].startswith("sdpa: ")

    def test_a_hit_takes_less_than_three_microseconds(self):
        asked = request(features=BIT["causal"])
        choose(asked)
        seconds = min(timeit.repeat(lambda: choose(asked), number=2000, repeat=5)) / 2000
        assert seconds < 3e-6

    def test_a_named_backend_never_falls_back(self):
        with pytest.raises(ValueError, match='backend="sdpa" cannot serve this call: sdpa: has no'):
            choose(request(features=BIT["int8"]), "sdpa")

    def test_half_precisions_are_told_apart(self):
        turing = dataclasses.replace(backends()[-1], dtypes=frozenset({torch.float16}))
        reason = refusal(turing, request(dtype=torch.bfloat16))
        assert reason == "reference: computes float16, not bfloat16: use torch.float16"

    def test_reasons_come_in_a_fixed_order(self):
        backend = Backend(
            name="kernel",
            summary="one that needs much",
            forward=backends()[0].forward,
            devices=frozenset({"cuda"}),
            dtypes=frozenset({torch.float16}),
            head_dims=lambda d: d % 8 == 0,
            head_dims_text="multiples of 8",
            features=frozenset({"causal"}),
            available=lambda: "not installed: pip install kernel",
        )
        asked = request(head_dim=72, value_dim=12, features=BIT["mask"] | BIT["causal"])
        assert refusal(backend, asked) == "kernel: not installed: pip install kernel"
        here = dataclasses.replace(backend, available=lambda: None)
        assert refusal(here, asked) == "kernel: runs on cuda, this is cpu"
        here = dataclasses.replace(here, devices=None)
        assert refusal(here, asked) == "kernel: computes float16, not float32"
        half = asked._replace(dtype=torch.float16)
        assert refusal(here, half) == "kernel: head size 12 is not served (allowed: multiples of 8)"
        even = half._replace(value_dim=72)
        assert refusal(here, even) == "kernel: has no mask"
        assert refusal(here, even._replace(features=BIT["causal"])) is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_compute_capability(self):
        asked = request(device=torch.device("cuda", 0))
        new = dataclasses.replace(backends()[0], min_cc=(99, 0))
        old = dataclasses.replace(backends()[0], max_cc=(1, 0))
        assert "needs sm_990, this is " in str(refusal(new, asked))
        assert "ends at sm_10, this is " in str(refusal(old, asked))

    def test_falling_back_is_logged_once_per_reason(self, caplog: pytest.LogCaptureFixture):
        by_name = {backend.name: backend for backend in backends()}
        sdpa, reference = by_name["sdpa"], by_name["reference"]
        narrow = dataclasses.replace(sdpa, name="narrow", head_dims=lambda d: d == 64)
        with caplog.at_level(logging.WARNING, logger="polyzoo.attention"):
            assert pick([narrow, reference], request()).backend is narrow
            assert not caplog.records
            for name in ("lse", "mask"):
                choice = pick([narrow, reference], request(head_dim=72, features=BIT[name]))
                assert choice.backend is reference
        assert [record.getMessage() for record in caplog.records] == [
            "attention falls back to reference; narrow: head size 72 is not served (allowed: any)"
        ]

    def test_auto_passes_over_what_is_kept_for_names(self, caplog: pytest.LogCaptureFixture):
        capable, others = kept_back()
        dense = request(device=torch.device("cuda"), dtype=torch.bfloat16, features=BIT["backward"])
        assert pick([capable, *others], dense).backend is capable
        packed = dense._replace(features=dense.features | BIT["varlen"])
        with caplog.at_level(logging.WARNING, logger="polyzoo.attention"):
            choice = pick([capable, *others], packed)
        assert name_of(choice) == "sdpa"
        assert choice.reasons == (
            "triton: by name only for packed calls: another one is faster",
            "reference: sdpa comes first",
        )
        assert not caplog.records, "a preference of ours is no falling back"
        assert refusal(capable, packed) is None
        assert pick([capable], packed, by_name=True).backend is capable

    def test_auto_does_not_come_back_to_what_it_passed_over(self):
        capable, others = kept_back()
        huge = request(
            device=torch.device("cuda"), features=BIT["varlen"] | BIT["relpos"], scores=1 << 40
        )
        choice = pick([capable, *others], huge)
        assert choice.backend is None
        assert choice.reasons[0].startswith("triton: by name only for packed calls: ")
        assert [reason.split(":")[0] for reason in choice.reasons] == [
            "triton",
            "sdpa",
            "reference",
        ]
        assert pick([capable], huge, by_name=True).backend is capable

    def test_long_calls_of_common_shape(self):
        assert long_square(577, 577, False)
        assert long_square(2048, 2048, True)
        assert not long_square(577, 577, True), "prompts have all lengths: each would be planned"
        assert not long_square(128, 128, False)
        assert not long_square(1024, 2048, False)

    def test_fp32_without_gradients_goes_to_torch(self):
        by_name = {backend.name: backend for backend in backends()}
        triton = dataclasses.replace(
            by_name["triton"], min_cc=None, devices=None, available=lambda: None
        )
        others = [by_name["sdpa"], by_name["reference"]]
        asked = request(long_square=True)
        choice = pick([triton, *others], asked)
        assert name_of(choice) == "sdpa"
        assert choice.reasons[0] == "triton: fp32 without gradients: slow products"
        for kept in (
            request(features=BIT["backward"], long_square=True),
            request(features=BIT["relpos"], long_square=True),
            request(features=BIT["window"], long_square=True),
            request(dtype=torch.bfloat16, long_square=True),
            request(),
        ):
            assert pick([triton, *others], kept).backend is triton, kept
        assert pick([triton], asked, by_name=True).backend is triton

    def test_reduced_precision_only_where_asked_for(self):
        by_name = {backend.name: backend for backend in backends()}
        int8 = dataclasses.replace(
            by_name["triton-int8"], min_cc=None, devices=None, available=lambda: None
        )
        exact = request(dtype=torch.float16)
        assert refusal(int8, exact) == 'triton-int8: serves only calls with precision="int8"'
        asked = exact._replace(features=BIT["int8"])
        assert refusal(int8, asked) is None
        assert "has no int8" in str(refusal(by_name["sdpa"], asked))
        learning = asked._replace(features=BIT["int8"] | BIT["backward"])
        assert "has no backward" in str(refusal(int8, learning))

    def test_what_is_passed_over_is_served(self):
        for backend in backends():
            assert {feature for feature, _ in backend.by_name_only} <= backend.features

    @pytest.mark.skipif(torch.cuda.is_available(), reason="asks about GPUs where there is none")
    def test_capabilities_without_a_gpu(self):
        asked = request(device=torch.device("cuda"))
        kernel = dataclasses.replace(backends()[0], available=lambda: None)
        assert refusal(kernel, asked) == (
            "triton: needs a GPU from sm_80 on, and there is none here to ask"
        )
        old = dataclasses.replace(kernel, min_cc=None, max_cc=(8, 9))
        assert refusal(old, asked) == (
            "triton: needs a GPU up to sm_89, and there is none here to ask"
        )

    def test_every_feature_has_a_bit(self):
        assert len(set(BIT.values())) == len(FEATURES)
        assert all(backend.features <= set(FEATURES) for backend in backends())

    def test_records_can_be_pickled(self):
        lengths = CuSeqlens.from_lengths([1, 2])
        again = pickle.loads(pickle.dumps(lengths))
        assert again.q.tolist() == [0, 1, 3]
        names = [b.name for b in pickle.loads(pickle.dumps(backends()))]
        assert names == [b.name for b in backends()]


class TestExplaining:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": True, "backward": True},
            {"window": (3, 3)},
            {"kv_lens": (2,)},
            {"mask": (6, 6), "bias": (6, 6)},
            {"dropout": 0.1},
            {"return_lse": True},
        ],
    )
    def test_shapes(self, options):
        assert served_by(**options) == "sdpa"

    def test_a_gpu_that_may_be_missing(self):
        capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
        choice = explain(SHAPE, SHAPE, SHAPE, dtype=torch.float16, device="cuda")
        assert name_of(choice) == ("triton" if capable else "sdpa")
        if not torch.cuda.is_available():
            assert "needs a GPU from sm_80 on, and there is none here" in choice.reasons[0]

    @pytest.mark.parametrize(
        ("device", "options", "reason"),
        [
            ("sm_75", {}, "triton: needs sm_80, this is sm_75"),
            (
                "sm_90a",
                {"head_dim": 264},
                "triton: head size 264 is not served (allowed: mult",
            ),
            ("sm_80", {"head_dim": 12}, "triton: head size 12 is not served (allowed: multiples"),
            (
                "sm_100",
                {"dtype": torch.float64},
                "triton: computes bfloat16, float16, float32, ",
            ),
        ],
    )
    def test_a_gpu_that_is_supposed(self, device: str, options: dict[str, Any], reason: str):
        shape = (1, 2, 16, options.pop("head_dim", 64))
        options = {"dtype": torch.float16, **options}
        pytest.importorskip("triton", reason="needs Triton, as torch brings it on Linux")
        choice = explain(shape, shape, shape, device=device, backend="triton", **options)
        assert choice.backend is None
        assert choice.reasons[0].startswith(reason)

    def test_meta_tensors_and_what_they_hold(self):
        q = torch.empty(1, 4, 6, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
        k = torch.empty(1, 2, 6, 8, device="meta", dtype=torch.bfloat16)
        choice = explain(q, k, k, cu_seqlens=CuSeqlens.from_lengths([6]), device="cpu")
        assert name_of(choice) == "sdpa"
        bias = DecomposedBias(*(torch.empty(1, 4, 6, n, device="meta") for n in (2, 3)))
        assert name_of(explain(q, k, k, bias=bias, device="cpu")) == "sdpa"

    def test_nobody_serves_int8(self):
        choice = explain(SHAPE, SHAPE, SHAPE, precision="int8")
        assert choice.backend is None
        assert [reason.split(":")[0] for reason in choice.reasons] == ["sdpa", "reference"]
        assert str(choice).startswith("no backend serves this call")

    def test_the_matrix_rule(self):
        long = (1, 16, 1 << 14, 80)
        assert name_of(explain(long, long, long)) == "sdpa"
        parts = [torch.empty(1, 16, 1 << 14, 1 << 7, device="meta") for _ in range(2)]
        choice = explain(long, long, long, bias=DecomposedBias(*parts))
        assert choice.backend is None
        assert "17,179,869,184 bytes" in choice.reasons[0]

    def test_bad_shapes_are_errors(self):
        with pytest.raises(ValueError, match="batch"):
            explain((1, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4))


class TestTorchBuild:
    """What torch was built for, against what a GPU needs."""

    CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")

    @pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
    def test_gpus_it_serves(self, capability: tuple[int, int]):
        assert build_problem(capability, self.CU130) is None

    def test_a_v100_is_told_which_torch_to_install(self):
        problem = build_problem((7, 0), self.CU130)
        assert problem is not None
        assert problem.startswith("this torch was built for sm_75 sm_80")
        assert problem.endswith("not for sm_70: install torch from its cu126 index")

    def test_a_newer_gpu_runs_ptx_or_needs_a_newer_torch(self):
        assert "install a newer torch" in str(build_problem((13, 0), self.CU130))
        assert build_problem((13, 0), (*self.CU130, "compute_120")) is None
        assert build_problem((7, 0), ()) is None, "unknown: nothing is claimed"

    def test_every_backend_refuses(self):
        archs = torch.cuda.get_arch_list()
        if not archs or "sm_70" in archs:
            pytest.skip("needs a torch built for GPUs, without sm_70")
        choice = explain(SHAPE, SHAPE, SHAPE, device="sm_70", dtype=torch.float16)
        assert choice.backend is None
        assert sum("install torch from its cu126 index" in line for line in choice.reasons) >= 2


class TestOverriding:
    def test_argument_context_environment(self, monkeypatch: pytest.MonkeyPatch):
        q = torch.zeros(SHAPE)
        monkeypatch.setenv("POLYZOO_ATTENTION", "reference")
        assert name_of(explain(q, q, q)) == "reference"
        with use_backend("sdpa"):
            assert name_of(explain(q, q, q)) == "sdpa"
            assert name_of(explain(q, q, q, backend="reference")) == "reference"
            with use_backend("auto"):
                assert name_of(explain(q, q, q)) == "sdpa"
        assert name_of(explain(q, q, q)) == "reference"

    def test_the_override_reaches_the_call(self):
        huge = [torch.zeros(1, 1, 1, 8).expand(1, 1, n, 8) for n in (1 << 15, 1 << 15, 1 << 15)]
        with use_backend("reference"), pytest.raises(ValueError, match="score matrix"):
            attention(*huge)

    def test_leaving_by_an_error_restores(self):
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert served_by() == "sdpa"

    def test_threads_do_not_see_each_other(self):
        inside, seen = threading.Barrier(2), {}

        def work(name: str):
            with use_backend(name):
                inside.wait()
                q = torch.randn(SHAPE)
                attention(q, q, q)
                seen[name] = served_by()
                inside.wait()

        threads = [threading.Thread(target=work, args=(n,)) for n in ("sdpa", "reference")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == {"sdpa": "sdpa", "reference": "reference"}
        assert served_by() == "sdpa"

    def test_tasks_do_not_see_each_other(self):
        async def work(name: str) -> str:
            with use_backend(name):
                await asyncio.sleep(0.01)
                return served_by()

        async def both() -> list[str]:
            return list(await asyncio.gather(work("reference"), work("sdpa")))

        assert asyncio.run(both()) == ["reference", "sdpa"]


def test_many_threads_share_one_description():
    lengths = CuSeqlens.from_lengths([5, 7, 7, 3])
    q = torch.randn(1, 2, 22, 8, generator=torch.Generator().manual_seed(0))
    expected = attention(q, q, q, cu_seqlens=lengths)
    results: list[torch.Tensor] = []
    fresh = CuSeqlens(lengths.q, lengths.k, 7, 7)
    threads = [
        threading.Thread(target=lambda: results.append(attention(q, q, q, cu_seqlens=fresh)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert all(torch.equal(result, expected) for result in results)


class TestCommands:
    def test_explain(self):
        done = run_cli("attention", "explain", "--q", "2,16,4096,72", "--json")
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["backend"] == "sdpa"
        assert answer["reasons"] == ["reference: sdpa comes first"]

    def test_explain_for_people(self):
        flags = ("--q", "1,16,65536,80", "--relpos", "256,256", "--dtype", "bf16")
        done = run_cli("attention", "explain", *flags)
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        assert lines[0] == "no backend serves this call"
        assert [line.split(":")[0] for line in lines[1:]] == ["  not sdpa", "  not reference"]

    def test_explain_supposes_a_gpu(self):
        answer = explain_call(ExplainConfig(q="2,16,4096,72", dtype="fp16", device="sm_75"))
        assert "triton: needs sm_80, this is sm_75" in answer.reasons
        if not any(reason.startswith("cuda: there is no libnvrtc") for reason in answer.reasons):
            assert answer.backend == "cuda"
        newer = explain_call(ExplainConfig(q="2,16,4096,72", dtype="fp16", device="sm_90"))
        assert newer.backend != "cuda"
        wide = explain_call(ExplainConfig(q="2,16,4096,72", dtype="bf16", device="sm_75"))
        assert wide.backend == "sdpa"

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"q": "2,16,72"}, "--q 2,16,72: give 4 sizes"),
            ({"q": "2,16,x,72"}, "give 4 sizes"),
            ({"q": "1,1,2,8", "k": "2,1,2,8"}, r"batch \(axis 0\) disagrees"),
            ({"q": "1,1,2,8", "relpos": "3,3"}, "3 x 3 is not the number of keys, 2"),
            ({"q": "1,1,2,8", "relpos": "1,2", "bias": True}, "one bias"),
            ({"q": "1,1,2,8", "device": "toaster"}, "toaster"),
            ({"q": "1,1,2,8", "backend": "nope"}, "backend is 'nope'"),
        ],
    )
    def test_wrong_usage(self, flags: dict[str, Any], message: str):
        with pytest.raises(UsageError, match=message):
            explain_call(ExplainConfig(**flags))

    def test_backends(self):
        table = list_backends(BackendsConfig())
        assert [row.name for row in table.backends] == [b.name for b in backends()]
        assert {"triton", "cuda", "sdpa", "reference"} <= {row.name for row in table.backends}
        assert table.auto["cpu"] == ("sdpa", "reference")
        assert "n x m for every call" in render_backends(table)
        row = dataclasses.replace(table.backends[0], by_name_only=("packed calls: slower",))
        kept = dataclasses.replace(table, backends=(row,))
        assert "  by name only for packed calls: slower" in render_backends(kept)
        packed = explain_call(ExplainConfig(q="1,4,8,16", packed=True, kv_lens=False, causal=True))
        assert packed.backend == "sdpa"


@pytest.mark.parametrize(
    "code",
    [
        "import polyzoo.attention; dir(polyzoo.attention)",
        "import polyzoo.attention.cli",
        "import polyzoo.attention.integrations",
    ],
)
def test_importing_the_package_loads_no_torch(code: str):
    done = run_python(f"{code}\nimport sys\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    done = run_python(
        "import polyzoo.attention.registry\n"
        "import polyzoo.attention as a\n"
        "values = {name: getattr(a, name) for name in a.__all__}\n"
        "assert callable(values['backends']) and callable(values['attention'])"
    )
    assert done.returncode == 0, done.stderr
